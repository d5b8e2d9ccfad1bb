"""Runs one engine from PyPI on texts of the bench, controlled by lines on standard input.

Arguments: the engine's name, the model folder, a folder for files, and the number of threads.
The script first prints its version and precision as a line of JSON. Then it answers each line
with a line of JSON:

    corpus PATH   reads token ids, a JSON list of lists      ->  {"texts": N}
    batch N       sets the number of texts in a batch        ->  {"batches": N}
    run           embeds the corpus, and measures the time   ->  {"seconds": S}
    vectors PATH  writes the vectors of the last run as f32  ->  {"dimensions": D}

The script builds the ONNX graph from the safetensors file that all engines read.
"""

import concurrent.futures
import itertools
import json
import logging
import pathlib
import sys
import time

import numpy
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """Nodes and weights of a graph under construction. Operations return their output's name."""

    def __init__(self):
        self.nodes, self.weights, self.names = [], [], itertools.count()

    def constant(self, array, name=None):
        name = name or f"c{next(self.names)}"
        self.weights.append(numpy_helper.from_array(numpy.ascontiguousarray(array), name))
        return name

    def op(self, kind, *inputs, **attributes):
        output = f"{kind}{next(self.names)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output


def build(folder):
    """The encoder as standard ONNX: ids and mask in, unit vectors by mean or CLS pooling out."""
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    epsilon = config["layer_norm_eps"]
    graph = Graph()

    def tensor(name):
        return tensors[prefix + name].astype(numpy.float32)

    def dense(states, name):
        product = graph.op("MatMul", states, graph.constant(tensor(f"{name}.weight").T))
        return graph.op("Add", product, graph.constant(tensor(f"{name}.bias")))

    def norm(states, name):
        scale, bias = (graph.constant(tensor(f"{name}.{part}")) for part in ("weight", "bias"))
        return graph.op("LayerNormalization", states, scale, bias, axis=-1, epsilon=epsilon)

    words = graph.constant(tensor("embeddings.word_embeddings.weight"))
    types = tensor("embeddings.token_type_embeddings.weight")[0]
    positions = tensor("embeddings.position_embeddings.weight") + types
    first = graph.constant(numpy.array([0]))
    length = graph.op("Shape", "ids", start=1, end=2)
    places = graph.op("Slice", graph.constant(positions), first, length, first)
    states = graph.op("Add", graph.op("Gather", words, "ids"), places)
    states = norm(states, "embeddings.LayerNorm")
    masked = graph.op("Sub", "mask", graph.constant(numpy.float32(1)))
    masked = graph.op("Mul", masked, graph.constant(numpy.float32(10000)))
    masked = graph.op("Unsqueeze", masked, graph.constant(numpy.array([1, 2])))
    split = graph.constant(numpy.array([0, 0, heads, width // heads]))
    joined = graph.constant(numpy.array([0, 0, width]))
    root = graph.constant(numpy.float32((width // heads) ** -0.5))
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"

        def per_head(which, order, states=states, name=name):
            projected = dense(states, f"{name}.attention.self.{which}")
            return graph.op("Transpose", graph.op("Reshape", projected, split), perm=order)

        query, key = per_head("query", [0, 2, 1, 3]), per_head("key", [0, 2, 3, 1])
        scores = graph.op("Mul", graph.op("MatMul", query, key), root)
        weights = graph.op("Softmax", graph.op("Add", scores, masked), axis=-1)
        context = graph.op("MatMul", weights, per_head("value", [0, 2, 1, 3]))
        context = graph.op("Reshape", graph.op("Transpose", context, perm=[0, 2, 1, 3]), joined)
        attended = graph.op("Add", dense(context, f"{name}.attention.output.dense"), states)
        states = norm(attended, f"{name}.attention.output.LayerNorm")
        inner = graph.op("Gelu", dense(states, f"{name}.intermediate.dense"))
        fed = graph.op("Add", dense(inner, f"{name}.output.dense"), states)
        states = norm(fed, f"{name}.output.LayerNorm")

    pooling = folder / "1_Pooling/config.json"
    if pooling.is_file() and json.loads(pooling.read_text()).get("pooling_mode_cls_token"):
        pooled = graph.op("Gather", states, graph.constant(numpy.int64(0)), axis=1)
    else:
        shares = graph.op("Unsqueeze", "mask", graph.constant(numpy.array([2])))
        axis = graph.constant(numpy.array([1]))
        pooled = graph.op("ReduceSum", graph.op("Mul", states, shares), axis, keepdims=0)
    length = graph.op("ReduceL2", pooled, graph.constant(numpy.array([1])), keepdims=1)
    graph.nodes.append(helper.make_node("Div", [pooled, length], ["vectors"]))
    made = helper.make_graph(
        graph.nodes,
        "encoder",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["texts", "tokens"]),
            helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["texts", "tokens"]),
        ],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["texts", width])],
        graph.weights,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def quantized(model, folder):
    """The same graph with int8 weights and dynamically quantized activations."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # quantize_dynamic warns about a preprocessing step that would change nothing in this graph.
    logging.getLogger().setLevel(logging.ERROR)
    plain, small = folder / "plain.onnx", folder / "int8.onnx"
    onnx.save(model, plain)
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
    return onnx.load(small)


class OnnxRuntime:
    """One session for each thread, because two threads in one batch wait for each other."""

    precision = "f32"

    def __init__(self, model, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        source = model.SerializeToString()
        providers = ["CPUExecutionProvider"]
        self.version = onnxruntime.__version__
        self.sessions = [
            onnxruntime.InferenceSession(source, options, providers=providers)
            for _ in range(threads)
        ]

    def run(self, batches, vectors):
        queue = iter(batches)

        def work(session):
            # next() on a list iterator is atomic under the interpreter's lock.
            for texts, ids, mask in queue:
                vectors[texts] = session.run(None, {"ids": ids, "mask": mask})[0]

        with concurrent.futures.ThreadPoolExecutor(len(self.sessions)) as pool:
            list(pool.map(work, self.sessions))


class OpenVino:
    """As many streams as threads, in the requested precision."""

    def __init__(self, model, precision, threads):
        import openvino

        self.version = openvino.__version__.split("-")[0]
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()),
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "NUM_STREAMS": threads,
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": precision,
            },
        )
        # The precision in use. On a CPU without bf16 instructions it is f32.
        in_use = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.precision = {"f32": "f32", "bf16": "bf16"}.get(in_use, in_use)
        self.queue = openvino.AsyncInferQueue(compiled, threads)

    def run(self, batches, vectors):
        def done(request, texts):
            vectors[texts] = request.get_output_tensor(0).data

        self.queue.set_callback(done)
        for texts, ids, mask in batches:
            self.queue.start_async({"ids": ids, "mask": mask}, texts)
        self.queue.wait_all()


def open_engine(name, model, scratch, threads):
    match name:
        case "onnxruntime-f32":
            return OnnxRuntime(model, threads)
        case "onnxruntime-int8":
            engine = OnnxRuntime(quantized(model, scratch), threads)
            engine.precision = "int8"
            return engine
        case "openvino-f32" | "openvino-bf16":
            return OpenVino(model, name.removeprefix("openvino-"), threads)
    raise SystemExit(f"unknown engine: {name}")


def padded(corpus, size):
    """Batches of texts of similar length, each padded to its longest text."""
    order = sorted(range(len(corpus)), key=lambda text: len(corpus[text]))
    batches = []
    for start in range(0, len(order), size):
        texts = order[start : start + size]
        longest = max(len(corpus[text]) for text in texts)
        ids = numpy.zeros((len(texts), longest), numpy.int64)
        mask = numpy.zeros((len(texts), longest), numpy.float32)
        for row, text in enumerate(texts):
            ids[row, : len(corpus[text])] = corpus[text]
            mask[row, : len(corpus[text])] = 1
        batches.append((texts, ids, mask))
    return batches


def main():
    name, folder, scratch = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    if name == "export":
        onnx.save(build(folder), scratch / "encoder.onnx")
        onnx.save(quantized(build(folder), scratch), scratch / "encoder-int8.onnx")
        return
    engine = open_engine(name, build(folder), scratch, int(sys.argv[4]))
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    corpus, batches, vectors = [], [], None
    print(json.dumps({"version": engine.version, "precision": engine.precision}), flush=True)
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        match verb:
            case "corpus":
                corpus = json.loads(pathlib.Path(argument).read_text())
                vectors = numpy.zeros((len(corpus), width), numpy.float32)
                answer = {"texts": len(corpus)}
            case "batch":
                batches = padded(corpus, int(argument))
                answer = {"batches": len(batches)}
            case "run":
                started = time.perf_counter()
                engine.run(batches, vectors)
                answer = {"seconds": time.perf_counter() - started}
            case "vectors":
                vectors.tofile(argument)
                answer = {"dimensions": width}
            case _:
                raise SystemExit(f"unknown line on standard input: {line!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

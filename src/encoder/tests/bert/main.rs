//! Compares the encoder with a simple BERT, and with candle's vectors of real texts by the real model.

mod damage;
mod reference;

use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use refarch_encoder::{Encoder, Error, InstructionSet, KernelKind, Precision};
use reference::{Reference, Shape};
use safetensors::tensor::Dtype;
use serde::Deserialize;

/// Tokens and vectors of real texts, by candle in `f32`. Written by `scripts/bench encoder --fixture FILE`.
const REAL: &str = include_str!("minilm.json");

/// The folder in which `scripts/setup` puts the model.
fn real_model() -> PathBuf {
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.refarch");
    std::env::var_os("REFARCH_RUNTIME_DIR").map_or_else(default, PathBuf::from).join("runtime/model")
}

const TINY: Shape = Shape {
    hidden: 64,
    layers: 2,
    heads: 4,
    inner: 128,
    positions: 80,
    vocabulary: 100,
    is_cls: false,
    dtype: Dtype::F32,
    prefix: "",
};

/// Shapes without padding, and shapes with padding of heads, widths and depths.
const SHAPES: [Shape; 6] = [
    TINY,
    Shape { hidden: 48, heads: 3, inner: 100, layers: 1, is_cls: true, ..TINY },
    Shape { hidden: 40, heads: 5, inner: 72, layers: 3, prefix: "bert.", ..TINY },
    Shape { hidden: 96, heads: 1, inner: 192, dtype: Dtype::F16, ..TINY },
    Shape { hidden: 384, heads: 6, inner: 1536, layers: 1, dtype: Dtype::BF16, ..TINY },
    Shape { hidden: 32, heads: 1, inner: 20, layers: 1, positions: 600, ..TINY },
];

/// Lengths equal to and near the sizes of registers, tiles and blocks.
const LENGTHS: [usize; 20] = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 63, 65, 80];

/// The kernels of this machine. `REFARCH_TEST_KERNELS` selects some by parts of their names, as in
/// `avx512,amx`. Prints which kernels are left out.
fn kernels() -> Vec<KernelKind> {
    let wanted = std::env::var("REFARCH_TEST_KERNELS").unwrap_or_default();
    let is_wanted = |kind: &KernelKind| wanted.split(',').any(|part| kind.name().contains(part));
    let (here, elsewhere): (Vec<_>, Vec<_>) =
        KernelKind::ALL.into_iter().partition(|kind| kind.is_supported() && is_wanted(kind));
    let names = |kinds: &[KernelKind]| kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
    println!("kernels tried: {}; not on this CPU, or not wanted: {}", names(&here), names(&elsewhere));
    here
}

fn cosine(a: &[f64], b: &[f32]) -> f64 {
    let (mut product, mut one, mut other) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let b = f64::from(*b);
        product += a * b;
        one += a * a;
        other += b * b;
    }
    product / (one * other).sqrt()
}

/// The lowest accepted cosine between a kernel and the reference, for random networks.
fn least(kind: KernelKind) -> f64 {
    match kind.precision() {
        Precision::Int8 => 0.995,
        Precision::Bf16 => 0.9995,
        _ => 0.999_999_9,
    }
}

fn sequences(shape: Shape, lengths: &[usize], seed: u64) -> Vec<Vec<u32>> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut sequence =
        |length: &usize| (0..*length).map(|_| random.random_range(0..shape.vocabulary as u32)).collect();
    lengths.iter().map(&mut sequence).collect()
}

fn slices(sequences: &[Vec<u32>]) -> Vec<&[u32]> {
    sequences.iter().map(Vec::as_slice).collect()
}

#[test]
fn every_kernel_computes_a_bert_of_any_shape() {
    let kernels = kernels();
    for (number, shape) in SHAPES.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let reference = Reference::write(shape, number as u64, dir.path());
        let mut lengths = LENGTHS.to_vec();
        if shape.positions > 500 {
            lengths.extend([129, 320, 321, 600]);
        }
        let sequences = sequences(shape, &lengths, number as u64);
        let expected: Vec<Vec<f64>> = sequences.iter().map(|ids| reference.embed(ids)).collect();
        for kind in &kernels {
            let vectors =
                Encoder::load(dir.path(), *kind).unwrap().execution_context().embed(&slices(&sequences));
            for ((ids, expected), vector) in
                sequences.iter().zip(&expected).zip(vectors.chunks_exact(shape.hidden))
            {
                let cosine = cosine(expected, vector);
                assert!(cosine >= least(*kind), "{kind}, {shape:?}, {} tokens: {cosine}", ids.len());
                let length: f64 = vector.iter().map(|number| f64::from(number * number)).sum();
                assert!((length - 1.0).abs() < 1e-5, "{kind}: a vector {length} long");
            }
        }
    }
}

#[test]
fn a_vector_has_the_same_bits_in_any_batch() {
    for (number, shape) in [SHAPES[0], SHAPES[2], SHAPES[5]].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        Reference::write(shape, number as u64, dir.path());
        let mut random = StdRng::seed_from_u64(number as u64);
        let longest = shape.positions;
        let lengths: Vec<usize> =
            (0..60).map(|at| if at % 20 == 0 { longest } else { random.random_range(1..40) }).collect();
        let sequences = sequences(shape, &lengths, 7);
        for kind in kernels() {
            let encoder = Encoder::load(dir.path(), kind).unwrap();
            let (mut worker, mut pair) = (encoder.execution_context(), encoder.two_threaded_context());
            let together = worker.embed(&slices(&sequences));
            let bits = |vector: &[f32]| vector.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
            let mut backwards = sequences.clone();
            backwards.reverse();
            let backwards = worker.embed(&slices(&backwards));
            let in_pairs = pair.embed(&slices(&sequences));
            for (at, ids) in sequences.iter().enumerate() {
                let of = |vectors: &[f32], at: usize| bits(&vectors[at * shape.hidden..][..shape.hidden]);
                let expected = of(&together, at);
                let context = format!("{kind}, {shape:?}, {} tokens", ids.len());
                assert!(expected == bits(&worker.embed(&[ids])), "alone: {context}");
                assert!(expected == bits(&pair.embed(&[ids])), "alone, by two threads: {context}");
                assert!(expected == of(&in_pairs, at), "by two threads: {context}");
                assert!(expected == of(&backwards, sequences.len() - 1 - at), "the other way: {context}");
            }
        }
    }
}

#[derive(Deserialize)]
struct Real {
    texts: Vec<RealText>,
}

#[derive(Deserialize)]
struct RealText {
    ids: Vec<u32>,
    vector: Vec<f64>,
}

#[test]
fn the_real_model_gives_the_vectors_that_candle_gives() {
    let real: Real = serde_json::from_str(REAL).unwrap();
    let sequences: Vec<&[u32]> = real.texts.iter().map(|text| text.ids.as_slice()).collect();
    let mut of_int8: Vec<(KernelKind, Vec<f32>)> = Vec::new();
    for kind in kernels() {
        let encoder = Encoder::load(&real_model(), kind).expect("run scripts/setup first, or scripts/test");
        let vectors = encoder.execution_context().embed(&sequences);
        let width = encoder.description().bert.hidden_size;
        let cosines: Vec<f64> = real
            .texts
            .iter()
            .zip(vectors.chunks_exact(width))
            .map(|(text, vector)| cosine(&text.vector, vector))
            .collect();
        let worst = cosines.iter().copied().fold(1.0, f64::min);
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        println!("{kind}: cosine to candle {mean:.6} on average, at least {worst:.6}");
        let (least, least_mean) = match kind.precision() {
            // A text without words has the lowest cosine.
            Precision::Int8 => (0.99, 0.9975),
            Precision::Bf16 => (0.9999, 0.9999),
            _ => (0.999_999, 0.999_999),
        };
        assert!(worst >= least && mean >= least_mean, "{kind}: {cosines:?}");
        if kind.precision() == Precision::Int8 {
            for (other, others) in &of_int8 {
                let pairs = others.chunks_exact(width).zip(vectors.chunks_exact(width));
                let cosines: Vec<f64> = pairs
                    .map(|(a, b)| cosine(&a.iter().copied().map(f64::from).collect::<Vec<_>>(), b))
                    .collect();
                let worst = cosines.iter().copied().fold(1.0, f64::min);
                let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
                println!("{kind}: cosine to {other} {mean:.6} on average, at least {worst:.6}");
                // The kernels round at different places, so they differ from each other as much as from
                // `f32`.
                assert!(worst >= least && mean >= 0.997, "{kind} and {other}: {cosines:?}");
            }
            of_int8.push((kind, vectors));
        }
    }
}

#[test]
fn one_and_two_threaded_contexts_share_a_model_across_threads() {
    let dir = tempfile::tempdir().unwrap();
    Reference::write(TINY, 1, dir.path());
    let sequences = sequences(TINY, &[3, 20, 80, 1, 9], 1);
    for kind in kernels() {
        let encoder = Encoder::load(dir.path(), kind).unwrap();
        let expected = encoder.execution_context().embed(&slices(&sequences));
        std::thread::scope(|scope| {
            for helped in [false, true, true] {
                let (encoder, sequences, expected) = (&encoder, &sequences, &expected);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let mut worker =
                            if helped { encoder.two_threaded_context() } else { encoder.execution_context() };
                        assert!(worker.embed(&slices(sequences)) == *expected, "{kind}");
                    }
                });
            }
        });
        drop(encoder);
    }
}

#[test]
fn too_long_sequences_are_cut_empty_ones_are_zero_and_unknown_tokens_refused() {
    let dir = tempfile::tempdir().unwrap();
    Reference::write(TINY, 1, dir.path());
    let encoder = Encoder::load(dir.path(), KernelKind::Portable).unwrap();
    let mut worker = encoder.execution_context();
    let long: Vec<u32> = (0..200).map(|at| at % 100).collect();
    let vectors = worker.embed(&[&long, &[], &long[..80]]);
    let [too_long, empty, cut] = [0, 1, 2].map(|at| &vectors[at * 64..][..64]);
    assert!(too_long == cut && empty.iter().all(|number| *number == 0.0));
    assert!(worker.embed(&[]).is_empty());
    let unknown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.embed(&[&[1, 100]])));
    assert!(unknown.is_err(), "a token past the vocabulary is refused");
    assert!(worker.embed(&[&long]) == too_long, "and harms nothing");
}

#[test]
fn a_kernel_is_chosen_by_cpu_precision_and_instructions() {
    use InstructionSet::{Auto, Avx2, Portable};
    assert_eq!(KernelKind::select(Precision::F32, Portable).unwrap(), KernelKind::Portable);
    assert_eq!(KernelKind::select(Precision::Auto, Portable).unwrap(), KernelKind::Portable);
    for precision in [Precision::Bf16, Precision::Int8] {
        let error = KernelKind::select(precision, Portable).unwrap_err().to_string();
        assert!(error.contains("embedder.precision") && error.contains("auto"), "{error}");
    }
    let best = KernelKind::select(Precision::Auto, Auto).unwrap();
    assert!(best.is_supported() && best.precision() != Precision::Int8, "{best}");
    if KernelKind::Avx2.is_supported() {
        assert_eq!(KernelKind::select(Precision::F32, Avx2).unwrap(), KernelKind::Avx2);
        assert_eq!(KernelKind::select(Precision::Auto, Avx2).unwrap(), KernelKind::Avx2Bf16);
        assert_eq!(KernelKind::select(Precision::Bf16, Avx2).unwrap(), KernelKind::Avx2Bf16);
        assert_eq!(KernelKind::select(Precision::Int8, Avx2).unwrap(), KernelKind::Avx2Int8);
        assert_ne!(best, KernelKind::Portable);
    }
    // For an index, f32 and bf16 are one class of precision, and int8 is another class.
    let classes = [Precision::Auto, Precision::F32, Precision::Bf16, Precision::Int8].map(Precision::class);
    assert_eq!(classes, ["f32", "f32", "f32", "int8"]);
}

#[test]
fn an_unfit_model_is_refused_with_its_reason() {
    let refused = |file: &str, text: &str, wanted: &str| {
        let dir = tempfile::tempdir().unwrap();
        Reference::write(TINY, 1, dir.path());
        let path = dir.path().join(file);
        match text.split_once("->") {
            Some((from, to)) => {
                let written = std::fs::read_to_string(&path).unwrap();
                assert!(written.contains(from), "{written}");
                std::fs::write(&path, written.replace(from, to)).unwrap();
            }
            None => std::fs::write(&path, text).unwrap(),
        }
        let error = Encoder::load(dir.path(), KernelKind::Portable).err().unwrap().to_string();
        assert!(error.contains(wanted) && error.contains(file), "{file}, {text}: {error}");
    };
    refused("config.json", r#""gelu"->"relu""#, "only gelu is supported");
    refused("config.json", r#""bert"->"roberta""#, "only bert is supported");
    refused("config.json", r#""absolute"->"relative_key""#, "only absolute is supported");
    refused("config.json", r#""num_attention_heads":4->"num_attention_heads":3"#, "not a multiple");
    refused("config.json", r#""num_hidden_layers":2->"num_hidden_layers":0"#, "num_hidden_layers is 0");
    refused("config.json", "{", "EOF");
    refused("1_Pooling/config.json", r#"tokens":true->tokens":false"#, "only mean and CLS pooling");
    refused("model.safetensors", "not a model", "model.safetensors");
    let refused_weights = |change: &str, wanted: &str| {
        let dir = tempfile::tempdir().unwrap();
        Reference::write(TINY, 1, dir.path());
        let path = dir.path().join("config.json");
        let (from, to) = change.split_once("->").unwrap();
        std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replace(from, to)).unwrap();
        let error = Encoder::load(dir.path(), KernelKind::Portable).err().unwrap().to_string();
        assert!(error.contains(wanted) && error.contains("model.safetensors"), "{change}: {error}");
    };
    refused_weights(r#""num_hidden_layers":2->"num_hidden_layers":3"#, "encoder.layer.2.");
    refused_weights(r#""hidden_size":64->"hidden_size":128"#, ", not [");
    refused_weights(r#""vocab_size":100->"vocab_size":101"#, "word_embeddings");
    let empty = tempfile::tempdir().unwrap();
    let error = Encoder::load(empty.path(), KernelKind::Portable).err().unwrap();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
}

"""Builds the index of one engine from PyPI over the vectors of the bench, and asks it one query at a time.

Arguments: the engine's name, a file of vectors and a file of queries (raw little-endian f32, of length 1),
the number of dimensions, how many neighbours to find, and the number of runs.

For each setting of the search the script prints a line of JSON: build time, memory, times of a query in
this process, and the places of the vectors that were found for each query. The build uses all cores, a
query one.
"""

import json
import os
import pathlib
import statistics
import sys
import time

import numpy

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# Those of pgvector: neighbours of a vector in a graph, and candidates during the build.
DEGREE, CANDIDATES = 16, 64

PROBES = (1, 3, 10, 20, 50)
EXPANSIONS = (40, 200, 1000)


class FaissLists:
    """IVF over f32, with as many lists as pgvector's documentation recommends."""

    setting, values = "probes", PROBES

    def __init__(self, vectors):
        import faiss

        self.version, self.precision = faiss.__version__, "f32"
        faiss.omp_set_num_threads(CORES)
        rows, dimensions = vectors.shape
        lists = max(10, rows // 1000 if rows <= 1_000_000 else int(rows**0.5))
        quantizer = faiss.IndexFlatIP(dimensions)
        self.index = faiss.IndexIVFFlat(quantizer, dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        self.quantizer = quantizer
        # Only as many as k-means uses.
        chosen = numpy.random.default_rng(1).choice(rows, min(rows, lists * 256), replace=False)
        self.index.train(vectors[numpy.sort(chosen)])
        self.index.add(vectors)
        faiss.omp_set_num_threads(1)

    def set(self, value):
        self.index.nprobe = value

    def search(self, query, count):
        return self.index.search(query[None], count)[1][0]


class FaissGraph:
    """HNSW over f32."""

    setting, values = "ef_search", EXPANSIONS

    def __init__(self, vectors):
        import faiss

        self.version, self.precision = faiss.__version__, "f32"
        faiss.omp_set_num_threads(CORES)
        self.index = faiss.IndexHNSWFlat(vectors.shape[1], DEGREE, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = CANDIDATES
        self.index.add(vectors)
        faiss.omp_set_num_threads(1)

    def set(self, value):
        self.index.hnsw.efSearch = value

    def search(self, query, count):
        return self.index.search(query[None], count)[1][0]


class Usearch:
    """HNSW over f16, the precision in which pgvector stores."""

    setting, values = "ef_search", EXPANSIONS

    def __init__(self, vectors):
        import usearch
        import usearch.index

        self.version, self.precision = usearch.__version__, "f16"
        self.index = usearch.index.Index(
            ndim=vectors.shape[1],
            metric="ip",
            dtype="f16",
            connectivity=DEGREE,
            expansion_add=CANDIDATES,
        )
        self.index.add(numpy.arange(len(vectors)), vectors, threads=CORES)

    def set(self, value):
        self.index.expansion_search = value

    def search(self, query, count):
        return self.index.search(query, count, threads=1).keys


ENGINES = {"faiss-ivf": FaissLists, "faiss-hnsw": FaissGraph, "usearch": Usearch}


def memory_mib(field):
    """This process's memory by /proc; none where there is no /proc."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def percentile(times, share):
    return sorted(times)[max(1, -int(-len(times) * share // 1)) - 1]


def main():
    name, vectors, queries = sys.argv[1:4]
    dimensions, count, runs = map(int, sys.argv[4:7])
    vectors = numpy.fromfile(vectors, "<f4").reshape(-1, dimensions)
    queries = numpy.fromfile(queries, "<f4").reshape(-1, dimensions)
    before = memory_mib("VmRSS")
    started = time.perf_counter()
    engine = ENGINES[name](vectors)
    build_s = time.perf_counter() - started
    grown = None if before is None else memory_mib("VmRSS") - before
    for value in engine.values:
        engine.set(value)
        found, p50, p99 = [], [], []
        for run in range(runs + 1):
            times, found = [], []
            for query in queries:
                started = time.perf_counter()
                keys = engine.search(query, count)
                times.append((time.perf_counter() - started) * 1e3)
                found.append([int(key) for key in keys])
            # The first run fills the caches.
            if run:
                p50.append(percentile(times, 0.5))
                p99.append(percentile(times, 0.99))
        row = {
            "engine": name,
            "version": engine.version,
            "precision": engine.precision,
            "setting": f"{engine.setting} {value}",
            "build_s": build_s,
            "index_mib": grown,
            "peak_mib": memory_mib("VmHWM"),
            "p50_ms": statistics.median(p50),
            "p99_ms": statistics.median(p99),
            "found": found,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

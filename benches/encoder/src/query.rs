//! Measures the time to embed one short search text, with tokenizing and threads.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use refarch::backend::minilm::{MiniLm, Model};
use refarch::pipeline::embedder::Embedder as _;
use serde_json::{Value, json};

use crate::corpus::Corpus;
use crate::engine::Label;
use crate::refarch_engine;

/// Number of timed searches. The same number of searches runs before them, untimed.
const QUERIES: usize = 1_000;

/// Words in a search.
const WORDS: usize = 6;

/// Measures each kernel. The searches are the first words of the texts.
pub fn measure(model: &Path, corpus: &Corpus, wanted: &dyn Fn(&Label) -> bool) -> Result<Vec<Value>> {
    let queries: Vec<Arc<str>> = corpus
        .texts
        .iter()
        .cycle()
        .take(QUERIES)
        .map(|text| text.split(' ').take(WORDS).collect::<Vec<_>>().join(" ").into())
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut rows = Vec::new();
    for (kind, options) in refarch_engine::kernels().filter(|(kind, _)| wanted(&refarch_engine::label(*kind)))
    {
        let loaded = Arc::new(Model::load(model, options)?);
        let minilm = MiniLm::start(Arc::clone(&loaded), 1);
        let mut worker = loaded.execution_context();
        let (mut pair, mut alone) = (Vec::new(), Vec::new());
        for round in 0..2 {
            for query in &queries {
                let started = Instant::now();
                runtime.block_on(minilm.embed_query(query))?;
                pair.push(started.elapsed().as_secs_f64() * 1e3);
            }
            for query in &queries {
                let started = Instant::now();
                worker.embed(&[&loaded.tokenize(query)?]);
                alone.push(started.elapsed().as_secs_f64() * 1e3);
            }
            if round == 0 {
                pair.clear();
                alone.clear();
            }
        }
        pair.sort_by(f64::total_cmp);
        alone.sort_by(f64::total_cmp);
        let (p50, p99) = (pair[QUERIES / 2], pair[QUERIES * 99 / 100]);
        let one_thread = alone[QUERIES / 2];
        println!(
            "one query with {:<14} p50 {p50:.2} ms, p99 {p99:.2} ms; on one thread p50 {one_thread:.2} ms",
            kind.name()
        );
        rows.push(
            json!({ "engine": "refarch", "precision": refarch_engine::precision(kind), "kernel": kind.name(),
            "p50_ms": p50, "p99_ms": p99, "p50_one_thread_ms": one_thread }),
        );
    }
    Ok(rows)
}

//! Other engines on the same vectors and queries, each in a Python process of its own (see `peers.py`).

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::corpus::{Corpus, Scored};
use crate::measure::DEPTH;

/// The engines.
const ENGINES: [&str; 3] = ["faiss-ivf", "faiss-hnsw", "usearch"];

/// Measures all engines. The files with the vectors stay in `folder`.
pub fn measure(
    python: &Path,
    folder: &Path,
    corpus: &Corpus,
    queries: &[Vec<f32>],
    exact: &[Vec<Scored>],
    runs: u16,
) -> Result<Vec<Value>> {
    let (vectors, asked) = (folder.join("bench-vectors.f32"), folder.join("bench-queries.f32"));
    write(&vectors, corpus.vectors())?;
    write(&asked, &queries.concat())?;
    let mut rows = Vec::new();
    for engine in ENGINES {
        eprintln!("engine {engine}");
        let output = Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("peers.py"))
            .arg(engine)
            .args([&vectors, &asked])
            .args([corpus.dimensions.to_string(), DEPTH.to_string(), runs.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}: use scripts/bench search --peers", python.display()))?;
        ensure!(output.status.success(), "peers.py {engine} failed: {}", output.status);
        for line in String::from_utf8(output.stdout)?.lines() {
            let measured: Value =
                serde_json::from_str(line).with_context(|| format!("{engine}: {line:?}"))?;
            rows.push(row(measured, corpus, queries, exact)?);
        }
    }
    Ok(rows)
}

/// The measured figures, with recall in the place of the rows that were found.
fn row(mut measured: Value, corpus: &Corpus, queries: &[Vec<f32>], exact: &[Vec<Scored>]) -> Result<Value> {
    let found: Vec<Vec<i64>> = serde_json::from_value(measured["found"].take())?;
    ensure!(found.len() == queries.len(), "{} of {} queries were answered", found.len(), queries.len());
    let recalls = found.iter().zip(queries).zip(exact).map(|((places, query), exact)| {
        // An engine fills up a short answer with -1.
        let ids = places.iter().filter_map(|&place| corpus.ids().get(usize::try_from(place).ok()?).copied());
        corpus.recall(query, exact, &ids.collect::<Vec<_>>())
    });
    let recalls: Vec<f64> = recalls.collect();
    let fields = measured.as_object_mut().context("no object")?;
    fields.remove("found");
    fields.insert("rows".into(), json!(corpus.len()));
    fields.insert("recall_at_10".into(), json!(recalls.iter().sum::<f64>() / recalls.len() as f64));
    fields.insert("recall_at_10_least".into(), json!(recalls.iter().copied().fold(f64::INFINITY, f64::min)));
    Ok(measured)
}

fn write(path: &PathBuf, numbers: &[f32]) -> Result<()> {
    let mut file =
        BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    for number in numbers {
        file.write_all(&number.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_that_an_engine_returns_are_compared_by_score() {
        let mut corpus = Corpus::new(2);
        for (id, vector) in [(70, [1.0, 0.0]), (80, [1.0, 0.0]), (90, [0.0, 1.0])] {
            corpus.put(id, &vector);
        }
        let queries = [vec![1.0, 0.1], vec![0.1, 1.0]];
        let exact = corpus.nearest(&queries, 1);
        let measured = json!({ "engine": "x", "found": [[1], [-1]] });
        let row = row(measured, &corpus, &queries, &exact).unwrap();
        assert_eq!(row, json!({ "engine": "x", "rows": 3, "recall_at_10": 0.5, "recall_at_10_least": 0.0 }));
    }
}

//! Compares the encoder with other engines: the same texts, in the same run, with the same number of threads.
//!
//! Every engine is loaded before the measurement. Each round runs all engines, so that other load on the
//! machine slows all of them alike. The figures are medians over the rounds. Each engine except ours takes
//! padded batches, of the size with which it is fastest. Vectors are compared with those of candle in f32.
//! Run this bench with
//! `scripts/bench encoder`.

#![forbid(unsafe_code)]

mod candle_engine;
mod compare;
mod corpus;
mod engine;
mod fixture;
mod machine;
mod padded;
mod process;
mod python_engine;
mod query;
mod refarch_engine;
mod rten_engine;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::{Value, json};

use corpus::{Corpus, ModelFolder};
use engine::{Engine, Label};

/// Maximum number of tokens in a text for all-MiniLM-L6-v2.
const FIXTURE_TOKENS: usize = 256;

/// Compares the speed and the vectors of the encoder with other engines
#[derive(Parser)]
struct Arguments {
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Number of rounds; the figures are medians over the rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Number of short texts, which are descriptions of generated products
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(11..))]
    texts: u32,
    /// Take the short texts from the column "description" of this CSV file instead
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Number of threads of each engine [default: one for each core]
    #[arg(long)]
    threads: Option<usize>,
    /// Only engines whose name and precision, such as "refarch bf16", contain one of these
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Model folder [default: the model of scripts/setup]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Write texts and candle's vectors to this file, for the tests of the encoder, and measure nothing
    #[arg(long, value_name = "FILE")]
    fixture: Option<PathBuf>,
    /// Measure one kernel in this process; this program starts itself with this flag
    #[arg(long, hide = true)]
    process: Option<String>,
    /// Ignored; cargo passes this flag
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = PathBuf::from(std::env::var("REFARCH_RUNTIME_DIR").unwrap_or_else(|_| ".refarch".into()));
    let model = arguments.model.clone().unwrap_or_else(|| runtime.join("runtime/model"));
    if let Some(kernel) = &arguments.process {
        return process::be_one(&model, kernel);
    }
    let threads = arguments.threads.unwrap_or_else(machine::cores);
    let scratch = tempfile::tempdir()?;
    let folder = ModelFolder::reading_all_positions(&model, scratch.path())?;
    if let Some(file) = &arguments.fixture {
        return fixture::write(&folder, file, FIXTURE_TOKENS);
    }
    let corpora = match &arguments.csv {
        Some(file) => corpus::from_csv(&folder, file, arguments.texts as usize)?,
        None => corpus::generated(&folder, arguments.texts as usize)?,
    };
    println!("{}, {} cores; {threads} threads, {} runs", machine::cpu(), machine::cores(), arguments.runs);
    for corpus in &corpora {
        println!("{:<9} {} texts, {:.1} tokens on average", corpus.name, corpus.len(), corpus.mean_tokens());
    }

    let wanted = |label: &Label| {
        let name = format!("{} {}", label.engine, label.precision);
        arguments.only.is_empty() || arguments.only.iter().any(|only| name.contains(only.as_str()))
    };
    let python = runtime.join("runtime/peers/bin/python");
    let mut engines = engines(&folder, &python, scratch.path(), threads)?;
    // Keep the reference, because all vectors are compared with its vectors.
    let mut number = 0;
    engines.retain(|engine| {
        number += 1;
        number == 1 || wanted(&engine.label())
    });

    let mut rows = Vec::new();
    for corpus in &corpora {
        rows.extend(measure(corpus, &mut engines, arguments.runs as usize)?);
    }
    drop(engines);
    println!();
    let queries = query::measure(&model, &corpora[0], &wanted)?;
    println!();
    let processes = process::measure(&model, arguments.runs as usize, &wanted)?;
    if let Some(file) = arguments.json {
        let report = json!({
            "machine": { "cpu": machine::cpu(), "cores": machine::cores(), "threads": threads },
            "benches": { "encoder": rows, "encoder_query": queries, "encoder_process": processes },
        });
        std::fs::write(&file, report.to_string() + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

/// All engines for this machine. The first is candle, the reference for the vectors.
fn engines(
    folder: &ModelFolder,
    python: &Path,
    scratch: &Path,
    threads: usize,
) -> Result<Vec<Box<dyn Engine>>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(candle_engine::load(folder, threads)?)];
    for ours in refarch_engine::all(folder, threads)? {
        engines.push(Box::new(ours));
    }
    python_engine::export(python, folder, scratch)?;
    for (graph, precision) in [("encoder.onnx", "f32"), ("encoder-int8.onnx", "int8")] {
        engines.push(Box::new(rten_engine::load(folder, &scratch.join(graph), precision, threads)?));
    }
    for (name, precision) in
        [("onnxruntime", "f32"), ("onnxruntime", "int8"), ("openvino", "f32"), ("openvino", "bf16")]
    {
        let peer = python_engine::PythonEngine::start(python, folder, scratch, name, precision, threads)?;
        if peer.label().precision == precision {
            engines.push(Box::new(peer));
        } else {
            println!(
                "{name} {precision}: left out, because on this CPU it computes in {}",
                peer.label().precision
            );
        }
    }
    Ok(engines)
}

/// Measures all engines on one corpus, in rounds.
fn measure(corpus: &Corpus, engines: &mut [Box<dyn Engine>], runs: usize) -> Result<Vec<Value>> {
    println!(
        "\n{:<12} {:<5} {:<14} {:>5} {:>9} {:>15} {:>10} {:>10} {:>10} {:>16}   runs",
        corpus.name,
        "",
        "kernel",
        "batch",
        "docs/s",
        "with tokenizing",
        "cosine min",
        "mean",
        "overlap@10",
        "bits"
    );
    let mut batches = Vec::new();
    for engine in engines.iter_mut() {
        batches.push(engine.settle(corpus)?);
    }
    let (mut alone, mut tokenized) = (vec![Vec::new(); engines.len()], vec![Vec::new(); engines.len()]);
    for _ in 0..runs {
        for (number, engine) in engines.iter_mut().enumerate() {
            alone[number].push(corpus.len() as f64 / engine.run()?);
            tokenized[number].push(corpus.len() as f64 / engine.run_from_texts()?);
        }
    }
    let mut rows = Vec::new();
    let mut reference = None;
    for (number, engine) in engines.iter_mut().enumerate() {
        let vectors = engine.vectors()?;
        let reference = reference.get_or_insert_with(|| vectors.clone());
        let fit = compare::compare(reference, &vectors, corpus.len());
        let bits = compare::digest(&vectors);
        let Label { engine, version, precision, kernel } = engine.label();
        let (speed, from_texts) = (median(&alone[number]), median(&tokenized[number]));
        let each: Vec<f64> = alone[number].iter().map(|speed| speed.round()).collect();
        let batch = batches[number].map_or_else(|| "-".into(), |batch| batch.to_string());
        println!(
            "{engine:<12} {precision:<5} {kernel:<14} {batch:>5} {speed:>9.1} {from_texts:>15.1} {:>10.6} {:>10.6} {:>10.4} {bits}   {each:?}",
            fit.cosine_min, fit.cosine_mean, fit.overlap_at_10
        );
        rows.push(json!({
            "engine": engine, "version": version, "precision": precision, "kernel": kernel, "corpus": corpus.name,
            "texts": corpus.len(), "tokens_mean": corpus.mean_tokens(), "batch": batches[number],
            "docs_per_s": speed, "docs_per_s_with_tokenizing": from_texts,
            "cosine_min": fit.cosine_min, "cosine_mean": fit.cosine_mean, "overlap_at_10": fit.overlap_at_10, "bits": bits,
        }));
    }
    Ok(rows)
}

/// The middle number, or the mean of the two middle numbers.
fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

//! Measures a process with two workers: load time and peak memory.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use refarch::backend::minilm::{MiniLm, Model};
use refarch::pipeline::embedder::Embedder as _;
use refarch::role::generate::fake_products::{FakeProducts, ProductText};
use serde_json::{Value, json};

use crate::engine::Label;
use crate::{median, refarch_engine};

/// Number of workers in the process.
const WORKERS: usize = 2;

/// Number of texts that each worker embeds.
const TEXTS: u64 = 500;

/// Measures each kernel in separate processes.
pub fn measure(model: &Path, runs: usize, wanted: &dyn Fn(&Label) -> bool) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (kind, _) in refarch_engine::kernels().filter(|(kind, _)| wanted(&refarch_engine::label(*kind))) {
        let (mut load_ms, mut peak_mib) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            let output = Command::new(std::env::current_exe()?)
                .args(["--process", kind.name(), "--model"])
                .arg(model)
                .output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let figures: Value = serde_json::from_slice(&output.stdout)?;
            load_ms.push(figures["load_ms"].as_f64().context("no load_ms")?);
            peak_mib.push(figures["peak_mib"].as_f64().context("no peak_mib")?);
        }
        let (load, peak) = (median(&load_ms), median(&peak_mib));
        println!(
            "a process with {WORKERS} workers with {:<14} loads in {load:.0} ms, peak memory {peak:.0} MiB",
            kind.name()
        );
        rows.push(
            json!({ "engine": "refarch", "precision": refarch_engine::precision(kind), "kernel": kind.name(),
            "workers": WORKERS, "load_ms": load, "peak_mib": peak }),
        );
    }
    Ok(rows)
}

/// The measured process: loads the model, embeds, and prints its figures as JSON.
pub fn be_one(model: &Path, kernel: &str) -> Result<()> {
    let (_, options) = refarch_engine::kernels()
        .find(|(kind, _)| kind.name() == kernel)
        .context("no such kernel on this CPU")?;
    let started = Instant::now();
    let loaded = Arc::new(Model::load(model, options)?);
    let load_ms = started.elapsed().as_secs_f64() * 1e3;
    let minilm = MiniLm::start(loaded, WORKERS);
    let fake_products = FakeProducts::new(1);
    let mut text = ProductText::default();
    let mut texts = |first: u64| -> Vec<Arc<str>> {
        (first..first + TEXTS)
            .map(|number| {
                fake_products.product(number, &mut text);
                text.description.as_str().into()
            })
            .collect()
    };
    let (one, other) = (texts(0), texts(TEXTS));
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(async {
        let (one, other) = tokio::join!(minilm.embed_texts(&one), minilm.embed_texts(&other));
        one.and(other)
    })?;
    let peak_mib = peak_mib()?;
    println!("{}", json!({ "load_ms": load_ms, "peak_mib": peak_mib }));
    Ok(())
}

/// The peak memory of this process in MiB. On Linux, `getrusage` would include the parent's peak.
fn peak_mib() -> Result<f64> {
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        return Ok(kib / 1024.0);
    }
    // macOS counts in bytes.
    Ok(getrusage(UsageWho::RUSAGE_SELF)?.max_rss() as f64 / (1024.0 * 1024.0))
}

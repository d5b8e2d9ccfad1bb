//! Engines in Python, each in its own process. A process waits while other engines are measured (see
//! `peers.py`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::corpus::{Corpus, ModelFolder};
use crate::engine::{Engine, Label};
use crate::padded::{fastest, sample, tokenize};

/// Path of the Python script.
fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers.py")
}

/// Writes the ONNX graph into `scratch`, as f32 and as int8.
pub fn export(python: &Path, folder: &ModelFolder, scratch: &Path) -> Result<()> {
    let status = Command::new(python)
        .arg(script())
        .args([Path::new("export"), &folder.path, scratch])
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}: use scripts/bench encoder", python.display()))?;
    ensure!(status.success(), "peers.py could not write the ONNX graph: {status}");
    Ok(())
}

pub struct PythonEngine {
    label: Label,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    scratch: PathBuf,
    tokenizer: Tokenizer,
    threads: usize,
    texts: Arc<[Arc<str>]>,
    /// Duration of the last run.
    seconds: f64,
}

impl PythonEngine {
    pub fn start(
        python: &Path,
        folder: &ModelFolder,
        scratch: &Path,
        engine: &'static str,
        precision: &str,
        threads: usize,
    ) -> Result<Self> {
        let scratch = scratch.join(format!("{engine}-{precision}"));
        std::fs::create_dir(&scratch)?;
        let mut child = Command::new(python)
            .arg(script())
            .arg(format!("{engine}-{precision}"))
            .args([&folder.path, &scratch])
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", python.display()))?;
        let input = child.stdin.take().context("the peer has no input")?;
        let output = BufReader::new(child.stdout.take().context("the peer has no output")?);
        let label = Label { engine, version: String::new(), precision: precision.into(), kernel: "-" };
        let (tokenizer, texts) = (folder.tokenizer.clone(), Arc::from([]));
        let mut peer = Self { label, child, input, output, scratch, tokenizer, threads, texts, seconds: 0.0 };
        let hello = peer.answer()?;
        peer.label.version = text(&hello, "version")?;
        peer.label.precision = text(&hello, "precision")?;
        Ok(peer)
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line)
            .with_context(|| format!("{} {} answered {line:?}", self.label.engine, self.label.precision))
    }

    fn ask(&mut self, question: &str) -> Result<Value> {
        writeln!(self.input, "{question}")?;
        self.answer()
    }

    fn give(&mut self, ids: &[Vec<u32>]) -> Result<()> {
        let file = self.scratch.join("corpus.json");
        std::fs::write(&file, serde_json::to_vec(ids)?)?;
        self.ask(&format!("corpus {}", file.display())).map(drop)
    }
}

fn text(answer: &Value, name: &str) -> Result<String> {
    Ok(answer[name].as_str().with_context(|| format!("{answer} has no {name}"))?.to_owned())
}

impl Engine for PythonEngine {
    fn label(&self) -> Label {
        self.label.clone()
    }

    fn settle(&mut self, corpus: &Corpus) -> Result<Option<usize>> {
        self.give(&sample(corpus))?;
        let size = fastest(|size| {
            self.ask(&format!("batch {size}"))?;
            self.run()
        })?;
        self.texts = Arc::clone(&corpus.texts);
        self.give(&corpus.ids)?;
        self.ask(&format!("batch {size}"))?;
        Ok(Some(size))
    }

    fn run(&mut self) -> Result<f64> {
        let answer = self.ask("run")?;
        self.seconds = answer["seconds"].as_f64().with_context(|| format!("{answer} has no seconds"))?;
        Ok(self.seconds)
    }

    fn run_from_texts(&mut self) -> Result<f64> {
        Ok(tokenize(&self.tokenizer, &self.texts, self.threads)? + self.seconds)
    }

    fn vectors(&mut self) -> Result<Vec<f32>> {
        let file = self.scratch.join("vectors");
        self.ask(&format!("vectors {}", file.display()))?;
        let bytes = std::fs::read(&file)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

impl Drop for PythonEngine {
    fn drop(&mut self) {
        // The process has no state to save.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The encoder of refarch, with each kernel that this CPU supports.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::Result;
use refarch::backend::minilm::{Model, ModelOptions};
use refarch::encoder::{ExecutionContext, KernelKind};

use crate::corpus::{Corpus, ModelFolder};
use crate::engine::{Engine, Label};
use crate::padded::share;

/// Approximate number of tokens that a thread takes at a time.
const PART_TOKENS: usize = 1_280;

pub struct RefarchEngine {
    kind: KernelKind,
    model: Arc<Model>,
    workers: Vec<ExecutionContext>,
    texts: Arc<[Arc<str>]>,
    ids: Arc<[Vec<u32>]>,
    /// First text of each part, and the text after its last one.
    parts: Vec<(usize, usize)>,
    vectors: Vec<f32>,
}

/// The supported kernels, each with the options that choose it.
pub fn kernels() -> impl Iterator<Item = (KernelKind, ModelOptions)> {
    KernelKind::ALL
        .into_iter()
        .filter(|kind| kind.is_supported())
        .map(|kind| (kind, ModelOptions { precision: kind.precision(), instructions: kind.instructions() }))
}

/// The precision's name in the figures.
pub fn precision(kind: KernelKind) -> &'static str {
    match kind.precision() {
        refarch::encoder::Precision::Bf16 => "bf16",
        refarch::encoder::Precision::Int8 => "int8",
        _ => "f32",
    }
}

pub fn label(kind: KernelKind) -> Label {
    let version = env!("CARGO_PKG_VERSION").into();
    Label { engine: "refarch", version, precision: precision(kind).into(), kernel: kind.name() }
}

pub fn all(folder: &ModelFolder, threads: usize) -> Result<Vec<RefarchEngine>> {
    kernels()
        .map(|(kind, options)| {
            let model = Arc::new(Model::load(&folder.path, options)?);
            assert_eq!(model.kind(), kind, "the kernel that was asked for");
            let workers = (0..threads).map(|_| model.execution_context()).collect();
            let (texts, ids) = (Arc::from([]), Arc::from([]));
            Ok(RefarchEngine { kind, model, workers, texts, ids, parts: Vec::new(), vectors: Vec::new() })
        })
        .collect()
}

impl RefarchEngine {
    /// Embeds all parts with `embed`, on all workers. Returns the duration in seconds.
    fn go(
        &mut self,
        embed: impl Fn(&mut ExecutionContext, usize, usize) -> Result<Vec<f32>> + Sync,
    ) -> Result<f64> {
        let started = Instant::now();
        let parts = &self.parts;
        let done: Vec<Mutex<Vec<f32>>> = parts.iter().map(|_| Mutex::default()).collect();
        share(&mut self.workers, parts.len(), |worker, part| {
            let (first, end) = parts[part];
            *done[part].lock().unwrap() = embed(worker, first, end)?;
            Ok(())
        })?;
        let seconds = started.elapsed().as_secs_f64();
        self.vectors = done.into_iter().flat_map(|part| part.into_inner().unwrap()).collect();
        Ok(seconds)
    }
}

impl Engine for RefarchEngine {
    fn label(&self) -> Label {
        label(self.kind)
    }

    fn settle(&mut self, corpus: &Corpus) -> Result<Option<usize>> {
        (self.texts, self.ids) = (Arc::clone(&corpus.texts), Arc::clone(&corpus.ids));
        self.parts.clear();
        let (mut first, mut tokens) = (0, 0);
        for (text, ids) in self.ids.iter().enumerate() {
            if tokens > 0 && tokens + ids.len() > PART_TOKENS {
                self.parts.push((first, text));
                (first, tokens) = (text, 0);
            }
            tokens += ids.len();
        }
        self.parts.push((first, self.ids.len()));
        self.run()?;
        Ok(None)
    }

    fn run(&mut self) -> Result<f64> {
        let ids = Arc::clone(&self.ids);
        self.go(|worker, first, end| {
            let sequences: Vec<&[u32]> = ids[first..end].iter().map(Vec::as_slice).collect();
            Ok(worker.embed(&sequences))
        })
    }

    fn run_from_texts(&mut self) -> Result<f64> {
        let texts = Arc::clone(&self.texts);
        let model = Arc::clone(&self.model);
        self.go(|worker, first, end| {
            let tokens = texts[first..end].iter().map(|text| model.tokenize(text));
            let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
            let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
            Ok(worker.embed(&sequences))
        })
    }

    fn vectors(&mut self) -> Result<Vec<f32>> {
        Ok(self.vectors.clone())
    }
}

//! The interface of a measured engine.

use anyhow::Result;

use crate::corpus::Corpus;

/// Name and variant of an engine.
#[derive(Clone)]
pub struct Label {
    pub engine: &'static str,
    pub version: String,
    pub precision: String,
    /// Kernel of our encoder; `-` for other engines.
    pub kernel: &'static str,
}

/// A loaded model that embeds one corpus after the other.
pub trait Engine {
    fn label(&self) -> Label;

    /// Takes the next corpus, tries batch sizes, and keeps the fastest. Returns that size; none for an engine
    /// without batches.
    fn settle(&mut self, corpus: &Corpus) -> Result<Option<usize>>;

    /// Embeds the corpus from its tokens. Returns the duration in seconds.
    fn run(&mut self) -> Result<f64>;

    /// The duration from texts to vectors, in seconds. An engine that tokenizes all texts before it embeds
    /// the first may add the duration of the last `run` instead of embedding again.
    fn run_from_texts(&mut self) -> Result<f64>;

    /// The vectors of the last run, in the order of the texts, one after the other, each of length 1.
    fn vectors(&mut self) -> Result<Vec<f32>>;
}

//! What is measured.

use anyhow::Result;

use crate::corpus::Corpus;

/// What an engine is.
#[derive(Clone)]
pub struct Label {
    pub engine: &'static str,
    pub version: String,
    pub precision: String,
    /// Of ours, the instructions in use.
    pub kernel: &'static str,
}

/// A loaded model that embeds one corpus after the other.
pub trait Engine {
    fn label(&self) -> Label;

    /// Takes the next corpus, tries batch sizes and keeps the fastest, which it returns; none if it has no
    /// batches.
    fn settle(&mut self, corpus: &Corpus) -> Result<Option<usize>>;

    /// Embeds the corpus from its tokens; returns the seconds that it took.
    fn run(&mut self) -> Result<f64>;

    /// The seconds from texts to vectors. (Who tokenizes all before embedding any need not embed again.)
    fn run_from_texts(&mut self) -> Result<f64>;

    /// The last run's vectors in the order of the texts, end to end, each of length 1.
    fn vectors(&mut self) -> Result<Vec<f32>>;
}

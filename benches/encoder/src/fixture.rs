//! Writes texts with candle's vectors, for the tests of the encoder.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::candle_engine;
use crate::corpus::{Corpus, ModelFolder};
use crate::engine::Engine as _;

/// Short, unusual and long texts.
const TEXTS: [&str; 10] = [
    "",
    "lamp",
    "a kettle that boils water for tea",
    "LED-Leuchte, dimmbar, 12 W, für Küche und Flur: 49,90 €",
    "智能手表 ⌚ with GPS & heart-rate monitor!!!",
    "1234567890 1/2\" x 3/4\" (M6×20) ISO-4762",
    "The stove burns gas or wood pellets, folds flat, and weighs less than a bottle of water when it is packed.",
    "noise cancelling headphones for a noisy open-plan office, with a microphone that can be folded away",
    "A chair with lumbar support, adjustable armrests and a headrest, made of recycled nylon and aluminium, for \
     people who sit all day and would rather not feel it in the evening; delivered in one piece, without tools, \
     and taken back after ten years to be made into another chair. Colours: moss, sand, slate and brick.",
    "once more ",
];

/// The last text is repeated this often, so that it is longer than the model's maximum.
const REPEATED: usize = 200;

pub fn write(folder: &ModelFolder, file: &Path, limit: usize) -> Result<()> {
    let mut texts: Vec<Arc<str>> = TEXTS.map(Arc::from).to_vec();
    if let Some(last) = texts.last_mut() {
        *last = last.repeat(REPEATED).into();
    }
    let mut corpus = Corpus::new(folder, "fixture", texts)?;
    corpus.cut(limit);
    let mut candle = candle_engine::load(folder, 1)?;
    candle.settle(&corpus)?;
    candle.run()?;
    let vectors = candle.vectors()?;
    let round = |number: &f32| (f64::from(*number) * 1e8).round() / 1e8;
    let rows: Vec<_> = corpus
        .ids
        .iter()
        .zip(vectors.chunks_exact(folder.width))
        .map(|(ids, vector)| json!({ "ids": ids, "vector": vector.iter().map(round).collect::<Vec<_>>() }))
        .collect();
    let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
    let text = format!("{{\"texts\":[\n{}\n]}}\n", lines.join(",\n"));
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

//! Texts, and their tokens by the model's tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use refarch::role::generate::fake_products::{FakeProducts, ProductText};
use serde_json::{Value, json};
use tokenizers::{Tokenizer, TruncationParams};

/// Kinds of long texts: name, minimum number of tokens, and number of short texts for each long text.
const LONG: [(&str, usize, usize); 2] = [("long-100", 100, 20), ("long-512", 512, 100)];

/// Minimum number of long texts, so that a comparison of neighbours makes sense.
const LEAST_LONG: usize = 20;

/// A copy of a model folder with another maximum text length: as many tokens as the model has positions. The
/// model's own settings may allow less.
pub struct ModelFolder {
    pub path: PathBuf,
    pub tokenizer: Tokenizer,
    pub positions: usize,
    /// Length of a vector.
    pub width: usize,
}

impl ModelFolder {
    pub fn reading_all_positions(model: &Path, scratch: &Path) -> Result<Self> {
        let model = std::path::absolute(model)?;
        let path = scratch.join("model");
        std::fs::create_dir(&path)?;
        for name in ["config.json", "tokenizer.json", "model.safetensors", "1_Pooling"] {
            if model.join(name).exists() {
                std::os::unix::fs::symlink(model.join(name), path.join(name))?;
            }
        }
        let read = std::fs::read_to_string(path.join("config.json"));
        let config: Value = serde_json::from_str(&read.with_context(|| {
            format!("there is no model in {}: run scripts/setup, or use --model DIR", model.display())
        })?)?;
        let size = |name: &str| {
            config[name]
                .as_u64()
                .map(|size| size as usize)
                .with_context(|| format!("config.json has no {name}"))
        };
        let (positions, width) = (size("max_position_embeddings")?, size("hidden_size")?);
        let sentence = json!({ "max_seq_length": positions });
        std::fs::write(path.join("sentence_bert_config.json"), sentence.to_string())?;
        let fail = |error| anyhow!("tokenizer.json: {error}");
        let mut tokenizer = Tokenizer::from_file(path.join("tokenizer.json")).map_err(fail)?;
        tokenizer.with_padding(None);
        let truncation = TruncationParams { max_length: positions, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(fail)?;
        Ok(Self { path, tokenizer, positions, width })
    }
}

/// Texts of similar length.
pub struct Corpus {
    pub name: &'static str,
    pub texts: Arc<[Arc<str>]>,
    pub ids: Arc<[Vec<u32>]>,
}

impl Corpus {
    pub fn new(folder: &ModelFolder, name: &'static str, texts: Vec<Arc<str>>) -> Result<Self> {
        let encode = |text: &Arc<str>| tokens(&folder.tokenizer, text);
        let ids = texts.iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { name, texts: texts.into(), ids })
    }

    /// Cuts each text after `limit` tokens.
    pub fn cut(&mut self, limit: usize) {
        self.ids = self.ids.iter().map(|ids| ids[..ids.len().min(limit)].to_vec()).collect();
    }

    pub fn len(&self) -> usize {
        self.texts.len()
    }

    pub fn mean_tokens(&self) -> f64 {
        self.ids.iter().map(Vec::len).sum::<usize>() as f64 / self.len() as f64
    }
}

/// The tokens of a text, cut to the model's maximum.
pub fn tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, true).map_err(|error| anyhow!("cannot tokenize: {error}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// Descriptions of generated products as short texts, and several of them joined as long texts.
pub fn generated(folder: &ModelFolder, count: usize) -> Result<Vec<Corpus>> {
    let fake_products = FakeProducts::new(1);
    let mut text = ProductText::default();
    let short = (0..count as u64)
        .map(|number| {
            fake_products.product(number, &mut text);
            text.description.as_str().into()
        })
        .collect();
    all(folder, short)
}

/// As [`generated`], but with descriptions from a CSV file.
pub fn from_csv(folder: &ModelFolder, file: &Path, count: usize) -> Result<Vec<Corpus>> {
    let context = || format!("cannot read {}", file.display());
    let mut reader = csv::Reader::from_path(file).with_context(context)?;
    let headers = reader.headers().with_context(context)?.clone();
    let column = headers.iter().position(|name| name == "description");
    let column = column.with_context(|| format!("{} has no column \"description\"", file.display()))?;
    let mut short: Vec<Arc<str>> = Vec::new();
    for record in reader.records().take(count) {
        short.push(record.with_context(context)?.get(column).unwrap_or_default().into());
    }
    ensure!(short.len() > 10, "{} has {} rows, but more than 10 are needed", file.display(), short.len());
    all(folder, short)
}

fn all(folder: &ModelFolder, short: Vec<Arc<str>>) -> Result<Vec<Corpus>> {
    let short = Corpus::new(folder, "short", short)?;
    let mut corpora = Vec::new();
    for (name, least, share) in LONG {
        // Each long text starts with another short text, so that no two long texts are equal.
        let count = (short.len() / share).max(LEAST_LONG).min(short.len());
        let mut texts = Vec::new();
        for first in 0..count {
            let (mut text, mut tokens) = (String::new(), 0);
            let mut next = first;
            while tokens < least.min(folder.positions) {
                text.push_str(&short.texts[next]);
                text.push(' ');
                // Without the two special tokens at the start and the end of a text.
                tokens += short.ids[next].len() - 2;
                next = (next + count) % short.len();
            }
            texts.push(text.into());
        }
        corpora.push(Corpus::new(folder, name, texts)?);
    }
    corpora.insert(0, short);
    Ok(corpora)
}

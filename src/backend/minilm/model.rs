//! A model in memory: its files, its tokens, its vectors.

use std::path::Path;

use tokenizers::Tokenizer;

use super::identity::{self, Stamp, unreadable};
use crate::encoder::{self, Encoder, ExecutionContext, InstructionSet, KernelKind, Precision};
use crate::pipeline::embedder::Embedding;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// Only this many bytes of a text are tokenized. The model reads 256 tokens, and an English token has about
/// four bytes.
const MAX_TEXT_BYTES: usize = 64 * 1024;

/// Description of a model folder, without the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name and precision, such as `all-MiniLM-L6-v2/f32`. Everything that decides the vectors is part of the
    /// name.
    pub model: String,
    /// The name in earlier releases, if it was different.
    pub former_model: Option<String>,
    /// Length of a vector.
    pub dimensions: usize,
}

impl Description {
    /// Reads a model folder in the Hugging Face layout. Hashes the weights, but does not load them.
    pub fn read(dir: &Path, precision: Precision) -> Result<Self> {
        let described = encoder::Description::read(dir).map_err(explain)?;
        let weights = encoder::file(dir, "model.safetensors").map_err(explain)?;
        let tokenizer = encoder::file(dir, "tokenizer.json").map_err(explain)?;
        let name = identity::name(&weights, &tokenizer, &described)?;
        let with_class = |name: String| format!("{name}/{}", precision.class());
        let former = identity::former_name(&weights)?;
        Ok(Self {
            model: with_class(name),
            former_model: former.map(with_class),
            dimensions: described.bert.hidden_size,
        })
    }
}

/// Options of the computation.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModelOptions {
    /// Precision of the arithmetic.
    pub precision: Precision,
    /// The newest instructions that may be used.
    pub instructions: InstructionSet,
}

/// A loaded model.
pub struct Model {
    pub(super) description: Description,
    pub(super) encoder: Encoder,
    tokenizer: Tokenizer,
}

impl Model {
    /// Loads a model folder in the Hugging Face layout: `config.json`, `tokenizer.json`, `model.safetensors`
    /// and, if they exist, `1_Pooling/config.json` and `sentence_bert_config.json`.
    pub fn load(dir: &Path, options: ModelOptions) -> Result<Self> {
        let stamps = || -> Result<Vec<Stamp>> {
            let stamp = |name| {
                let file = encoder::file(dir, name).map_err(explain)?;
                Stamp::of(&file).map_err(|error| unreadable(&file, error))
            };
            ["config.json", "tokenizer.json", "model.safetensors"].into_iter().map(stamp).collect()
        };
        let before = stamps()?;
        let description = Description::read(dir, options.precision)?;
        let kind = KernelKind::select(options.precision, options.instructions).map_err(explain)?;
        let unfit = |error: tokenizers::Error| {
            Error::new(
                FailureKind::WrongSetting,
                format!("load the model in {}", dir.display()),
                format!("tokenizer.json: {error}"),
            )
            .because(error)
        };
        let file = encoder::file(dir, "tokenizer.json").map_err(explain)?;
        let mut tokenizer = Tokenizer::from_file(file).map_err(unfit)?;
        let encoder = Encoder::load(dir, kind).map_err(explain)?;
        // The file asks for padding to 128 tokens, which would make every text as slow as a long one.
        tokenizer.with_padding(None);
        let max_length = encoder.description().max_tokens;
        let truncation = tokenizers::TruncationParams { max_length, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(unfit)?;
        let vocabulary = encoder.description().bert.vocab_size;
        let last = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
        if last as usize >= vocabulary {
            return Err(unfit(format!("it has token {last}, but the model only {vocabulary} tokens").into()));
        }
        // The name must belong to the loaded files.
        if stamps()? != before {
            let message = format!("the files in {} changed during the load", dir.display());
            return Err(Error::new(FailureKind::Conflict, "load the model", message));
        }
        tracing::info!(model = description.model, kernel = %kind, "model loaded");
        Ok(Self { description, encoder, tokenizer })
    }

    /// Memory for a thread that embeds with this model.
    #[must_use]
    pub fn execution_context(&self) -> ExecutionContext {
        self.encoder.execution_context()
    }

    /// The kernel in use.
    #[must_use]
    pub fn kind(&self) -> KernelKind {
        self.encoder.kind()
    }

    /// The tokens that the model reads of a text.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        let text = words(prefix(text, MAX_TEXT_BYTES), 2 * self.encoder.description().max_tokens);
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| Error::caused(FailureKind::RefusedData, "tokenize a text", error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Embeds tokens on the calling thread, one vector a sequence, in their order.
    #[must_use]
    pub fn embed(&self, worker: &mut ExecutionContext, sequences: &[&[u32]]) -> Vec<Embedding> {
        let vectors = worker.embed(sequences);
        vectors.chunks_exact(self.description.dimensions).map(Embedding::from).collect()
    }
}

/// Converts an error of the encoder. Adds the remedy for a missing file.
fn explain(error: encoder::Error) -> Error {
    match error {
        encoder::Error::Missing { .. } => Error::new(
            FailureKind::MissingResource,
            "find the model",
            format!(
                "{error}: run refarch setup, or set embedder.model to a folder with config.json, \
                 tokenizer.json and model.safetensors"
            ),
        ),
        encoder::Error::Cpu(_) => {
            Error::new(FailureKind::WrongSetting, "choose how to embed", &error).because(error)
        }
        _ => Error::new(FailureKind::WrongSetting, "load the model", &error).because(error),
    }
}

/// The longest prefix of at most `bytes` bytes that ends between characters.
fn prefix(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// The beginning of a text, up to `count` words. A word counts only if it contains an ASCII letter or digit,
/// so that it gives at least one token, even if a normalizer removes characters. The model's tokenizer works
/// on one word at a time, so it needs no more words than the model reads tokens. Callers pass twice that
/// number, for other tokenizers.
fn words(text: &str, count: usize) -> &str {
    let mut left = count;
    let mut in_word = false;
    for (at, c) in text.char_indices() {
        if c.is_whitespace() {
            if in_word && left == 0 {
                return &text[..at];
            }
            in_word = false;
        } else if !in_word && c.is_ascii_alphanumeric() {
            in_word = true;
            left = left.saturating_sub(1);
        }
    }
    text
}

#[cfg(test)]
pub(super) fn model_dir() -> std::path::PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".refarch/runtime/model");
    assert!(dir.is_dir(), "run scripts/setup first, or scripts/test");
    dir
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_long_text_that_the_model_cannot_read_are_not_looked_at() {
        assert_eq!(words("one  two\u{301} three", 2), "one  two\u{301}");
        assert_eq!(words("one", 1), "one");
        let model = Model::load(&model_dir(), ModelOptions::default()).unwrap();
        let whole = |text: &str| model.tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec();
        for pattern in [
            "the quick brown fox, ",
            "x-1 (y) ",
            "\u{301}\u{200b} e\u{301}te \u{fffd} ",
            "\u{e01}\u{e31}\u{e19} ",
            "\u{4e2d}\u{6587}",
            "antidisestablishmentarianism/",
            "\u{1f600} ok\n",
        ] {
            let text = pattern.repeat(30_000 / pattern.len());
            assert_eq!(model.tokenize(&text).unwrap(), whole(&text), "{pattern:?}");
        }
        let english = "the quick brown fox jumps over a lazy dog. ".repeat(50_000);
        assert!(words(&english, 512).len() < 3_000);
        assert_eq!(model.tokenize(&english).unwrap(), whole(prefix(&english, MAX_TEXT_BYTES)));
    }

    #[test]
    fn a_missing_model_says_which_file_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = Description::read(dir.path(), Precision::Auto).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("refarch setup"), "{error}");
        let copy = |name: &str| std::fs::copy(model_dir().join(name), dir.path().join(name)).unwrap();
        copy("config.json");
        let error = Description::read(dir.path(), Precision::Auto).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        std::fs::write(dir.path().join("model.safetensors"), "no weights").unwrap();
        let error = Description::read(dir.path(), Precision::Auto).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        copy("tokenizer.json");
        let described = Description::read(dir.path(), Precision::Auto).unwrap();
        assert!(!described.model.starts_with("all-MiniLM-L6-v2/"), "{described:?}");
        let error = Model::load(dir.path(), ModelOptions::default()).err().unwrap().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

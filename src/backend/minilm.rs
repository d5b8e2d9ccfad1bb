//! all-MiniLM-L6-v2, and any BERT of its shape, on this machine's CPU by [`crate::encoder`].
//!
//! The weights are loaded once and shared; each embedding thread computes alone, since two threads
//! on one batch of short texts wait for each other more than they work. Only what somebody searches for
//! has two threads, since somebody waits for it.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use crate::encoder::{self, Encoder, Instructions, KernelKind, Precision, Worker};
use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::{Error, Result};

/// A text's tokens past this many bytes are not looked for: the model reads 256 tokens, and tokens of
/// English are some four bytes long.
const MAX_TEXT_BYTES: usize = 64 * 1024;

/// Weights that are known by name, by their [`fingerprint`].
const KNOWN: &[(&str, &str)] = &[("528c6c412808", "all-MiniLM-L6-v2")];

/// Samples of the weights that their fingerprint covers, evenly spread.
const SAMPLES: u64 = 64;

/// Length of such a sample.
const SAMPLE_BYTES: u64 = 4096;

/// What a model folder holds, without its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name and precision, such as `all-MiniLM-L6-v2/f32`: the weights decide the name.
    pub model: String,
    /// Length of a vector.
    pub dimensions: usize,
}

impl Description {
    /// Reads a model folder in the Hugging Face layout.
    pub fn read(dir: &Path, precision: Precision) -> Result<Self> {
        let described = encoder::Description::read(dir).map_err(explain)?;
        let weights = encoder::file(dir, "model.safetensors").map_err(explain)?;
        Ok(Self {
            model: format!("{}/{}", weights_name(&weights)?, precision.class()),
            dimensions: described.bert.hidden_size,
        })
    }
}

/// How the model is to be computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// How exactly.
    pub precision: Precision,
    /// By which instructions, at most.
    pub instructions: Instructions,
}

/// A loaded model.
pub struct Model {
    description: Description,
    encoder: Encoder,
    tokenizer: Tokenizer,
}

impl Model {
    /// Loads a model folder in the Hugging Face layout: `config.json`, `tokenizer.json`,
    /// `model.safetensors`, and where there are `1_Pooling/config.json` and
    /// `sentence_bert_config.json`.
    pub fn load(dir: &Path, options: Options) -> Result<Self> {
        let description = Description::read(dir, options.precision)?;
        let kind = KernelKind::choose(options.precision, options.instructions).map_err(explain)?;
        let unfit = |error: tokenizers::Error| {
            Error::fatal(format!("load the model in {}", dir.display()), format!("tokenizer.json: {error}"))
        };
        let file = encoder::file(dir, "tokenizer.json").map_err(explain)?;
        let mut tokenizer = Tokenizer::from_file(file).map_err(unfit)?;
        let encoder = Encoder::load(dir, kind).map_err(explain)?;
        // The file's own padding to 128 tokens would make every text as slow as the longest.
        tokenizer.with_padding(None);
        let max_length = encoder.description().max_tokens;
        let truncation = tokenizers::TruncationParams { max_length, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(unfit)?;
        let vocabulary = encoder.description().bert.vocab_size;
        if tokenizer.get_vocab_size(true) > vocabulary {
            return Err(unfit(
                format!("it has {} tokens, and the model only {vocabulary}", tokenizer.get_vocab_size(true))
                    .into(),
            ));
        }
        tracing::info!(model = description.model, kernel = %kind, "model loaded");
        Ok(Self { description, encoder, tokenizer })
    }

    /// Memory for a thread that embeds by this model.
    #[must_use]
    pub fn worker(&self) -> Worker {
        self.encoder.worker()
    }

    /// The kernel in use.
    #[must_use]
    pub fn kind(&self) -> KernelKind {
        self.encoder.kind()
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let text = words(prefix(text, MAX_TEXT_BYTES), 2 * self.encoder.description().max_tokens);
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| Error::permanent("tokenize a text", error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Embeds texts on the calling thread, in their order.
    pub fn embed(&self, worker: &mut Worker, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        let tokens = texts.iter().map(|text| self.tokens(text)).collect::<Result<Vec<_>>>()?;
        let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let vectors = worker.embed(&sequences);
        Ok(vectors.chunks_exact(self.description.dimensions).map(Embedding::from).collect())
    }
}

/// A loading error, with what to do about it.
fn explain(error: encoder::Error) -> Error {
    match error {
        encoder::Error::Missing { .. } => Error::fatal(
            "find the model",
            format!(
                "{error}: run scripts/setup, or name a model folder with config.json, tokenizer.json and \
                 model.safetensors in embedder.model"
            ),
        ),
        encoder::Error::Cpu(_) => Error::fatal("choose how to embed", error),
        _ => Error::fatal("load the model", error),
    }
}

struct Request {
    texts: Vec<Arc<str>>,
    answer: oneshot::Sender<Result<Vec<Embedding>>>,
}

/// Embedding threads over a shared model. Dropping it ends the threads.
pub struct MiniLm {
    model: Arc<Model>,
    requests: mpsc::Sender<Request>,
    /// Two threads for one query at a time, once somebody has searched.
    queries: OnceLock<mpsc::Sender<Request>>,
}

impl MiniLm {
    /// Starts `threads` threads, each of which embeds one request at a time.
    #[must_use]
    pub fn start(model: Arc<Model>, threads: usize) -> Self {
        let (requests, receiver) = mpsc::channel::<Request>(threads.max(1));
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads.max(1) {
            spawn(&format!("embed-{number}"), &model, model.worker(), &receiver);
        }
        Self { model, requests, queries: OnceLock::new() }
    }

    fn queries(&self) -> &mpsc::Sender<Request> {
        self.queries.get_or_init(|| {
            let (queries, receiver) = mpsc::channel(1);
            spawn("embed-query", &self.model, self.model.encoder.pair(), &Arc::new(Mutex::new(receiver)));
            queries
        })
    }
}

fn spawn(name: &str, model: &Arc<Model>, worker: Worker, receiver: &Arc<Mutex<mpsc::Receiver<Request>>>) {
    let (model, receiver) = (Arc::clone(model), Arc::clone(receiver));
    let work = move || serve(&model, worker, &receiver);
    if let Err(error) = std::thread::Builder::new().name(name.to_owned()).spawn(work) {
        tracing::error!(%error, name, "cannot start an embedding thread");
    }
}

fn serve(model: &Model, mut worker: Worker, receiver: &Mutex<mpsc::Receiver<Request>>) {
    loop {
        let request = receiver.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Request { texts, answer }) = request else { return };
        if !answer.is_closed() {
            // Whoever asked may have gone meanwhile.
            let _ = answer.send(model.embed(&mut worker, &texts));
        }
    }
}

async fn ask(threads: &mpsc::Sender<Request>, texts: Vec<Arc<str>>) -> Result<Vec<Embedding>> {
    let gone = || Error::of_process("embed texts", "the embedding threads have ended");
    let (answer, answered) = oneshot::channel();
    threads.send(Request { texts, answer }).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}

#[async_trait]
impl Embedder for MiniLm {
    fn dimensions(&self) -> usize {
        self.model.description.dimensions
    }

    fn model(&self) -> &str {
        &self.model.description.model
    }

    fn count_tokens(&self, text: &str) -> usize {
        self.model.tokens(text).map_or(self.model.encoder.description().max_tokens, |tokens| tokens.len())
    }

    async fn embed_query(&self, text: &Arc<str>) -> Result<Embedding> {
        let mut vectors = ask(self.queries(), vec![Arc::clone(text)]).await?;
        vectors.pop().ok_or_else(|| Error::fatal("embed a query", "no vector came"))
    }

    async fn embed(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        ask(&self.requests, texts.to_vec()).await
    }
}

/// The longest prefix of at most `bytes` bytes that ends between characters.
fn prefix(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// A text's first words, with all that stands between them. Each word that is counted has an ASCII letter
/// or digit and so gives a token at least, whatever a normalizer takes away: as many words as the model reads
/// tokens are enough for its tokenizer, which looks at one word at a time. Twice as many, for others.
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

/// The weights' name: the known one, or the folder's with a part of the fingerprint, so that another
/// model never passes for this one.
fn weights_name(path: &Path) -> Result<String> {
    let fingerprint =
        fingerprint(path).map_err(|error| Error::fatal(format!("read {}", path.display()), error))?;
    if let Some((_, name)) = KNOWN.iter().find(|(known, _)| *known == fingerprint) {
        return Ok((*name).into());
    }
    let folder =
        path.parent().and_then(Path::file_name).map_or("model".into(), |name| name.to_string_lossy());
    Ok(format!("{folder}@{fingerprint}"))
}

/// SHA-256, shortened, of the file's length and of samples all over it. Reading all of it would cost
/// every start of every role what this costs a thousandth of; weights that were trained further
/// differ everywhere.
fn fingerprint(path: &Path) -> std::io::Result<String> {
    let mut weights = fs::File::open(path)?;
    let length = weights.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(length.to_le_bytes());
    for sample in 0..SAMPLES {
        weights.seek(SeekFrom::Start(length / SAMPLES * sample))?;
        let mut bytes = Vec::with_capacity(SAMPLE_BYTES as usize);
        (&weights).take(SAMPLE_BYTES).read_to_end(&mut bytes)?;
        digest.update(&bytes);
    }
    let mut start = [0; 8];
    start[2..].copy_from_slice(&digest.finalize()[..6]);
    Ok(format!("{:012x}", u64::from_be_bytes(start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model_dir() -> std::path::PathBuf {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".refarch/runtime/model");
        assert!(dir.is_dir(), "run scripts/setup first, or scripts/test");
        dir
    }

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[tokio::test]
    async fn the_real_model_tells_meanings_apart_and_a_batch_changes_nothing() {
        let model = Arc::new(Model::load(&model_dir(), Options::default()).unwrap());
        let minilm = MiniLm::start(model, 2);
        assert_eq!((minilm.model(), minilm.dimensions()), ("all-MiniLM-L6-v2/f32", 384));
        let long = "a sentence about gardens and rain, ".repeat(200);
        let texts: Vec<Arc<str>> = [
            "An electric kettle that switches itself off",
            "A device for boiling water with electricity",
            "A history of the Roman senate",
            &long,
            "x",
            "An electric kettle that switches itself off",
        ]
        .map(Arc::from)
        .to_vec();
        let together = minilm.embed(&texts).await.unwrap();
        for (text, vector) in texts.iter().zip(&together) {
            assert!((cosine(vector, vector) - 1.0).abs() < 1e-5);
            assert!(*vector == minilm.embed(std::slice::from_ref(text)).await.unwrap()[0], "{text}");
            assert!(*vector == minilm.embed_query(text).await.unwrap(), "{text}");
        }
        assert!(cosine(&together[0], &together[1]) > 0.6);
        assert!(cosine(&together[0], &together[2]) < 0.2);
        assert_eq!(minilm.count_tokens(&long), 256);
        assert!(minilm.embed(&[]).await.unwrap().is_empty());
    }

    #[test]
    fn the_words_of_a_long_text_that_the_model_cannot_read_are_not_looked_at() {
        assert_eq!(words("one  two\u{301} three", 2), "one  two\u{301}");
        assert_eq!(words("one", 1), "one");
        let model = Model::load(&model_dir(), Options::default()).unwrap();
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
            assert_eq!(model.tokens(&text).unwrap(), whole(&text), "{pattern:?}");
        }
        let english = "the quick brown fox jumps over a lazy dog. ".repeat(50_000);
        assert!(words(&english, 512).len() < 3_000);
        assert_eq!(model.tokens(&english).unwrap(), whole(prefix(&english, MAX_TEXT_BYTES)));
    }

    #[test]
    fn a_missing_model_says_which_file_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = Description::read(dir.path(), Precision::Auto).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("scripts/setup"), "{error}");
        fs::copy(model_dir().join("config.json"), dir.path().join("config.json")).unwrap();
        let error = Description::read(dir.path(), Precision::Auto).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        fs::write(dir.path().join("model.safetensors"), "no weights").unwrap();
        let described = Description::read(dir.path(), Precision::Auto).unwrap();
        assert!(!described.model.starts_with("all-MiniLM-L6-v2/"), "{described:?}");
        let error = Model::load(dir.path(), Options::default()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

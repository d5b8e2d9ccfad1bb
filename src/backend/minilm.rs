//! all-MiniLM-L6-v2, and any BERT of its shape, on this machine's CPU by candle.
//!
//! The weights are loaded once and shared; each embedding thread computes alone, since two threads
//! on one batch of short texts wait for each other more than they work.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::{Error, Result};

/// Texts that go through the model together. Padding makes larger batches of mixed lengths slower.
const BATCH: usize = 8;

/// A text's tokens past this many bytes are not looked for: the model reads 256 tokens, and tokens of
/// English are some four bytes long.
const MAX_TEXT_BYTES: usize = 64 * 1024;

/// Tokens read of a text when the model folder does not say.
const DEFAULT_MAX_TOKENS: usize = 256;

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

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pooling {
    Mean,
    Cls,
}

#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
}

#[derive(Deserialize)]
struct SentenceConfig {
    max_seq_length: usize,
}

impl Description {
    /// Reads a model folder in the Hugging Face layout.
    pub fn read(dir: &Path) -> Result<Self> {
        let config: Config = read_json(dir, "config.json")?;
        let weights = file(dir, "model.safetensors")?;
        Ok(Self { model: format!("{}/f32", weights_name(&weights)?), dimensions: config.hidden_size })
    }
}

/// A loaded model.
pub struct Model {
    description: Description,
    bert: BertModel,
    tokenizer: Tokenizer,
    pooling: Pooling,
    max_tokens: usize,
}

impl Model {
    /// Loads a model folder in the Hugging Face layout: `config.json`, `tokenizer.json`,
    /// `model.safetensors`, and where there are `1_Pooling/config.json` and
    /// `sentence_bert_config.json`.
    pub fn load(dir: &Path) -> Result<Self> {
        let fail = |what: &str, error: &dyn std::fmt::Display| {
            Error::fatal(format!("load the model in {}", dir.display()), format!("{what}: {error}"))
        };
        let description = Description::read(dir)?;
        let config: Config = read_json(dir, "config.json")?;
        let pooling = match read_optional::<PoolingConfig>(dir, "1_Pooling/config.json")? {
            Some(PoolingConfig { pooling_mode_mean_tokens: true, .. }) | None => Pooling::Mean,
            Some(PoolingConfig { pooling_mode_cls_token: true, .. }) => Pooling::Cls,
            Some(_) => return Err(fail("1_Pooling/config.json", &"only mean and CLS pooling are known")),
        };
        let max_tokens = read_optional::<SentenceConfig>(dir, "sentence_bert_config.json")?
            .map_or(DEFAULT_MAX_TOKENS, |config| config.max_seq_length)
            .min(config.max_position_embeddings);
        let mut tokenizer = Tokenizer::from_file(file(dir, "tokenizer.json")?)
            .map_err(|error| fail("tokenizer.json", &error))?;
        // The file's own padding to 128 tokens would make every text as slow as the longest.
        tokenizer.with_padding(None);
        let truncation = tokenizers::TruncationParams { max_length: max_tokens, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|error| fail("tokenizer.json", &error))?;
        let weights =
            fs::read(file(dir, "model.safetensors")?).map_err(|error| fail("model.safetensors", &error))?;
        let variables = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)
            .map_err(|error| fail("model.safetensors", &error))?;
        let bert = BertModel::load(variables, &config).map_err(|error| fail("model.safetensors", &error))?;
        Ok(Self { description, bert, tokenizer, pooling, max_tokens })
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        let text = prefix(text, MAX_TEXT_BYTES);
        let encoding = self
            .tokenizer
            .encode_fast(text, true)
            .map_err(|error| Error::permanent("tokenize a text", error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Embeds texts on the calling thread, in their order.
    fn embed(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        let tokens = texts.iter().map(|text| self.tokens(text)).collect::<Result<Vec<_>>>()?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|at| tokens[*at].len());
        let mut embeddings: Vec<Option<Embedding>> = vec![None; texts.len()];
        for batch in order.chunks(BATCH) {
            let inputs: Vec<&[u32]> = batch.iter().map(|at| tokens[*at].as_slice()).collect();
            let vectors = self.forward(&inputs).map_err(|error| Error::permanent("embed texts", error))?;
            for (at, vector) in batch.iter().zip(vectors) {
                embeddings[*at] = Some(vector.into());
            }
        }
        Ok(embeddings.into_iter().flatten().collect())
    }

    /// One batch through the model, padded to its longest.
    fn forward(&self, inputs: &[&[u32]]) -> candle_core::Result<Vec<Vec<f32>>> {
        let longest = inputs.iter().map(|tokens| tokens.len()).max().unwrap_or(0);
        let shape = (inputs.len(), longest);
        let padded = |tokens: &&[u32]| {
            tokens.iter().copied().chain(std::iter::repeat_n(0, longest - tokens.len())).collect::<Vec<_>>()
        };
        let ids: Vec<u32> = inputs.iter().flat_map(padded).collect();
        let mask: Vec<f32> = inputs
            .iter()
            .flat_map(|tokens| (0..longest).map(|at| if at < tokens.len() { 1.0 } else { 0.0 }))
            .collect();
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        let mask = Tensor::from_vec(mask, shape, &Device::Cpu)?;
        let states = self.bert.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let pooled = match self.pooling {
            Pooling::Cls => states.narrow(1, 0, 1)?.squeeze(1)?,
            Pooling::Mean => {
                let weights = mask.unsqueeze(2)?;
                states.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&weights.sum(1)?)?
            }
        };
        let norms = pooled.sqr()?.sum_keepdim(1)?.sqrt()?;
        pooled.broadcast_div(&norms)?.to_vec2()
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
}

impl MiniLm {
    /// Starts `threads` threads, each of which embeds one request at a time.
    #[must_use]
    pub fn start(model: Arc<Model>, threads: usize) -> Self {
        let (requests, receiver) = mpsc::channel::<Request>(threads.max(1));
        let receiver = Arc::new(Mutex::new(receiver));
        for number in 0..threads.max(1) {
            let (model, receiver) = (Arc::clone(&model), Arc::clone(&receiver));
            let name = format!("embed-{number}");
            let spawned = std::thread::Builder::new().name(name).spawn(move || serve(&model, &receiver));
            if let Err(error) = spawned {
                tracing::error!(%error, number, "cannot start an embedding thread");
            }
        }
        Self { model, requests }
    }
}

fn serve(model: &Model, receiver: &Mutex<mpsc::Receiver<Request>>) {
    // candle spreads its work over the current rayon pool: one of its own, of one thread, keeps the
    // work here.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let pool = match pool {
        Ok(pool) => pool,
        Err(error) => return tracing::error!(%error, "cannot start an embedding thread"),
    };
    loop {
        let request = receiver.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(Request { texts, answer }) = request else { return };
        if !answer.is_closed() {
            // Whoever asked may have gone meanwhile.
            let _ = answer.send(pool.install(|| model.embed(&texts)));
        }
    }
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
        self.model.tokens(text).map_or(self.model.max_tokens, |tokens| tokens.len())
    }

    async fn embed(&self, texts: &[Arc<str>]) -> Result<Vec<Embedding>> {
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let gone = || Error::fatal("embed texts", "the embedding threads have ended");
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request { texts: texts.to_vec(), answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

/// The longest prefix of at most `bytes` bytes that ends between characters.
fn prefix(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
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

/// A file of a model folder, checked to be there.
fn file(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::fatal(
        "find the model",
        format!(
            "there is no {}: run scripts/setup, or name a model folder with config.json, tokenizer.json and \
             model.safetensors in embedder.model",
            path.display()
        ),
    ))
}

fn read_json<T: for<'de> Deserialize<'de>>(dir: &Path, name: &str) -> Result<T> {
    let path = file(dir, name)?;
    let fail = |error: &dyn std::fmt::Display| Error::fatal(format!("read {}", path.display()), error);
    let text = fs::read_to_string(&path).map_err(|error| fail(&error))?;
    serde_json::from_str(&text).map_err(|error| fail(&error))
}

fn read_optional<T: for<'de> Deserialize<'de>>(dir: &Path, name: &str) -> Result<Option<T>> {
    if dir.join(name).is_file() { read_json(dir, name).map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model_dir() -> PathBuf {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".refarch/runtime/model");
        assert!(dir.is_dir(), "run scripts/setup first, or scripts/test");
        dir
    }

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[tokio::test]
    async fn the_real_model_tells_meanings_apart_and_a_batch_changes_nothing() {
        let model = Arc::new(Model::load(&model_dir()).unwrap());
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
            let alone = minilm.embed(std::slice::from_ref(text)).await.unwrap();
            assert!(cosine(&alone[0], vector) > 0.99999, "{text}");
        }
        assert!(cosine(&together[0], &together[1]) > 0.6);
        assert!(cosine(&together[0], &together[2]) < 0.2);
        assert_eq!(minilm.count_tokens(&long), 256);
        assert!(minilm.embed(&[]).await.unwrap().is_empty());
    }

    #[test]
    fn a_missing_model_says_which_file_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = Description::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("scripts/setup"), "{error}");
        fs::copy(model_dir().join("config.json"), dir.path().join("config.json")).unwrap();
        let error = Description::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
        fs::write(dir.path().join("model.safetensors"), "no weights").unwrap();
        let described = Description::read(dir.path()).unwrap();
        assert!(!described.model.starts_with("all-MiniLM-L6-v2/"), "{described:?}");
        let error = Model::load(dir.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

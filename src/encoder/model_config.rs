//! The settings in a model folder.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::Error;

/// Maximum number of tokens in a text if the model folder has no such setting.
const DEFAULT_MAX_TOKENS: usize = 256;

/// A text has at least this many tokens, because two tokens mark its start and end.
const MIN_TOKENS: usize = 3;

/// Maximum sizes. They are several times the sizes of any known BERT model, and small enough that no sum or
/// product of sizes overflows.
const MAX_HIDDEN: usize = 1 << 14;
const MAX_LAYERS: usize = 256;
const MAX_HEADS: usize = 256;
const MAX_INNER: usize = 1 << 17;
const MAX_POSITIONS: usize = 1 << 16;
const MAX_VOCABULARY: usize = 1 << 22;

/// Maximum size of a JSON file in bytes.
const MAX_JSON: u64 = 16 << 20;

/// How the vectors of a text's tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The vector of the first token.
    Cls,
}

/// The shape of a BERT model: `config.json` in the Hugging Face layout.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    /// Length of the vectors of tokens and texts.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of attention heads in each layer. It divides the hidden size.
    pub num_attention_heads: usize,
    /// Width of the inner dense layer.
    pub intermediate_size: usize,
    /// Number of positions with an embedding.
    pub max_position_embeddings: usize,
    /// Number of tokens with an embedding.
    pub vocab_size: usize,
    /// Added to a variance before its square root is computed.
    pub layer_norm_eps: f32,
    #[serde(default)]
    hidden_act: Option<String>,
    #[serde(default)]
    position_embedding_type: Option<String>,
    #[serde(default)]
    model_type: Option<String>,
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
    #[serde(default)]
    max_seq_length: Option<usize>,
}

/// All settings in a model folder.
#[derive(Clone, Debug)]
pub struct Description {
    /// Shape of the model.
    pub bert: BertConfig,
    /// How the vectors of a text's tokens become one vector.
    pub pooling: Pooling,
    /// Maximum number of tokens in a text. Longer texts are cut.
    pub max_tokens: usize,
}

impl Description {
    /// Reads `config.json` of a folder and, if they exist, `1_Pooling/config.json` and
    /// `sentence_bert_config.json`.
    pub fn read(dir: &Path) -> Result<Self, Error> {
        let bert: BertConfig = read_json(dir, "config.json")?;
        bert.check().map_err(|why| Error::Unsupported { file: dir.join("config.json"), why })?;
        let pooling = match read_optional::<PoolingConfig>(dir, "1_Pooling/config.json")? {
            None | Some(PoolingConfig { pooling_mode_mean_tokens: true, .. }) => Pooling::Mean,
            Some(PoolingConfig { pooling_mode_cls_token: true, .. }) => Pooling::Cls,
            Some(_) => {
                let why = "only mean and CLS pooling are supported".into();
                return Err(Error::Unsupported { file: dir.join("1_Pooling/config.json"), why });
            }
        };
        let max_tokens = read_optional::<SentenceConfig>(dir, "sentence_bert_config.json")?
            .and_then(|config| config.max_seq_length)
            .unwrap_or(DEFAULT_MAX_TOKENS)
            .min(bert.max_position_embeddings);
        if max_tokens < MIN_TOKENS {
            let why =
                format!("max_seq_length is {max_tokens}, but a text needs at least {MIN_TOKENS} tokens");
            return Err(Error::Unsupported { file: dir.join("sentence_bert_config.json"), why });
        }
        Ok(Self { bert, pooling, max_tokens })
    }
}

impl BertConfig {
    fn check(&self) -> Result<(), String> {
        let is = |value: &Option<String>, wanted: &str| value.as_deref().is_none_or(|value| value == wanted);
        let named = |value: &Option<String>| value.clone().unwrap_or_default();
        if !is(&self.model_type, "bert") {
            return Err(format!("model_type is {:?}, but only bert is supported", named(&self.model_type)));
        }
        if !is(&self.hidden_act, "gelu") {
            return Err(format!("hidden_act is {:?}, but only gelu is supported", named(&self.hidden_act)));
        }
        if !is(&self.position_embedding_type, "absolute") {
            let named = named(&self.position_embedding_type);
            return Err(format!("position_embedding_type is {named:?}, but only absolute is supported"));
        }
        for (name, size, most) in [
            ("hidden_size", self.hidden_size, MAX_HIDDEN),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_HEADS),
            ("intermediate_size", self.intermediate_size, MAX_INNER),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
            ("vocab_size", self.vocab_size, MAX_VOCABULARY),
        ] {
            if !(1..=most).contains(&size) {
                return Err(format!("{name} is {size}, but must be 1 to {most}"));
            }
        }
        if !(self.layer_norm_eps > 0.0 && self.layer_norm_eps < 1.0) {
            return Err(format!(
                "layer_norm_eps is {}, but must be more than 0 and less than 1",
                self.layer_norm_eps
            ));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return Err(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        Ok(())
    }
}

/// The path of a file in a model folder.
///
/// # Errors
///
/// [`Error::Missing`] if the file does not exist.
pub fn file(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = dir.join(name);
    if path.is_file() { Ok(path) } else { Err(Error::Missing { file: path }) }
}

fn read_json<T: for<'de> Deserialize<'de>>(dir: &Path, name: &str) -> Result<T, Error> {
    let file = file(dir, name)?;
    let unreadable = |source| Error::Unreadable { file: file.clone(), source };
    let length = fs::metadata(&file).map_err(unreadable)?.len();
    if length > MAX_JSON {
        let why = format!("the file has {length} bytes, but at most {MAX_JSON} are allowed");
        return Err(Error::Malformed { file, why });
    }
    let text = fs::read_to_string(&file).map_err(unreadable)?;
    serde_json::from_str(&text).map_err(|error| Error::Malformed { file, why: error.to_string() })
}

fn read_optional<T: for<'de> Deserialize<'de>>(dir: &Path, name: &str) -> Result<Option<T>, Error> {
    if dir.join(name).is_file() { read_json(dir, name).map(Some) } else { Ok(None) }
}

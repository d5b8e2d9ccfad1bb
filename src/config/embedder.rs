//! `[embedder]`

use std::time::Duration;

use super::declare::Rule::{Address, AtLeast, OneOf};
use super::error::ConfigError;
use super::read::{Section as _, Setting, checked, section};
use super::values::Values;
use crate::encoder::{InstructionSet, Precision};
use crate::secret::Secret;

section! {
    /// `[embedder]`: what turns text into vectors.
    pub struct Embedder in "embedder" {
        /// What turns text into vectors: minilm (on this machine's CPU), or a server: openai (any server that
        /// speaks `OpenAI`'s `/v1/embeddings`), tei (text-embeddings-inference, `/embed`) or pinecone (its hosted
        /// models).
        kind: EmbedderKind = "minilm", OneOf(&["minilm", "openai", "tei", "pinecone"]);
        /// minilm: a model folder in the Hugging Face layout (`config.json`, `tokenizer.json`,
        /// `model.safetensors`). Empty: the model that `scripts/setup` installs. A server: the model's name there.
        /// tei serves one model, so there this is only a label.
        model: String = "";
    }
}

/// The embedders that can be chosen.
#[derive(Clone, Debug)]
pub enum EmbedderKind {
    /// A `MiniLM`-class model on this machine's CPU.
    Minilm(LocalEmbedder),
    /// A server that speaks `/v1/embeddings`, as `OpenAI` does.
    Openai(HttpEmbedder),
    /// A text-embeddings-inference server, by `/embed`.
    Tei(HttpEmbedder),
    /// Pinecone's hosted models, by `/embed`.
    Pinecone(HttpEmbedder),
}

section! {
    /// `[embedder]` of the kind `minilm`.
    pub struct LocalEmbedder in "embedder" of ["minilm"] {
        /// The precision of its arithmetic: auto, f32, bf16 or int8. auto: bf16 where it is at least as fast, else
        /// f32. Their vectors agree, so machines of all kinds may share an index. int8 is faster and gives other
        /// vectors: changing to or from it embeds all rows anew. With int8, machines that share an index should be
        /// of one kind, because kinds of CPU round differently (`verify --sample` would report that as a
        /// difference).
        precision: Precision = "auto";
        /// The most advanced instructions that it uses of an x86 CPU: auto (all), avx512, avx2 or portable.
        instructions: InstructionSet = "auto";
    }
}

section! {
    /// `[embedder]` of a kind that is a server.
    pub struct HttpEmbedder in "embedder" of ["openai", "tei", "pinecone"] {
        /// The server's address, such as `http://127.0.0.1:8080`, `https://host/api/v1` or
        /// `https://host/v1?api-version=1`. A path and a query are kept; requests go to the path followed by
        /// `/embeddings` (openai) or `/embed` (tei, pinecone). Without a path openai is called at `/v1/embeddings`.
        /// Empty with pinecone: `index.controller`.
        url: String = "", Address;
        /// The server's API key. Empty: `OPENAI_API_KEY` (openai) or `index.api_key` (pinecone).
        api_key: Secret = "";
        /// Dimensions of the vectors; openai and pinecone are asked for as many. 0: what the model gives.
        dimensions: usize = 0;
        /// Texts in one request. 0: the provider's limit (openai 2048, tei 32, pinecone 96).
        batch_texts: usize = 0;
        /// Tokens in one request, estimated at three bytes each. 0: the provider's limit (openai 300000, tei 16384,
        /// pinecone none).
        batch_tokens: usize = 0;
        /// Tokens of one text; the rest of the text is not sent. 0: the provider's limit (openai 8191, tei 512,
        /// pinecone 2048).
        text_tokens: usize = 0;
        /// Rate limit: requests that a process may send in a minute. 0: no limit.
        requests_per_minute: u32 = 0;
        /// Rate limit: tokens that a process may send in a minute. 0: no limit.
        tokens_per_minute: u64 = 0;
        /// How long a request may take.
        timeout as "timeout_ms": Duration = 30000, AtLeast(1);
    }
}

impl Setting for EmbedderKind {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        let (local, mut http) = (LocalEmbedder::read(values)?, HttpEmbedder::read(values)?);
        let kind = values.text(path);
        if kind == "minilm" {
            return Ok(Self::Minilm(local));
        }
        http.url = http.url.trim().to_owned();
        let is_pinecone = kind == "pinecone";
        if let Some(reason) = address_fault(&http.url).filter(|_| !(is_pinecone && http.url.is_empty())) {
            // The fault may be that the address contains a secret.
            let told = if http.url.is_empty() { "" } else { "[not shown]" };
            return Err(values.refused_as("embedder.url", told, reason));
        }
        if kind != "tei" && values.text("embedder.model").is_empty() {
            return Err(values.refused("embedder.model", "set the name of the server's model"));
        }
        if is_pinecone {
            if http.url.is_empty() {
                http.url = checked(values, "index.controller")?;
            }
            if http.api_key.is_empty() {
                http.api_key = Secret::new(values.text("index.api_key"));
            }
        }
        Ok(match kind {
            "openai" => Self::Openai(http),
            "tei" => Self::Tei(http),
            _ => Self::Pinecone(http),
        })
    }
}

/// What is wrong with the address of an embedding server; none if the address is right.
fn address_fault(address: &str) -> Option<&'static str> {
    let Ok(url) = reqwest::Url::parse(address) else {
        return Some("use the server's address, such as http://127.0.0.1:8080");
    };
    if !matches!(url.scheme(), "http" | "https") {
        return Some("use an address that begins with http:// or https://");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Some("leave user and password out of the address, and set embedder.api_key");
    }
    url.fragment()
        .is_some()
        .then_some("leave out the # and the rest: HTTP does not send that part to the server")
}

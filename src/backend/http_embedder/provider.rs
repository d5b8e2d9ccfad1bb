//! The providers' protocols: requests and answers.

use reqwest::RequestBuilder;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::{EmbedderKind, HttpEmbedder};

/// The version of Pinecone's API that is used.
const PINECONE_VERSION: &str = "2026-04";

/// The purpose of an embedding: some models make different vectors for passages and for queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Passage,
    Query,
}

/// The supported protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Provider {
    OpenAi,
    Tei,
    Pinecone,
}

/// The limits of one request, as the provider documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) texts: usize,
    pub(super) tokens: usize,
    /// Tokens of one text.
    pub(super) text_tokens: usize,
}

#[derive(Deserialize)]
struct OpenAiAnswer {
    data: Vec<OpenAiVector>,
}

#[derive(Deserialize)]
struct OpenAiVector {
    index: usize,
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct PineconeAnswer {
    data: Vec<PineconeVector>,
}

#[derive(Deserialize)]
struct PineconeVector {
    values: Vec<f32>,
}

/// What a text-embeddings-inference server says about itself.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Info {
    #[serde(default)]
    pub(super) model_id: String,
    pub(super) max_client_batch_size: Option<usize>,
    pub(super) max_batch_tokens: Option<usize>,
    pub(super) max_input_length: Option<usize>,
}

impl Info {
    /// The model's name. A server that does not name its model gets one fixed name.
    pub(super) fn name(&self) -> &str {
        if self.model_id.is_empty() { "unnamed" } else { &self.model_id }
    }
}

impl Provider {
    /// The protocol and the server's settings; `None` for a local model.
    pub(super) fn of(kind: &EmbedderKind) -> Option<(Self, &HttpEmbedder)> {
        match kind {
            EmbedderKind::Minilm(_) => None,
            EmbedderKind::Openai(set) => Some((Self::OpenAi, set)),
            EmbedderKind::Tei(set) => Some((Self::Tei, set)),
            EmbedderKind::Pinecone(set) => Some((Self::Pinecone, set)),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OpenAi => "openai",
            Self::Tei => "tei",
            Self::Pinecone => "pinecone",
        }
    }

    /// The prefix of the path if the server's URL has no path, and the endpoint at the end of the path.
    pub(super) fn path(self) -> (&'static str, &'static str) {
        match self {
            Self::OpenAi => ("/v1", "embeddings"),
            Self::Tei | Self::Pinecone => ("", "embed"),
        }
    }

    pub(super) fn limits(self) -> Limits {
        match self {
            Self::OpenAi => Limits { texts: 2_048, tokens: 300_000, text_tokens: 8_191 },
            Self::Tei => Limits { texts: 32, tokens: 16_384, text_tokens: 512 },
            Self::Pinecone => Limits { texts: 96, tokens: usize::MAX, text_tokens: 2_048 },
        }
    }

    /// Adds the API key and the headers that the provider needs.
    pub(super) fn sign(self, request: RequestBuilder, key: &str) -> RequestBuilder {
        match self {
            Self::Pinecone => {
                let request = request.header("X-Pinecone-Api-Version", PINECONE_VERSION);
                if key.is_empty() { request } else { request.header("Api-Key", sensitive(key)) }
            }
            Self::OpenAi | Self::Tei if key.is_empty() => request,
            Self::OpenAi | Self::Tei => request.header("Authorization", sensitive(&format!("Bearer {key}"))),
        }
    }

    /// The body of a request. `dimensions` requests vectors of that length.
    pub(super) fn body(
        self,
        model: &str,
        texts: &[&str],
        dimensions: Option<usize>,
        purpose: Purpose,
    ) -> Value {
        match self {
            Self::OpenAi => {
                let mut body = json!({ "model": model, "input": texts, "encoding_format": "float" });
                if let Some(dimensions) = dimensions {
                    body["dimensions"] = dimensions.into();
                }
                body
            }
            Self::Tei => json!({ "inputs": texts, "normalize": true, "truncate": true }),
            Self::Pinecone => {
                let input_type = if purpose == Purpose::Query { "query" } else { "passage" };
                let mut parameters = json!({ "input_type": input_type, "truncate": "END" });
                if let Some(dimensions) = dimensions {
                    parameters["dimension"] = dimensions.into();
                }
                let inputs: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
                json!({ "model": model, "inputs": inputs, "parameters": parameters })
            }
        }
    }

    /// The vectors of an answer, in the order of the texts.
    pub(super) fn read(self, body: &[u8]) -> Result<Vec<Vec<f32>>, serde_json::Error> {
        Ok(match self {
            Self::OpenAi => {
                let mut data = serde_json::from_slice::<OpenAiAnswer>(body)?.data;
                data.sort_by_key(|vector| vector.index);
                data.into_iter().map(|vector| vector.embedding).collect()
            }
            Self::Tei => serde_json::from_slice(body)?,
            Self::Pinecone => {
                let data = serde_json::from_slice::<PineconeAnswer>(body)?.data;
                data.into_iter().map(|vector| vector.values).collect()
            }
        })
    }
}

/// A header value that logs do not show. An invalid value becomes empty, and the server refuses it.
fn sensitive(value: &str) -> reqwest::header::HeaderValue {
    let mut value = reqwest::header::HeaderValue::from_str(value)
        .unwrap_or_else(|_| reqwest::header::HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

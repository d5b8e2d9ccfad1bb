//! The model of the settings: the shape of an index for its vectors, and the model itself.

use std::path::PathBuf;
use std::sync::Arc;

use super::http_embedder::{HttpEmbedder, Known, Server};
use super::minilm::{self, MiniLm, Model};
use super::postgres::Postgres;
use super::postgres::generation::{self, IndexLocation, IndexShape};
use crate::config::{EmbedderKind, Index, Settings};
use crate::pipeline::embedder::Embedder;
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The model folder in use.
#[must_use]
pub fn model_dir(settings: &Settings) -> PathBuf {
    match settings.embedder.model.as_str() {
        "" => settings.runtime.dir.join("runtime/model"),
        named => named.into(),
    }
}

/// The shape that the index must have under these settings. A local model is read but not loaded. A server is
/// asked if the settings do not name the length of its vectors.
pub async fn index_shape(settings: &Settings) -> Result<IndexShape> {
    match &settings.embedder.kind {
        EmbedderKind::Minilm(local) => {
            let (dir, precision) = (model_dir(settings), local.precision);
            // The model's name contains a hash of the whole model, so all of it is read.
            let read = tokio::task::spawn_blocking(move || minilm::Description::read(&dir, precision)).await;
            let description =
                read.map_err(|error| Error::caused(FailureKind::ProcessBroken, "read the model", error))??;
            Ok(IndexShape {
                former_model: description.former_model,
                ..shape(settings, &description.model, description.dimensions)
            })
        }
        EmbedderKind::Openai(_) | EmbedderKind::Tei(_) | EmbedderKind::Pinecone(_) => {
            let server = Server::open(&settings.embedder, None).await?;
            Ok(shape(settings, server.name(), server.dimensions()))
        }
    }
}

/// Like [`index_shape`], for a database that may have an index already. A server is asked only if there is no
/// index, or the index was made with another model than the settings name.
pub(super) async fn known_shape(postgres: &Postgres, settings: &Settings) -> Result<IndexShape> {
    match known(postgres, settings).await? {
        Some(known) => Ok(shape(settings, known.signature(), known.dimensions())),
        None => index_shape(settings).await,
    }
}

/// The shape of the index that was made for these settings. A server is never asked, so that a role that embeds
/// nothing starts while the server is down. Fails if no index was made for the model that the settings name.
pub(super) async fn recorded_shape(postgres: &Postgres, settings: &Settings) -> Result<IndexShape> {
    if matches!(settings.embedder.kind, EmbedderKind::Minilm(_)) {
        return index_shape(settings).await;
    }
    if let Some(known) = known(postgres, settings).await? {
        return Ok(shape(settings, known.signature(), known.dimensions()));
    }
    // The database knows why: no index, or an index of another model. No index is of a model without a name.
    let unnamed = shape(settings, "", 0);
    generation::find(postgres, &settings.source, &unnamed).await.map(|_| unnamed)
}

/// What the database records about the server's model; `None` for a local model.
async fn known(postgres: &Postgres, settings: &Settings) -> Result<Option<Known>> {
    if matches!(settings.embedder.kind, EmbedderKind::Minilm(_)) {
        return Ok(None);
    }
    let recorded = generation::recorded_model(postgres, &settings.source.name).await?;
    Ok(recorded.and_then(|(model, dimensions)| Known::of(&settings.embedder, &model, dimensions)))
}

fn shape(settings: &Settings, model: &str, dimensions: usize) -> IndexShape {
    let kind = match settings.index {
        Index::Pgvector(_) => "pgvector",
        Index::Pinecone(_) => "pinecone",
    };
    IndexShape {
        kind: kind.into(),
        model: model.into(),
        former_model: None,
        dimensions,
        location: IndexLocation::default(),
    }
}

/// A loaded model. Embedders with threads of their own are started from it.
pub enum LoadedModel {
    /// A `MiniLM`-class model on this machine's CPU.
    Minilm(Arc<Model>),
    /// A model on a server.
    Http(Box<Server>),
}

impl LoadedModel {
    /// Loads the local model, or connects to the server.
    pub async fn load(settings: &Settings) -> Result<Self> {
        Self::load_as(settings, None).await
    }

    /// Like [`Self::load`], for a database that may have an index already: the server is not asked for what
    /// the database records. If the server is down, only the embedding of texts waits for it.
    pub async fn load_known(postgres: &Postgres, settings: &Settings) -> Result<Self> {
        let known = known(postgres, settings).await?;
        Self::load_as(settings, known.as_ref()).await
    }

    async fn load_as(settings: &Settings, known: Option<&Known>) -> Result<Self> {
        Ok(match &settings.embedder.kind {
            EmbedderKind::Minilm(local) => {
                let dir = model_dir(settings);
                let options =
                    minilm::ModelOptions { precision: local.precision, instructions: local.instructions };
                let loaded = tokio::task::spawn_blocking(move || Model::load(&dir, options)).await;
                Self::Minilm(Arc::new(
                    loaded.map_err(|error| {
                        Error::caused(FailureKind::ProcessBroken, "load the model", error)
                    })??,
                ))
            }
            EmbedderKind::Openai(_) | EmbedderKind::Tei(_) | EmbedderKind::Pinecone(_) => {
                let server = Server::open(&settings.embedder, known).await?;
                server.greet().await?;
                Self::Http(Box::new(server))
            }
        })
    }

    /// The shape of an index for this model's vectors under these settings.
    pub(super) async fn shape(&self, settings: &Settings) -> Result<IndexShape> {
        match self {
            Self::Minilm(_) => index_shape(settings).await,
            Self::Http(server) => Ok(shape(settings, server.name(), server.dimensions())),
        }
    }

    /// Starts an embedder with `threads` threads that share the weights. For a server: at most `threads`
    /// requests at once.
    #[must_use]
    pub fn start(&self, threads: usize) -> Arc<dyn Embedder> {
        match self {
            Self::Minilm(model) => Arc::new(MiniLm::start(Arc::clone(model), threads)),
            Self::Http(server) => Arc::new(HttpEmbedder::start((**server).clone(), threads)),
        }
    }
}

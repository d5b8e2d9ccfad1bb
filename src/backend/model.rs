//! The model that the settings name: what an index of its vectors holds, and the model itself.

use std::path::PathBuf;
use std::sync::Arc;

use super::http_embedder::{self, Known};
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

/// What the index must hold under these settings. A model on this machine is read, but not loaded; a server
/// is asked, if the settings don't say how long its vectors are.
pub async fn index_shape(settings: &Settings) -> Result<IndexShape> {
    match &settings.embedder.kind {
        EmbedderKind::Minilm(local) => {
            let (dir, precision) = (model_dir(settings), local.precision);
            // The whole model is read for its name.
            let read = tokio::task::spawn_blocking(move || minilm::Description::read(&dir, precision)).await;
            let description =
                read.map_err(|error| Error::caused(FailureKind::ProcessBroken, "read the model", error))??;
            Ok(IndexShape {
                former_model: description.former_model,
                ..shape(settings, &description.model, description.dimensions)
            })
        }
        EmbedderKind::Openai(_) | EmbedderKind::Tei(_) | EmbedderKind::Pinecone(_) => {
            let server = http_embedder::Server::open(&settings.embedder, None).await?;
            Ok(shape(settings, server.name(), server.dimensions()))
        }
    }
}

/// The same where there may be an index: a server is only asked if the index was made with another model than the
/// settings name, or if there is none. So a role that embeds nothing starts while the server is away.
pub(super) async fn known_shape(postgres: &Postgres, settings: &Settings) -> Result<IndexShape> {
    match known(postgres, settings).await? {
        Some(known) => Ok(shape(settings, known.signature(), known.dimensions())),
        None => index_shape(settings).await,
    }
}

/// What the database knows of the server's model; none for a model on this machine.
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

/// A loaded model, from which embedders with threads of their own are started.
pub enum LoadedModel {
    /// A `MiniLM`-class model on this machine's CPU.
    Minilm(Arc<Model>),
    /// A model on a server.
    Http(Box<http_embedder::Server>),
}

impl LoadedModel {
    /// Loads the model of the settings, or looks at its server.
    pub async fn load(settings: &Settings) -> Result<Self> {
        Self::load_as(settings, None).await
    }

    /// The same where there may be an index: a server is not asked for what the database knows of its model. If
    /// it is away, texts cannot be embedded until it is back, and nothing else waits for it.
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
                let server = http_embedder::Server::open(&settings.embedder, known).await?;
                server.greet().await?;
                Self::Http(Box::new(server))
            }
        })
    }

    /// What an index of this model's vectors holds under these settings.
    pub(super) async fn shape(&self, settings: &Settings) -> Result<IndexShape> {
        match self {
            Self::Minilm(_) => index_shape(settings).await,
            Self::Http(server) => Ok(shape(settings, server.name(), server.dimensions())),
        }
    }

    /// Starts an embedder with `threads` threads, which share the weights, or so many requests at once.
    #[must_use]
    pub fn start(&self, threads: usize) -> Arc<dyn Embedder> {
        match self {
            Self::Minilm(model) => Arc::new(MiniLm::start(Arc::clone(model), threads)),
            Self::Http(server) => Arc::new(server.start(threads)),
        }
    }
}

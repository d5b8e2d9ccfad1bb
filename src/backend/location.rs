//! Where the index is, by the settings and by its own record.

use super::pinecone::{self, Pinecone};
use super::postgres::generation::{self, IndexLocation, IndexShape};
use super::postgres::{Postgres, ownership};
use crate::config::{Index, PineconeIndex, Settings};
use crate::pipeline::failure::Result;

/// Where the index is by the settings. `host` is the host that was found by the index's name, if there is
/// one.
pub(super) fn configured_location(settings: &Settings, host: Option<String>) -> IndexLocation {
    let Index::Pinecone(index) = &settings.index else { return IndexLocation::default() };
    let (name, host) = match index.host() {
        "" => (index.name.clone(), host.unwrap_or_default()),
        given => (String::new(), given.to_owned()),
    };
    let namespace = pinecone::location::normalize_namespace(&index.namespace).to_owned();
    IndexLocation { name, host: pinecone::location::normalize_host(&host), namespace, is_same_index: false }
}

/// Where the index is by the settings. If the recorded address differs, the ownership record decides whether
/// this is the index that was written to.
pub(super) async fn compared_location(
    postgres: &Postgres,
    settings: &Settings,
    shape: &IndexShape,
) -> Result<IndexLocation> {
    let host = match named_index(settings, shape.dimensions) {
        Some(options) if pinecone::control::exists(&options).await? => {
            Some(pinecone::control::host(&options).await?)
        }
        _ => None,
    };
    let mut location = configured_location(settings, host.clone());
    let source = &settings.source.name;
    if let Index::Pinecone(index) = &settings.index
        && let Some(recorded) = generation::recorded_location(postgres, source).await?
        && !recorded.is(&location)
        && !location.host.is_empty()
    {
        let host = host.unwrap_or_else(|| index.host().to_owned());
        let index = pinecone_at(settings, index, host, shape.dimensions)?;
        location.is_same_index = ownership::is_owned_by(postgres, source, &index).await?;
    }
    Ok(location)
}

/// The client of an index of Pinecone at `host`.
pub(super) fn pinecone_at(
    settings: &Settings,
    index: &PineconeIndex,
    host: String,
    dimensions: usize,
) -> Result<Pinecone> {
    Pinecone::new(pinecone::PineconeOptions {
        host,
        api_key: index.api_key.clone(),
        namespace: index.namespace.clone(),
        timeout: index.timeout,
        dimensions,
        text: settings.source.text.clone(),
        metadata: settings.source.metadata.clone(),
    })
}

/// The index to find or make by its name. `None` for pgvector, or if the settings give the host.
pub(super) fn named_index(
    settings: &Settings,
    dimensions: usize,
) -> Option<pinecone::control::ControlPlaneOptions> {
    let index = settings.index.pinecone().filter(|index| index.host().is_empty())?;
    Some(pinecone::control::ControlPlaneOptions {
        controller: index.controller.clone(),
        api_key: index.api_key.clone(),
        name: index.name.clone(),
        dimensions,
        cloud: index.cloud.clone(),
        region: index.region.clone(),
    })
}

//! The ownership record, stored beside the records, never among them.
//!
//! Ownership records have a namespace of their own, so no query, listing or count of records finds them. Each
//! namespace of records has one ownership record, so that several databases may share an index. Older
//! versions stored one ownership record for the whole index. It is read if a namespace has none of its own,
//! and it is not changed, since other namespaces may need it.

use async_trait::async_trait;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::wire::Sent;
use super::{Pinecone, location};
use crate::config::OWNERSHIP_NAMESPACE;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{OwnershipStore, VectorIndex as _};

/// The id of the older versions' ownership record for the whole index.
const OLD_ID: &str = "note";

/// The most bytes of a namespace's name in an id. Pinecone allows 512 characters in an id.
const MAX_NAME: usize = 400;

/// The id of a namespace's ownership record. The default namespace has the empty name.
fn id(namespace: &str) -> String {
    let name = location::normalize_namespace(namespace);
    if name.len() <= MAX_NAME && name.is_ascii() {
        return format!("{OLD_ID}/{name}");
    }
    let digest = Sha256::digest(name.as_bytes());
    digest.iter().fold(format!("{OLD_ID}#"), |text, byte| format!("{text}{byte:02x}"))
}

#[async_trait]
impl OwnershipStore for Pinecone {
    async fn record(&self) -> Result<Option<String>> {
        let id = id(&self.namespace);
        let found = self.fetch_from(OWNERSHIP_NAMESPACE, &[id.clone(), OLD_ID.to_owned()]).await?;
        let text = |id: &str| {
            let vector = found.iter().find(|vector| vector.id == id)?;
            vector.metadata.get("text").and_then(Value::as_str).map(str::to_owned)
        };
        if let Some(text) = text(&id) {
            return Ok(Some(text));
        }
        let old = text(OLD_ID);
        // The old record names one owner for many namespaces. It does not apply to a namespace without
        // records.
        if old.is_some() && self.count().await? == 0 {
            return Ok(None);
        }
        Ok(old)
    }

    async fn set_record(&self, record: &str) -> Result<()> {
        // This is the first write when a worker starts.
        self.check().await?;
        let metadata = [("text".to_owned(), record.into())].into_iter().collect();
        let sent = Sent { id: &id(&self.namespace), values: &self.first_axis(), metadata };
        self.upsert_into(OWNERSHIP_NAMESPACE, &[sent]).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_namespace_has_an_ownership_record_of_its_own() {
        let long = "x".repeat(512);
        let names = ["", "n1", "n2", "note", "ünï", &long, &long[1..]];
        let ids: std::collections::BTreeSet<String> = names.iter().map(|name| id(name)).collect();
        assert_eq!(ids.len(), names.len());
        assert!(ids.iter().all(|id| id != OLD_ID && id.is_ascii() && id.len() <= 512));
        assert_eq!(id("__default__"), id(""));
    }
}

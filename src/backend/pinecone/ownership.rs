//! The owner's note: beside the records, never among them.
//!
//! Notes stand in a namespace of their own, where no query, listing or count of records finds them: one for each
//! namespace that holds records, so that several databases may share an index. Older versions kept one note
//! for the whole index. It is read where a namespace has none, and left as it is, since others may need it.

use async_trait::async_trait;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::wire::Sent;
use super::{Pinecone, location};
use crate::config::OWNERSHIP_NAMESPACE;
use crate::pipeline::failure::Result;
use crate::pipeline::index::{OwnershipStore, VectorIndex as _};

/// Id of the note that older versions kept for the whole index.
const OLD_ID: &str = "note";

/// Bytes of a namespace's name that an id has room for: Pinecone takes 512 characters.
const MAX_NAME: usize = 400;

/// Id of a namespace's note; the default namespace's name is empty.
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
        // It names one owner of many namespaces, and says nothing of one that holds no records.
        if old.is_some() && self.count().await? == 0 {
            return Ok(None);
        }
        Ok(old)
    }

    async fn set_record(&self, record: &str) -> Result<()> {
        // The first that is ever written, when a worker starts.
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

//! What the bench changes in the table, and how it puts the old state back, also after it was interrupted.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::database::Database;

/// A file in the bench folder that says what is changed. It is written before the change.
pub struct Undo(PathBuf);

impl Undo {
    pub fn new(folder: &Path) -> Self {
        Self(folder.join("bench-undo.json"))
    }

    /// Notes the old texts of some products.
    pub fn note_texts(&self, texts: &[(i64, Option<String>)]) -> Result<()> {
        self.note(&json!({ "texts": texts }))
    }

    /// Notes the greatest id before more products are loaded.
    pub fn note_greatest_id(&self, id: i64) -> Result<()> {
        self.note(&json!({ "greatest_id": id }))
    }

    fn note(&self, note: &Value) -> Result<()> {
        std::fs::write(&self.0, note.to_string())
            .with_context(|| format!("cannot write {}", self.0.display()))
    }

    /// Puts the noted state back. Returns whether there was a note.
    pub async fn restore(&self, database: &Database) -> Result<bool> {
        let Ok(note) = std::fs::read(&self.0) else { return Ok(false) };
        let note: Value =
            serde_json::from_slice(&note).with_context(|| format!("read {}", self.0.display()))?;
        if let Some(texts) = note["texts"].as_array() {
            let text = |pair: &Value| Some((pair[0].as_i64()?, pair[1].as_str().map(str::to_owned)));
            let texts: Vec<_> = texts.iter().filter_map(text).collect();
            database.set_texts(&texts).await?;
        }
        if let Some(id) = note["greatest_id"].as_i64() {
            database.delete_above(id).await?;
        }
        std::fs::remove_file(&self.0)?;
        Ok(true)
    }
}

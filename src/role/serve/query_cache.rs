//! Vectors of the latest search terms: the pages of a ranking, and terms that many people search for, are embedded once.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::pipeline::embedder::{Embedder, Embedding};
use crate::pipeline::failure::Result;

/// Terms that are kept: some 2 MB with 384 numbers a vector.
const TERMS: NonZeroUsize = NonZeroUsize::new(1_000).unwrap();

/// The cache of one embedder's vectors.
pub(super) struct QueryCache(Mutex<LruCache<Arc<str>, Embedding>>);

impl Default for QueryCache {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(TERMS)))
    }
}

impl QueryCache {
    fn kept(&self) -> MutexGuard<'_, LruCache<Arc<str>, Embedding>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The term's vector, from the cache or from the embedder.
    pub(super) async fn embed(&self, embedder: &dyn Embedder, term: &str) -> Result<Embedding> {
        let kept = self.kept().get(term).cloned();
        if let Some(vector) = kept {
            return Ok(vector);
        }
        let term: Arc<str> = Arc::from(term);
        let vector = embedder.embed_query(&term).await?;
        self.kept().put(term, Arc::clone(&vector));
        Ok(vector)
    }
}

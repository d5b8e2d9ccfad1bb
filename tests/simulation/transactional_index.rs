//! The world's fenced index keeps the contract that pgvector keeps.

use std::sync::Arc;

use async_trait::async_trait;
use refarch::pipeline::embedder::Embedding;
use refarch::pipeline::index::VectorIndex;
use refarch::pipeline::ledger::Ledger;

use crate::ledger::{block_on, quiet};
use crate::transactional_contract::{self, Fixture};
use crate::world::{IndexKind, RowText, View};

#[async_trait(?Send)]
impl Fixture for View {
    fn index(&self) -> &dyn VectorIndex {
        self
    }

    fn ledger(&self) -> &dyn Ledger {
        self
    }

    async fn write(&self, id: u32, text: &str, metadata: &str) {
        let row = RowText { text: text.into(), metadata: metadata.into() };
        self.world.lock().unwrap().write(&id.to_string(), Some(row));
    }

    async fn delete(&self, id: u32) {
        self.world.lock().unwrap().write(&id.to_string(), None);
    }

    fn vector(&self, of: u8) -> Embedding {
        Arc::new([f32::from(of)])
    }

    fn keeps_metadata(&self) -> bool {
        true
    }
}

macro_rules! on_the_simulations_index {
    ($($clause:ident),* $(,)?) => {$(
        #[test]
        fn $clause() {
            block_on(transactional_contract::$clause(&quiet(IndexKind::Transactional)));
        }
    )*};
}

transactional_contract::for_each_clause!(on_the_simulations_index);

//! pgvector keeps the contract of an index that writes only if nothing changed.

use async_trait::async_trait;
use refarch::backend::pgvector::PgVector;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::pipeline::embedder::Embedding;
use refarch::pipeline::ledger::Ledger;
use tokio_postgres::Client;

use super::transactional_contract::{self, Fixture};
use super::*;
use crate::common::source::ITEM;

/// A table, its ledger and its vectors.
struct PostgresFixture {
    index: PgVector,
    ledger: PgLedger,
    client: Client,
    _database: Database,
}

impl PostgresFixture {
    async fn new() -> Self {
        let table = "CREATE TABLE item (id bigint PRIMARY KEY, body text NOT NULL, note text)";
        let env = [ITEM[0], ITEM[1], ("REFARCH_SOURCE_METADATA", "note")];
        let migrated = Migrated::new(table, settings(&env), "pgvector").await;
        let generation = migrated.generation().await;
        let (index, ledger) = (migrated.pgvector(&generation), migrated.ledger(&generation));
        let Migrated { client, database, .. } = migrated;
        Self { index, ledger, client, _database: database }
    }
}

#[async_trait(?Send)]
impl Fixture for PostgresFixture {
    fn index(&self) -> &dyn VectorIndex {
        &self.index
    }

    fn ledger(&self) -> &dyn Ledger {
        &self.ledger
    }

    async fn write(&self, id: u32, text: &str, metadata: &str) {
        let sql = "INSERT INTO item VALUES ($1, $2, $3) \
                   ON CONFLICT (id) DO UPDATE SET body = excluded.body, note = excluded.note";
        self.client.execute(sql, &[&i64::from(id), &text, &metadata]).await.unwrap();
    }

    async fn delete(&self, id: u32) {
        self.client.execute("DELETE FROM item WHERE id = $1", &[&i64::from(id)]).await.unwrap();
    }

    fn vector(&self, of: u8) -> Embedding {
        Arc::new([f32::from(of), 1.0, 0.0])
    }

    fn keeps_metadata(&self) -> bool {
        false
    }
}

macro_rules! on_pgvector {
    ($($clause:ident),* $(,)?) => {$(
        #[tokio::test]
        async fn $clause() {
            transactional_contract::$clause(&PostgresFixture::new().await).await;
        }
    )*};
}

transactional_contract::for_each_clause!(on_pgvector);

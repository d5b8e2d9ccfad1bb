//! pgvector keeps the contract of an index that writes only if nothing changed.

use async_trait::async_trait;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::pipeline::embedder::Embedding;
use refarch::pipeline::ledger::Ledger;
use tokio_postgres::Client;

use super::fenced_contract::{self, Bench};
use super::*;

/// A table, its ledger and its vectors.
struct Real {
    index: PgVector,
    ledger: PgLedger,
    client: Client,
    _database: Database,
}

impl Real {
    async fn new() -> Self {
        let database = Database::create().await;
        let client = database.client().await;
        let table = "CREATE TABLE item (id bigint PRIMARY KEY, body text NOT NULL, note text)";
        client.batch_execute(table).await.unwrap();
        let env = [
            ("REFARCH_SOURCE_TABLE", "public.item"),
            ("REFARCH_SOURCE_TEXT", "body"),
            ("REFARCH_SOURCE_METADATA", "note"),
        ];
        let env = env.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let settings = Settings::load(None, &env, &[]).unwrap();
        let postgres = Postgres::new(&Secret::new(database.url()), &settings.database).unwrap();
        let shape = IndexShape {
            kind: "pgvector".into(),
            model: "test".into(),
            former_model: None,
            dimensions: 3,
            place: Place::default(),
        };
        migrate::migrate(&postgres, &settings.source, &settings.queue, &shape).await.unwrap();
        let target = target::find(&postgres, &settings.source, &shape).await.unwrap();
        let options = pgvector::Options {
            graph_min_rows: 1_000,
            graph_max_backlog: 1_000,
            ef_search: 100,
            acknowledged_in_same_log: true,
        };
        let table = Arc::new(target.table);
        let (salt, id) = (target.salt, target.id);
        let index = PgVector::new(postgres.clone(), Arc::clone(&table), salt.clone(), id, options);
        let ledger = PgLedger::new(postgres, table, id, salt);
        Self { index, ledger, client, _database: database }
    }
}

#[async_trait(?Send)]
impl Bench for Real {
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
            fenced_contract::$clause(&Real::new().await).await;
        }
    )*};
}

fenced_contract::for_each_clause!(on_pgvector);

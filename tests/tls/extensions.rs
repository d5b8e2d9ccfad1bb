//! Primary keys whose types belong to extensions.

use std::sync::Arc;

use refarch::backend::postgres::Postgres;
use refarch::backend::postgres::generation;
use refarch::backend::postgres::ledger::PgLedger;
use refarch::pipeline::ledger::Ledger as _;
use refarch::secret::Secret;

use crate::common::{self, source};
use crate::servers::Server;

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_extension_types_are_read() {
    let server = Server::start(None).await;
    let client = common::connect(&server.url("")).await;
    let setup = "CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE EXTENSION ltree SCHEMA ext; CREATE EXTENSION isn SCHEMA ext; \
                 CREATE COLLATION public.folds (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    client.batch_execute(setup).await.unwrap();
    let shape = source::shape("test");
    for (name, kind, value) in [
        ("a", "ext.citext", "('Name' || g)::ext.citext"),
        ("b", "ext.ltree", "('Top.Path.n' || g)::ext.ltree"),
        ("c", "ext.isbn", "(ARRAY['0-306-40615-2', '1-4028-9462-7', '0-395-19395-8'])[g]::ext.isbn"),
        ("d", "text COLLATE public.folds", "'Name' || g"),
    ] {
        client
            .batch_execute(&format!(
                "CREATE TABLE public.{name} (id {kind} PRIMARY KEY, body text); INSERT INTO public.{name} SELECT {value}, 'text' FROM generate_series(1, 3) g"
            ))
            .await
            .unwrap();
        let table = format!("public.{name}");
        let set = source::settings(&[
            ("REFARCH_SOURCE_TABLE", &*table),
            ("REFARCH_SOURCE_TEXT", "body"),
            ("REFARCH_SOURCE_METADATA", "id"),
            ("REFARCH_SOURCE_NAME", name),
        ]);
        let postgres = Postgres::new(&Secret::new(server.url("")), &set.database).unwrap();
        source::migrate(&postgres, &set, &shape).await.unwrap();
        let target = generation::find(&postgres, &set.source, &shape).await.unwrap();
        let ledger = PgLedger::new(postgres, Arc::new(target.table), target.id, target.salt);
        let mut ids = Vec::new();
        while let Some(peeked) = ledger.rows_after(ids.last().map(String::as_str), 1).await.unwrap().pop() {
            ids.push(peeked.id);
        }
        assert_eq!(ids.len(), 3, "{kind}: {ids:?}");
        let small = ids[0].to_lowercase();
        let peeked = ledger.peek(&[&ids[..], &[small.clone(), "no id".into()]].concat()).await.unwrap();
        let there: Vec<bool> = peeked.iter().map(|one| one.row.is_some()).collect();
        assert_eq!(there, [true, true, true, small == ids[0], false], "{kind}: {ids:?}");
    }
}

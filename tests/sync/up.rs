//! `refarch up` as a process.

use std::fs::File;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use refarch::double::pinecone::Verb;

use crate::common::{self, eventually};
use crate::shop::{TABLE, TIMEOUT, on_pgvector, on_pinecone};

#[tokio::test(flavor = "multi_thread")]
async fn a_first_load_that_is_cut_off_is_made_again() {
    let shop =
        on_pgvector().await.with(&[("REFARCH_UP_PRODUCTS", "50"), ("REFARCH_SERVE_BIND", "127.0.0.1:0")]);
    shop.role(&["migrate"]).await;
    // The load waits for this lock, so that it can be found and cut off.
    let locker = shop.database.client().await;
    locker.batch_execute(&format!("BEGIN; LOCK TABLE {TABLE} IN SHARE MODE")).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| File::create(dir.path().join(name)).unwrap();
    let said = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let mut up = shop.command(&["up"]).stdout(file("out")).stderr(file("err")).spawn().unwrap();
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE datname = current_database() AND query LIKE 'COPY%' AND wait_event_type = 'Lock'";
    eventually("the load to be cut off", TIMEOUT, async || {
        assert_eq!(up.try_wait().unwrap(), None, "it ended: {}", said("err"));
        common::number(&shop.client, cut).await == 1
    })
    .await;
    eventually("the failure to be told", TIMEOUT, async || {
        assert_eq!(up.try_wait().unwrap(), None, "it ended: {}", said("err"));
        said("err").contains("cannot load the first products")
    })
    .await;
    locker.batch_execute("ROLLBACK").await.unwrap();
    eventually("it to be up", TIMEOUT, async || said("out").contains("refarch is up")).await;
    assert_eq!(common::number(&shop.client, &format!("SELECT count(*) FROM {TABLE}")).await, 50);
    kill(Pid::from_raw(up.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    assert!(up.wait().await.unwrap().success(), "{}", said("err"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_cannot_be_read_during_the_first_sync_is_read_again() {
    let shop = on_pinecone().await.with(&[
        ("REFARCH_UP_PRODUCTS", "0"),
        ("REFARCH_SERVE_BIND", "127.0.0.1:0"),
        ("REFARCH_INDEXER_WORKERS", "1"),
    ]);
    shop.role(&["migrate"]).await;
    shop.sql(&format!("INSERT INTO {TABLE} (id, description) VALUES (1, 'A kettle')")).await;
    // The first sync does not end while the index takes no record.
    let double = shop.double.as_ref().unwrap();
    double.forbid(|verb, namespace, _| verb == Verb::Upsert && namespace.is_empty());
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| File::create(dir.path().join(name)).unwrap();
    let said = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let mut up = shop.command(&["up"]).stdout(file("out")).stderr(file("err")).spawn().unwrap();
    eventually("nothing to go through", TIMEOUT, async || said("err").contains("nothing goes through")).await;
    // A table of the status is missing for a while, as during a restore.
    shop.sql("ALTER TABLE refarch.sample RENAME TO sample_away").await;
    eventually("a read to fail", TIMEOUT, async || {
        assert_eq!(up.try_wait().unwrap(), None, "it ended: {}", said("err"));
        said("err").contains("cannot read the status")
    })
    .await;
    shop.sql("ALTER TABLE refarch.sample_away RENAME TO sample").await;
    double.forbid(|_, _, _| false);
    eventually("it to be up", TIMEOUT, async || said("out").contains("refarch is up")).await;
    kill(Pid::from_raw(up.id().unwrap() as i32), Signal::SIGTERM).unwrap();
    assert!(up.wait().await.unwrap().success(), "{}", said("err"));
}

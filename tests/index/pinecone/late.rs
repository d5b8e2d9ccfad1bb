//! Writes that the index accepted before a restore and applies after it.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::ownership::{DIMENSIONS, Shop, put};
use super::*;

/// Whether a worker says that it waits for late writes.
const WAITS: &str =
    "SELECT count(*) FROM refarch.fault WHERE kind = 'held' AND message LIKE '%may still be applied%'";

/// Whether every row was written anew after the database went back.
const ANEW: &str = "SELECT count(*) FROM refarch.lineage WHERE foreign_note IS NOT NULL \
                    AND NOT EXISTS (SELECT FROM refarch.outbox) AND NOT EXISTS (SELECT FROM refarch.backfill) \
                    AND NOT EXISTS (SELECT FROM refarch.attempt) AND NOT EXISTS (SELECT FROM refarch.ledger WHERE dirty)";

/// As an older copy of the database has it.
const WENT_BACK: &str = "UPDATE refarch.lineage SET mark = mark - 1";

/// How long the roles may take for all of it.
const LONG: Duration = Duration::from_mins(3);

#[tokio::test(flavor = "multi_thread")]
async fn a_late_write_from_before_a_restore_does_not_stay() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.impatient().filled().await;
    let shop = shop.with("REFARCH_INDEXER_SETTLE_MS", "16000");
    shop.sql(WENT_BACK).await;
    let roles = [&["listen"][..], &["embed", "--workers", "1"]];
    let _roles = roles.map(|args| shop.command(args).spawn().unwrap());
    // The index applies the write at the worst moment: when the row is written and clean, unless the roles wait.
    eventually("the roles to wait, or to be done", LONG, async || {
        shop.number(WAITS).await > 0 || shop.number(ANEW).await > 0
    })
    .await;
    let mut lost = double.snapshot("")["2"].clone();
    lost.metadata.insert("name".into(), json!("lost"));
    lost.metadata.insert("_refarch_metadata_hash".into(), json!("a7".repeat(32)));
    put(&double, "", "2", &lost.values, &lost.metadata.into()).await;
    eventually("every row to be written anew", LONG, async || shop.number(ANEW).await > 0).await;
    shop.agrees().await;
    assert_eq!(double.snapshot("")["2"].metadata["name"], "n2");
    eventually("the fault to end", LONG, async || shop.number(WAITS).await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_signal_ends_the_wait_for_late_writes() {
    let double = PineconeDouble::start(DIMENSIONS, 1).await.unwrap();
    let shop = Shop::new(&double, "", "id,name").await.filled().await;
    let shop = shop.with("REFARCH_INDEXER_SETTLE_MS", "3600000");
    shop.sql(WENT_BACK).await;
    // The second waits for the first.
    let mut waiting = [0, 1].map(|_| shop.command(&["embed", "--workers", "1"]).spawn().unwrap());
    eventually("both workers to wait", LONG, async || shop.number(WAITS).await == 2).await;
    for embed in &mut waiting {
        kill(Pid::from_raw(embed.id().unwrap() as i32), Signal::SIGTERM).unwrap();
        let ended = tokio::time::timeout(LONG, embed.wait()).await.expect("it waits on");
        assert!(ended.unwrap().success());
    }
    assert_eq!((shop.distrusted().await, shop.number(ANEW).await), ((0, 0), 0));
}

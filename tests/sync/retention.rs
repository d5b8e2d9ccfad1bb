//! What is kept for a time only is deleted by periodic work, which one worker does for all.

use std::time::Duration;

use futures::future::join_all;
use refarch::backend::postgres::{chore, pruning};

use crate::common::{eventually, number};
use crate::shop::{TABLE, TIMEOUT, on_pgvector};

const OLD: &str = "SELECT (SELECT count(*) FROM refarch.sample WHERE worker_id = 'old') \
                        + (SELECT count(*) FROM refarch.event WHERE kind = 'old') \
                        + (SELECT count(*) FROM refarch.worker WHERE worker_id = 'old') \
                        + (SELECT count(*) FROM refarch.fault WHERE worker_id = 'old') \
                        + (SELECT count(*) FROM refarch.ledger WHERE id = '1')";

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_prunes_while_it_works_and_not_when_it_leaves() {
    // Without the proof and without checks of capture: retention depends on neither.
    let settings = [("REFARCH_AUDIT_PERIOD_H", "0"), ("REFARCH_AUDIT_ARMED_S", "0")];
    let shop = on_pgvector().await.with(&settings).filled().await;
    shop.sql(&format!("DELETE FROM {TABLE} WHERE id IN (1, 2)")).await;
    shop.apply().await;
    shop.sql(
        "UPDATE refarch.ledger SET synced_at = now() - interval '2 days' WHERE id IN ('1', '3'); \
         INSERT INTO refarch.sample (worker_id, at, applied, embedded) VALUES ('old', now() - interval '2 hours', 1, 1); \
         INSERT INTO refarch.worker (worker_id, role, host, pid, heartbeat_at) VALUES ('old', 'embed', 'h', 1, now() - interval '2 hours'); \
         INSERT INTO refarch.fault (worker_id, kind, message, seen_at) VALUES ('old', 'queue', 'm', now() - interval '2 hours'); \
         INSERT INTO refarch.event (kind, at) VALUES ('old', now() - interval '8 days'), ('lately', now() - interval '6 days'), \
           ('dead_letter', now() - interval '8 days')",
    )
    .await;
    let old = async || number(&shop.client, OLD).await;
    // All is done already for this time: a worker that comes and leaves deletes nothing.
    shop.sql("UPDATE refarch.chore SET begun_at = clock_timestamp()").await;
    shop.apply().await;
    assert_eq!(old().await, 5);
    let roles = shop.start_roles();
    shop.sql("UPDATE refarch.chore SET begun_at = begun_at - interval '1 hour'").await;
    eventually("what is old to be pruned", TIMEOUT, async || old().await == 0).await;
    let kept = "SELECT (SELECT count(*) FROM refarch.ledger WHERE id IN ('2', '3')) \
                     + (SELECT count(*) FROM refarch.event WHERE kind IN ('lately', 'dead_letter'))";
    assert_eq!(
        number(&shop.client, kept).await,
        4,
        "deleted lately, not deleted, and events that are kept for longer"
    );
    drop(roles);
}

#[tokio::test(flavor = "multi_thread")]
async fn periodic_work_is_claimed_by_one_worker_at_a_time() {
    let shop = on_pgvector().await;
    shop.role(&["migrate"]).await;
    let backends = shop.backends().await;
    let claims = async || {
        let claim = || chore::claim(&backends.postgres, "sweep the floor", Duration::from_mins(1));
        join_all((0..8).map(|_| claim()))
            .await
            .into_iter()
            .filter(|claimed| *claimed.as_ref().unwrap())
            .count()
    };
    assert_eq!((claims().await, claims().await), (1, 0));
    shop.sql("UPDATE refarch.chore SET begun_at = begun_at - interval '2 minutes'").await;
    assert_eq!((claims().await, claims().await), (1, 0));
    // After the clock was set back.
    shop.sql("UPDATE refarch.chore SET begun_at = begun_at + interval '1 day'").await;
    assert_eq!((claims().await, claims().await), (1, 0));
    assert!(!pruning::prune_history(&backends.postgres).await.unwrap(), "nothing is left");
}

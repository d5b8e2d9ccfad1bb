//! How often an index is asked which writes its queries can see.

use serde_json::Value;

use crate::common::{self, eventually};
use crate::shop::{TABLE, TIMEOUT, on_pinecone};

/// Edits that are applied one after the other.
const EDITS: u64 = 9;

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_asks_about_few_writes_however_many_workers_and_edits_there_are() {
    let shop = on_pinecone().await.with(&[
        ("REFARCH_INDEX_FRESHNESS_MS", "10"),
        ("REFARCH_INDEX_FRESHNESS_SAMPLE_S", "86400"),
        ("REFARCH_AUDIT_PERIOD_H", "0"),
    ]);
    shop.role(&["migrate"]).await;
    let roles = [["listen"].as_slice(), &["embed", "--workers", "1"], &["embed", "--workers", "1"]];
    let roles = roles.map(|args| shop.command(args).spawn().unwrap());
    let freshness = async || {
        let status: Value = serde_json::from_str(&shop.role(&["status", "--json"]).await).unwrap();
        status["freshness_ms"]["live"].clone()
    };
    for edit in 1..=EDITS {
        shop.sql(&format!(
            "INSERT INTO {TABLE} (id, description) VALUES ({edit}, 'A kettle of kind {edit}')"
        ))
        .await;
        let settled = format!("SELECT count(*) FROM refarch.ledger WHERE id = '{edit}' AND NOT dirty");
        eventually("the edit to be applied", TIMEOUT, async || {
            common::number(&shop.client, &settled).await == 1
        })
        .await;
        if edit == 1 {
            // It is nobody's turn any more.
            eventually("freshness to be known", TIMEOUT, async || freshness().await["p50"].is_u64()).await;
        }
    }
    drop(roles);
    // What was measured is told, and that it is not all.
    let freshness = freshness().await;
    assert_eq!(freshness["changes"], 1, "{freshness}");
    // The index has no delay, so that the first question finds the sample.
    assert_eq!(shop.double.as_ref().unwrap().counts().queries, 1);
}

//! The comparisons of the writer's memory with the table and with the index.

use std::collections::BTreeSet;

use super::environment::Environment;
use super::workload::{ExpectedRow, ExpectedRows};
use crate::backend::Backends;

/// Counts rows that differ between two sets of rows.
pub(super) fn count_differing_rows(a: &ExpectedRows, b: &ExpectedRows) -> u64 {
    let ids: BTreeSet<&i64> = a.keys().chain(b.keys()).collect();
    ids.into_iter().filter(|id| a.get(id) != b.get(id)).count() as u64
}

/// Counts differences between the index itself and the writer's memory, without ledger and audit.
pub(super) async fn index_differs(
    environment: &Environment,
    backends: &Backends,
    expected: &ExpectedRows,
) -> anyhow::Result<u64> {
    let wanted = |id: &str| {
        let product = id.parse().ok().and_then(|id: i64| expected.get(&id));
        product.filter(|p| p.description.as_ref().is_some_and(|text| !text.trim().is_empty()))
    };
    let searchable = expected.keys().filter(|id| wanted(&id.to_string()).is_some()).count() as u64;
    let mut agree = 0_u64;
    let mut held = 0_u64;
    if let Some(double) = &environment.pinecone_double {
        for (id, record) in double.snapshot("") {
            held += 1;
            let text =
                |key: &str| record.metadata.get(key).and_then(|value| value.as_str()).map(str::to_owned);
            let same = |product: &ExpectedRow| {
                product.name == text("name") && product.description == text("description")
            };
            agree += u64::from(wanted(&id).is_some_and(same));
        }
    } else {
        let mut cursor = None;
        loop {
            let page = backends.index.list(cursor.as_deref(), 1_000).await?;
            held += page.ids.len() as u64;
            agree += page.ids.iter().filter(|id| wanted(id).is_some()).count() as u64;
            cursor = page.next;
            if cursor.is_none() {
                break;
            }
        }
    }
    Ok((searchable - agree) + (held - agree))
}

//! Options and outbox rows for the tests of the relay.

use std::time::Duration;

use super::options::RelayOptions;
use crate::pipeline::change::Op;
use crate::pipeline::outbox::OutboxRow;

pub(super) fn options(changes_per_message: usize) -> RelayOptions {
    RelayOptions {
        source: "products".into(),
        changes_per_message,
        bulk_threshold: 10,
        live_bound: 1000,
        poll: Duration::from_millis(100),
        start_timeout: Duration::ZERO,
    }
}

pub(super) fn row(seq: i64, ids: &[&str], xid_changes: u64) -> OutboxRow {
    OutboxRow {
        seq,
        op: Op::Upsert,
        ids: ids.iter().map(|id| (*id).into()).collect(),
        xid: 7,
        changed_at_us: 1_700_000_000_000_000 + seq * 1_000,
        xid_changes,
    }
}

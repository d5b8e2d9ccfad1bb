//! Which lane a change travels in.
//!
//! The live lane is for edits that somebody waits for, the bulk lane for loads. A transaction with many
//! changes is a load. So are the changes that the live lane has no room for: behind so many that wait
//! already, nobody would see them soon.

use crate::pipeline::change::Lane;
use crate::pipeline::outbox::OutboxRow;

/// Chooses the lane of an outbox row by the size of its transaction, and takes the row's changes from the
/// room that is left in the live lane.
pub(super) fn choose_lane(row: &OutboxRow, bulk_threshold: u64, live_room: &mut u64) -> Lane {
    let changes = row.ids.len() as u64;
    let is_load = row.xid_changes.max(changes) > bulk_threshold;
    if is_load || changes > *live_room {
        return Lane::Bulk;
    }
    *live_room -= changes;
    Lane::Live
}

#[cfg(test)]
mod tests {
    use super::super::test_rows::row;
    use super::*;

    #[test]
    fn a_transaction_with_more_changes_than_the_threshold_is_bulk() {
        let lane = |ids: &[&str], xid_changes| choose_lane(&row(1, ids, xid_changes), 2, &mut 100);
        assert_eq!(lane(&["a", "b"], 2), Lane::Live);
        assert_eq!(lane(&["a"], 3), Lane::Bulk);
        // A count that was cut off cannot be less than what the row itself holds.
        assert_eq!(lane(&["a", "b", "c"], 1), Lane::Bulk);
    }

    #[test]
    fn what_exceeds_the_room_in_the_live_lane_is_bulk_and_takes_none_of_it() {
        let mut room = 3;
        let mut lane = |ids: &[&str]| choose_lane(&row(1, ids, 1), 10, &mut room);
        assert_eq!(lane(&["a", "b"]), Lane::Live);
        assert_eq!(lane(&["c", "d"]), Lane::Bulk);
        assert_eq!(lane(&["e"]), Lane::Live);
        assert_eq!(lane(&["f"]), Lane::Bulk);
    }
}

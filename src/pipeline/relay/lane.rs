//! Chooses the lane of a change.
//!
//! The live lane is for edits, because a person waits for the result. The bulk lane is for loads. A transaction
//! with many changes is a load. If the live lane has no room for a change, the change goes into the bulk lane:
//! so many live changes wait already that the change would not be indexed soon in either lane.

use crate::pipeline::change::Lane;
use crate::pipeline::outbox::OutboxRow;

/// Chooses the lane of an outbox row by the size of its transaction. `live_room` is the number of changes that
/// the live lane still takes; the changes of a live row are subtracted from it.
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
        // The count of a transaction may stop early. The row itself has three changes.
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

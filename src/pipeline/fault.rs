//! Faults: states that concern all changes and hold the work, shown once for as long as they last.
//!
//! A worker's parts report to its [`FaultBoard`]. The worker's heartbeat writes the board to the worker
//! registry. A fault is a state, not an event: reporting it again changes its message only.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Changes are held, because no change succeeds.
pub const INDEXING_BLOCKED: &str = "held";

/// The queue holds messages that this worker cannot read, or that are of another source.
pub const MISDIRECTED: &str = "misdirected";

/// Nothing can be received from the queue.
pub const QUEUE: &str = "queue";

/// Changes cannot be moved from the outbox to the queue.
pub const RELAY: &str = "relay";

/// Every kind that a worker's own parts report.
pub const KINDS: [&str; 4] = [INDEXING_BLOCKED, MISDIRECTED, QUEUE, RELAY];

/// This many failures in a row, without a success in between, are a fault.
pub const FAILURE_THRESHOLD: u32 = 3;

/// Most characters of a fault's message: a server's answer may be a whole page.
const MAX_MESSAGE: usize = 500;

/// A fault as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind. A worker has at most one fault of each kind.
    pub kind: &'static str,
    /// The fault in words.
    pub message: String,
}

/// The faults of one worker.
#[derive(Debug, Default)]
pub struct FaultBoard(Mutex<BTreeMap<&'static str, Entry>>);

#[derive(Debug)]
struct Entry {
    message: String,
    /// When a fault ends by itself; none if it must be cleared.
    until: Option<Instant>,
}

impl FaultBoard {
    /// Reports a fault, until it is cleared.
    pub fn report(&self, kind: &'static str, message: impl fmt::Display) {
        self.entries().insert(kind, Entry { message: redacted(&message.to_string()), until: None });
    }

    /// Reports a fault that ends by itself unless it is reported again.
    pub fn report_for(&self, kind: &'static str, message: impl fmt::Display, lasts: Duration) {
        let until = Instant::now().checked_add(lasts);
        self.entries().insert(kind, Entry { message: redacted(&message.to_string()), until });
    }

    /// Ends a fault.
    pub fn clear(&self, kind: &'static str) {
        self.entries().remove(kind);
    }

    /// The current faults.
    #[must_use]
    pub fn current(&self) -> Vec<Fault> {
        let now = Instant::now();
        let mut entries = self.entries();
        entries.retain(|_, entry| entry.until.is_none_or(|until| until > now));
        entries.iter().map(|(kind, entry)| Fault { kind, message: entry.message.clone() }).collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<&'static str, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message that is safe to show: on one line, of bounded length, and without the parts of a URL that may be
/// secret (the user, the password and the query).
#[must_use]
pub fn redacted(message: &str) -> String {
    let mut redacted = String::new();
    let mut rest = message;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        redacted.push_str(before);
        let ends = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ')' | '>' | ',');
        let (url, later) = after.split_at(after.find(ends).unwrap_or(after.len()));
        let (authority, path) = url.split_at(url.find(['/', '?', '#']).unwrap_or(url.len()));
        redacted.push_str(authority.rsplit('@').next().unwrap_or_default());
        redacted.push_str(path.split(['?', '#']).next().unwrap_or_default());
        rest = later;
    }
    redacted.push_str(rest);
    let printable = redacted.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_one_however_often_it_is_reported() {
        let board = FaultBoard::default();
        board.report(INDEXING_BLOCKED, "503");
        board.report(INDEXING_BLOCKED, "401");
        board.report_for(MISDIRECTED, "of another source", Duration::ZERO);
        assert_eq!(board.current(), [Fault { kind: INDEXING_BLOCKED, message: "401".into() }]);
        board.clear(INDEXING_BLOCKED);
        assert_eq!(board.current(), []);
    }

    #[test]
    fn a_message_shows_no_secret_of_a_url_and_is_bounded() {
        assert_eq!(
            redacted(
                "cannot send for url (https://me:secret@host:8080/v1?api-key=hidden), or http://a@b?c\nd"
            ),
            "cannot send for url (https://host:8080/v1), or http://b d"
        );
        assert_eq!(redacted(&"é".repeat(1_000)).chars().count(), MAX_MESSAGE);
    }
}

//! Queues with the behaviour of SQS: at least once, in no order, with a visibility timeout for each received
//! message. Pure: the caller passes the time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value};

/// The most messages in flight (a limit of SQS).
const MAX_IN_FLIGHT: usize = 120_000;

/// The most bytes of a message (a limit of SQS). A queue's own limit may be lower.
pub(super) const MAX_BYTES: usize = 1_048_576;

/// The error for too many messages in flight.
pub(super) struct OverLimit;

/// A message.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) id: String,
    pub(super) body: String,
    pub(super) attributes: Map<String, Value>,
    pub(super) sent: SystemTime,
    pub(super) first_received: Option<SystemTime>,
    pub(super) receive_count: u32,
    /// The queue that a dead letter came from.
    pub(super) from: Option<String>,
}

/// A message in a queue. Each receipt and each change of visibility has its own sequence number.
#[derive(Debug)]
struct StoredMessage {
    message: Message,
    sequence: u64,
    /// The sequence number of the newest receipt.
    receipt: u64,
    /// When the message becomes visible to other receivers.
    due: Option<Instant>,
    delayed: bool,
}

/// Why a receipt is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiptError {
    /// The receipt is not from this queue.
    Invalid,
    /// The message is visible again, or deleted.
    NotInFlight,
}

/// A queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) settings: HashMap<String, String>,
    messages: HashMap<u64, StoredMessage>,
    ready: VecDeque<u64>,
    due: BinaryHeap<Reverse<(Instant, u64, u64)>>,
    next: u64,
}

/// The number of messages in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MessageCounts {
    pub(super) visible: usize,
    pub(super) in_flight: usize,
    pub(super) delayed: usize,
}

impl Queue {
    /// The most bytes of a message.
    pub(super) fn max_bytes(&self) -> usize {
        self.settings.get("MaximumMessageSize").and_then(|text| text.parse().ok()).unwrap_or(MAX_BYTES)
    }

    pub(super) fn send(&mut self, message: Message, delay: Duration, now: Instant) {
        let key = self.next;
        self.next += 1;
        let mut stored = StoredMessage { message, sequence: 0, receipt: 0, due: None, delayed: false };
        if delay.is_zero() {
            self.ready.push_back(key);
        } else {
            stored.delayed = true;
            stored.due = Some(now + delay);
            self.due.push(Reverse((now + delay, key, 0)));
        }
        self.messages.insert(key, stored);
    }

    /// Makes messages visible whose time has come.
    fn release_due(&mut self, now: Instant) {
        while let Some(Reverse((at, key, sequence))) = self.due.peek().copied()
            && at <= now
        {
            self.due.pop();
            if let Some(stored) = self.messages.get_mut(&key)
                && stored.sequence == sequence
            {
                stored.due = None;
                stored.delayed = false;
                stored.sequence += 1;
                self.ready.push_back(key);
            }
        }
    }

    /// When the next message becomes visible by itself.
    pub(super) fn next_due(&mut self, now: Instant) -> Option<Instant> {
        self.release_due(now);
        self.due.peek().map(|Reverse((at, ..))| *at)
    }

    /// Receives up to `max` messages with their receipts. Messages whose receive count is too high are moved
    /// to `dead`.
    pub(super) fn receive(
        &mut self,
        max: usize,
        visibility: Duration,
        max_receives: Option<u32>,
        now: Instant,
        dead: &mut Vec<Message>,
    ) -> Result<Vec<(String, Message)>, OverLimit> {
        self.release_due(now);
        let mut received = Vec::new();
        while received.len() < max {
            if self.messages.len() - self.ready.len() >= MAX_IN_FLIGHT {
                return if received.is_empty() { Err(OverLimit) } else { Ok(received) };
            }
            let Some(key) = self.ready.pop_front() else { break };
            let Some(stored) = self.messages.get_mut(&key) else { continue };
            if max_receives.is_some_and(|max| stored.message.receive_count >= max) {
                dead.extend(self.messages.remove(&key).map(|stored| stored.message));
                continue;
            }
            stored.message.receive_count += 1;
            stored.message.first_received.get_or_insert_with(SystemTime::now);
            stored.sequence += 1;
            stored.receipt = stored.sequence;
            let receipt = format!("{key}.{}", stored.receipt);
            let message = stored.message.clone();
            self.hide(key, visibility, now);
            received.push((receipt, message));
        }
        Ok(received)
    }

    fn hide(&mut self, key: u64, visibility: Duration, now: Instant) {
        let Some(stored) = self.messages.get_mut(&key) else { return };
        if visibility.is_zero() {
            stored.due = None;
            self.ready.push_back(key);
        } else {
            stored.due = Some(now + visibility);
            self.due.push(Reverse((now + visibility, key, stored.sequence)));
        }
    }

    fn parse(receipt: &str) -> Result<(u64, u64), ReceiptError> {
        let parts = receipt
            .split_once('.')
            .and_then(|(key, sequence)| Some((key.parse().ok()?, sequence.parse().ok()?)));
        parts.ok_or(ReceiptError::Invalid)
    }

    /// Deletes the receipt's message. With a receipt that is not the newest, succeeds and deletes nothing, as
    /// SQS may do.
    pub(super) fn delete(&mut self, receipt: &str) -> Result<(), ReceiptError> {
        let (key, sequence) = Self::parse(receipt)?;
        if let Some(stored) = self.messages.get(&key)
            && stored.receipt == sequence
        {
            if stored.due.is_none() {
                self.ready.retain(|ready| *ready != key);
            }
            self.messages.remove(&key);
        }
        Ok(())
    }

    /// Hides the receipt's message for `visibility` from now.
    pub(super) fn change_visibility(
        &mut self,
        receipt: &str,
        visibility: Duration,
        now: Instant,
    ) -> Result<(), ReceiptError> {
        self.release_due(now);
        let (key, sequence) = Self::parse(receipt)?;
        let stored = self.messages.get_mut(&key).ok_or(ReceiptError::NotInFlight)?;
        if stored.receipt != sequence || stored.due.is_none() {
            return Err(ReceiptError::NotInFlight);
        }
        // The old due time no longer counts. The receipt stays valid.
        stored.sequence += 1;
        self.hide(key, visibility, now);
        Ok(())
    }

    pub(super) fn count(&mut self, now: Instant) -> MessageCounts {
        self.release_due(now);
        let delayed = self.messages.values().filter(|stored| stored.delayed).count();
        let visible = self.ready.len();
        MessageCounts { visible, delayed, in_flight: self.messages.len() - visible - delayed }
    }

    pub(super) fn purge(&mut self) {
        self.messages.clear();
        self.ready.clear();
        self.due.clear();
    }

    /// Takes every visible message, to move it elsewhere.
    pub(super) fn drain(&mut self, now: Instant) -> Vec<Message> {
        self.release_due(now);
        let ready = std::mem::take(&mut self.ready);
        ready.into_iter().filter_map(|key| self.messages.remove(&key)).map(|stored| stored.message).collect()
    }

    /// All messages, in no order.
    pub(super) fn messages(&self) -> impl Iterator<Item = &Message> {
        self.messages.values().map(|stored| &stored.message)
    }

    /// Makes a message in flight visible again.
    pub(super) fn make_message_visible(&mut self, receipt: &str) {
        if let Ok((key, _)) = Self::parse(receipt)
            && let Some(stored) = self.messages.get_mut(&key)
            && stored.due.is_some()
        {
            stored.sequence += 1;
            stored.due = None;
            self.ready.push_back(key);
        }
    }

    /// Makes up to `count` messages in flight visible again.
    pub(super) fn make_visible(&mut self, count: usize) -> u64 {
        let hidden = self.messages.iter_mut().filter(|(_, stored)| stored.due.is_some() && !stored.delayed);
        let mut made_visible = 0;
        for (key, stored) in hidden.take(count) {
            stored.sequence += 1;
            stored.due = None;
            self.ready.push_back(*key);
            made_visible += 1;
        }
        made_visible
    }

    /// Hides up to `count` visible messages, so that other messages are received first.
    pub(super) fn delay(&mut self, count: usize, delay: Duration, now: Instant) -> u64 {
        self.release_due(now);
        let mut delayed = 0;
        for _ in 0..count.min(self.ready.len()) {
            let Some(key) = self.ready.pop_front() else { break };
            if let Some(stored) = self.messages.get_mut(&key) {
                stored.sequence += 1;
                self.hide(key, delay, now);
                delayed += 1;
            }
        }
        delayed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VISIBILITY: Duration = Duration::from_secs(10);

    fn message(id: &str) -> Message {
        Message {
            id: id.into(),
            body: id.into(),
            attributes: Map::new(),
            sent: SystemTime::UNIX_EPOCH,
            first_received: None,
            receive_count: 0,
            from: None,
        }
    }

    fn receive(queue: &mut Queue, now: Instant) -> Vec<String> {
        let received = queue.receive(10, VISIBILITY, None, now, &mut Vec::new());
        received.ok().unwrap().into_iter().map(|(receipt, _)| receipt).collect()
    }

    #[test]
    fn a_message_comes_again_after_its_visibility_and_not_before() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.send(message("a"), Duration::ZERO, start);
        let first = receive(&mut queue, start);
        assert_eq!(first.len(), 1);
        assert!(receive(&mut queue, start + VISIBILITY / 2).is_empty());
        queue.change_visibility(&first[0], VISIBILITY, start + VISIBILITY / 2).unwrap();
        assert!(receive(&mut queue, start + VISIBILITY).is_empty(), "it was extended");
        let again = receive(&mut queue, start + VISIBILITY * 2);
        assert_eq!(again.len(), 1);
        // The older receipt is accepted, and does nothing.
        assert_eq!(queue.change_visibility(&first[0], VISIBILITY, start), Err(ReceiptError::NotInFlight));
        queue.delete(&first[0]).unwrap();
        assert_eq!(queue.count(start).in_flight, 1);
        queue.delete(&again[0]).unwrap();
        assert_eq!(queue.count(start), MessageCounts::default());
        assert_eq!(queue.delete("x"), Err(ReceiptError::Invalid));
    }

    #[test]
    fn a_released_message_can_be_had_at_once_and_its_receipt_deletes_no_more() {
        let (mut queue, start) = (Queue::default(), Instant::now());
        queue.send(message("a"), Duration::ZERO, start);
        let first = receive(&mut queue, start);
        queue.change_visibility(&first[0], VISIBILITY, start).unwrap();
        queue.change_visibility(&first[0], Duration::ZERO, start).unwrap();
        let second = receive(&mut queue, start);
        assert_eq!(second.len(), 1);
        // The old due time no longer counts.
        assert!(receive(&mut queue, start + VISIBILITY / 2).is_empty());
        queue.delete(&second[0]).unwrap();
        assert!(receive(&mut queue, start + VISIBILITY * 9).is_empty());
    }

    #[test]
    fn what_was_received_too_often_goes_to_the_dead() {
        let (mut queue, start, mut dead) = (Queue::default(), Instant::now(), Vec::new());
        queue.send(message("a"), Duration::ZERO, start);
        for n in 0..3 {
            let received = queue.receive(10, VISIBILITY, Some(2), start + VISIBILITY * n, &mut dead);
            assert_eq!(received.ok().unwrap().len(), usize::from(n < 2));
        }
        assert_eq!(dead.len(), 1);
    }
}

//! Operations on messages.

use std::time::{Duration, Instant};

use rand::RngExt as _;
use serde_json::{Map, Value, json};

use super::queue::{Message, ReceiptError};
use super::state::State;
use super::wire::{
    MAX_BYTES, MAX_ENTRIES, MAX_VISIBILITY, MAX_WAIT, SqsError, SqsResult, message, name_of, number,
    receipt_error, receive_result, send_result, text,
};

impl State {
    pub(super) fn put(&mut self, name: &str, message: Message, delay: Duration) {
        if let Some(queue) = self.queues.get_mut(name) {
            queue.send(message, delay, Instant::now());
            self.counts.messages_sent += 1;
        }
    }

    pub(super) fn send(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        let (message, delay) = message(self, &name, body)?;
        let send_result = send_result(&message);
        self.put(&name, message, delay);
        Ok(Value::Object(send_result))
    }

    /// Does a batch operation, entry by entry.
    fn batch(
        &mut self,
        body: &Value,
        mut each: impl FnMut(&mut Self, &str, &Value) -> Result<Map<String, Value>, SqsError>,
    ) -> SqsResult {
        let name = self.queue(body)?;
        let entries = body.get("Entries").and_then(Value::as_array).cloned().unwrap_or_default();
        if entries.is_empty() {
            let message = "There should be at least one entry in the request.";
            return Err(SqsError::new(
                "EmptyBatchRequest",
                "AWS.SimpleQueueService.EmptyBatchRequest",
                message,
            ));
        }
        if entries.len() > MAX_ENTRIES {
            let message = format!(
                "Maximum number of entries per request are {MAX_ENTRIES}. You have sent {}.",
                entries.len()
            );
            return Err(SqsError::new(
                "TooManyEntriesInBatchRequest",
                "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
                message,
            ));
        }
        let mut ids = std::collections::HashSet::new();
        let (mut successful, mut failed) = (Vec::new(), Vec::new());
        for entry in &entries {
            if !ids.insert(text(entry, "Id")?) {
                let message = format!("Id {} repeated.", text(entry, "Id")?);
                return Err(SqsError::new(
                    "BatchEntryIdsNotDistinct",
                    "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
                    message,
                ));
            }
        }
        let bytes: usize =
            entries.iter().filter_map(|entry| entry.get("MessageBody")?.as_str()).map(str::len).sum();
        if bytes > MAX_BYTES {
            let message = format!(
                "Batch requests cannot be longer than {MAX_BYTES} bytes. You have sent {bytes} bytes."
            );
            return Err(SqsError::new(
                "BatchRequestTooLong",
                "AWS.SimpleQueueService.BatchRequestTooLong",
                message,
            ));
        }
        for entry in &entries {
            let id = text(entry, "Id")?;
            let fails = self.faults.entry > 0.0 && self.rng.random_bool(self.faults.entry);
            // Half of the failing entries are done all the same.
            if fails && self.rng.random() {
                let _ = each(self, &name, entry);
            }
            let done = if fails {
                self.counts.entries_failed += 1;
                failed.push(json!({ "Id": id, "SenderFault": false, "Code": "InternalError", "Message": "An internal error occurred" }));
                continue;
            } else {
                each(self, &name, entry)
            };
            match done {
                Ok(mut send_result) => {
                    send_result.insert("Id".into(), id.into());
                    successful.push(Value::Object(send_result));
                }
                Err(refused) => failed.push(json!({
                    "Id": id, "SenderFault": true, "Code": refused.name, "Message": refused.message,
                })),
            }
        }
        Ok(json!({ "Successful": successful, "Failed": failed }))
    }

    pub(super) fn send_batch(&mut self, body: &Value) -> SqsResult {
        self.batch(body, |state, name, entry| {
            let (message, delay) = message(state, name, entry)?;
            let send_result = send_result(&message);
            state.put(name, message, delay);
            Ok(send_result)
        })
    }

    pub(super) fn receive(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        let max = number(body, "MaxNumberOfMessages", 10)?.unwrap_or(1);
        if max == 0 {
            return Err(SqsError::invalid(
                "Value 0 for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10, if provided.",
            ));
        }
        number(body, "WaitTimeSeconds", MAX_WAIT)?;
        let asked = number(body, "VisibilityTimeout", MAX_VISIBILITY)?;
        let duplicate = self.faults.duplicate;
        let queue = self.queues.get_mut(&name).ok_or_else(SqsError::no_queue)?;
        let set = queue.settings.get("VisibilityTimeout").and_then(|text| text.parse().ok());
        let visibility = Duration::from_secs(asked.or(set).unwrap_or(30));
        let policy: Value = queue
            .settings
            .get("RedrivePolicy")
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let count = policy.get("maxReceiveCount");
        let max_receives =
            count.and_then(|n| n.as_u64().or_else(|| n.as_str()?.parse().ok())).map(|n| n as u32);
        let (now, mut dead) = (Instant::now(), Vec::new());
        let received = queue
            .receive(max as usize, visibility, max_receives, now, &mut dead)
            .map_err(|_| SqsError::new("OverLimit", "OverLimit", "Too many messages are in flight"))?;
        let mut messages = Vec::new();
        for (receipt, message) in received {
            messages.push(receive_result(&receipt, &message));
            if duplicate > 0.0 && self.rng.random_bool(duplicate) {
                let queue = self.queues.get_mut(&name).ok_or_else(SqsError::no_queue)?;
                // Its receipt stops being the newest once another receiver has the message.
                queue.make_message_visible(&receipt);
                self.counts.duplicated += 1;
            }
        }
        let target = policy
            .get("deadLetterTargetArn")
            .and_then(Value::as_str)
            .map(name_of)
            .unwrap_or_default()
            .to_owned();
        for message in dead {
            self.put(
                &target,
                Message { receive_count: 0, from: Some(name.clone()), ..message },
                Duration::ZERO,
            );
        }
        self.counts.messages_received += messages.len() as u64;
        if messages.is_empty() { Ok(json!({})) } else { Ok(json!({ "Messages": messages })) }
    }

    /// The latest time at which a receive that found nothing must look again.
    pub(super) fn next_due(&mut self, body: &Value) -> Option<Instant> {
        let name = self.queue(body).ok()?;
        self.queues.get_mut(&name)?.next_due(Instant::now())
    }

    fn remove(&mut self, name: &str, body: &Value) -> Result<(), SqsError> {
        let receipt = text(body, "ReceiptHandle")?;
        let queue = self.queues.get_mut(name).ok_or_else(SqsError::no_queue)?;
        queue.delete(receipt).map_err(|_| receipt_error(ReceiptError::Invalid, receipt))?;
        self.counts.messages_deleted += 1;
        Ok(())
    }

    pub(super) fn delete(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        self.remove(&name, body).map(|()| json!({}))
    }

    pub(super) fn delete_batch(&mut self, body: &Value) -> SqsResult {
        self.batch(body, |state, name, entry| state.remove(name, entry).map(|()| Map::new()))
    }

    fn hide(&mut self, name: &str, body: &Value) -> Result<(), SqsError> {
        let receipt = text(body, "ReceiptHandle")?;
        let seconds = number(body, "VisibilityTimeout", MAX_VISIBILITY)?
            .ok_or_else(|| SqsError::missing("VisibilityTimeout"))?;
        let queue = self.queues.get_mut(name).ok_or_else(SqsError::no_queue)?;
        queue
            .change_visibility(receipt, Duration::from_secs(seconds), Instant::now())
            .map_err(|why| receipt_error(why, receipt))
    }

    pub(super) fn change_visibility(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        self.hide(&name, body).map(|()| json!({}))
    }

    pub(super) fn change_visibility_batch(&mut self, body: &Value) -> SqsResult {
        self.batch(body, |state, name, entry| state.hide(name, entry).map(|()| Map::new()))
    }
}

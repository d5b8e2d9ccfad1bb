//! The dispatch of operations, and the operations on queues.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value, json};

use super::queue::Message;
use super::state::{ACCOUNT, State};
use super::wire::{SqsError, SqsResult, arn, millis, name_of, number, random_id, text};

impl State {
    pub(super) fn queue(&mut self, body: &Value) -> Result<String, SqsError> {
        let name = name_of(text(body, "QueueUrl")?).to_owned();
        if self.queues.contains_key(&name) { Ok(name) } else { Err(SqsError::no_queue()) }
    }

    /// Does an operation, except for the wait of a receive.
    pub(super) fn run(&mut self, operation: &str, body: &Value, base: &str) -> SqsResult {
        match operation {
            "CreateQueue" => self.create(body, base),
            "GetQueueUrl" => self.url(body, base),
            "ListQueues" => Ok(self.list(base)),
            "GetQueueAttributes" => self.attributes(body),
            "SetQueueAttributes" => self.set_attributes(body),
            "DeleteQueue" => self.delete_queue(body),
            "PurgeQueue" => self.purge(body),
            "SendMessage" => self.send(body),
            "SendMessageBatch" => self.send_batch(body),
            "ReceiveMessage" => self.receive(body),
            "DeleteMessage" => self.delete(body),
            "DeleteMessageBatch" => self.delete_batch(body),
            "ChangeMessageVisibility" => self.change_visibility(body),
            "ChangeMessageVisibilityBatch" => self.change_visibility_batch(body),
            "StartMessageMoveTask" => self.move_messages(body),
            "ListMessageMoveTasks" => self.moves(body),
            other => {
                let message = format!("The action {other} is not valid for this endpoint.");
                Err(SqsError::new("InvalidAction", "InvalidAction", message))
            }
        }
    }

    fn create(&mut self, body: &Value, base: &str) -> SqsResult {
        let name = text(body, "QueueName")?;
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 80 || !name.chars().all(fits) {
            return Err(SqsError::invalid(
                "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
            ));
        }
        let settings = body.get("Attributes").and_then(Value::as_object).cloned().unwrap_or_default();
        let queue = self.queues.entry(name.to_owned()).or_default();
        queue.settings.extend(
            settings.into_iter().map(|(key, value)| (key, value.as_str().unwrap_or_default().to_owned())),
        );
        Ok(json!({ "QueueUrl": format!("{base}/{ACCOUNT}/{name}") }))
    }

    fn url(&self, body: &Value, base: &str) -> SqsResult {
        let name = text(body, "QueueName")?;
        if !self.queues.contains_key(name) {
            return Err(SqsError::no_queue());
        }
        Ok(json!({ "QueueUrl": format!("{base}/{ACCOUNT}/{name}") }))
    }

    fn list(&self, base: &str) -> Value {
        let mut urls: Vec<String> =
            self.queues.keys().map(|name| format!("{base}/{ACCOUNT}/{name}")).collect();
        urls.sort();
        json!({ "QueueUrls": urls })
    }

    fn attributes(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        let asked: Vec<&str> = body
            .get("AttributeNames")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let queue = self.queues.get_mut(&name).ok_or_else(SqsError::no_queue)?;
        let counts = queue.count(Instant::now());
        let mut all: Map<String, Value> =
            queue.settings.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        let max = queue.max_bytes();
        all.entry("VisibilityTimeout").or_insert("30".into());
        all.entry("MessageRetentionPeriod").or_insert("345600".into());
        all.entry("MaximumMessageSize").or_insert(max.to_string().into());
        all.insert("QueueArn".into(), arn(&name).into());
        for (key, count) in [
            ("ApproximateNumberOfMessages", counts.visible),
            ("ApproximateNumberOfMessagesNotVisible", counts.in_flight),
            ("ApproximateNumberOfMessagesDelayed", counts.delayed),
        ] {
            all.insert(key.into(), count.to_string().into());
        }
        if !asked.contains(&"All") {
            all.retain(|key, _| asked.contains(&key.as_str()));
        }
        Ok(json!({ "Attributes": all }))
    }

    fn set_attributes(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        let settings = body.get("Attributes").and_then(Value::as_object).cloned().unwrap_or_default();
        let queue = self.queues.get_mut(&name).ok_or_else(SqsError::no_queue)?;
        for (key, value) in settings {
            match value.as_str() {
                Some("") | None => drop(queue.settings.remove(&key)),
                Some(value) => drop(queue.settings.insert(key, value.to_owned())),
            }
        }
        Ok(json!({}))
    }

    fn delete_queue(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        self.queues.remove(&name);
        Ok(json!({}))
    }

    fn purge(&mut self, body: &Value) -> SqsResult {
        let name = self.queue(body)?;
        self.queues.get_mut(&name).ok_or_else(SqsError::no_queue)?.purge();
        Ok(json!({}))
    }

    fn move_messages(&mut self, body: &Value) -> SqsResult {
        let not_there = || {
            let message = "The resource that you specified for the SourceArn parameter doesn't exist.";
            SqsError::new("ResourceNotFoundException", "ResourceNotFoundException", message)
        };
        let from = name_of(text(body, "SourceArn")?).to_owned();
        let to = body.get("DestinationArn").and_then(Value::as_str).map(name_of).map(str::to_owned);
        let messages = self.queues.get_mut(&from).ok_or_else(not_there)?.drain(Instant::now());
        if to.as_ref().is_some_and(|to| !self.queues.contains_key(to)) {
            return Err(not_there());
        }
        let (mut moved, mut stuck) = (0, Vec::new());
        for message in messages {
            // Without a destination, a message goes back to the queue that it came from. A message that was
            // sent to this queue directly stays.
            match to.clone().or_else(|| message.from.clone()) {
                Some(to) => {
                    self.put(&to, Message { receive_count: 0, from: None, ..message }, Duration::ZERO);
                    moved += 1;
                }
                None => stuck.push(message),
            }
        }
        let is_stuck = !stuck.is_empty();
        for message in stuck {
            self.put(&from, message, Duration::ZERO);
        }
        let handle = random_id(self);
        let mut task = json!({
            "Status": if is_stuck { "FAILED" } else { "COMPLETED" },
            "SourceArn": arn(&from),
            "ApproximateNumberOfMessagesMoved": moved,
            "StartedTimestamp": millis(SystemTime::now()),
        });
        if is_stuck {
            task["FailureReason"] = "CouldNotDetermineMessageSource".into();
        }
        self.moves.insert(0, task);
        Ok(json!({ "TaskHandle": handle }))
    }

    fn moves(&mut self, body: &Value) -> SqsResult {
        let source = text(body, "SourceArn")?;
        let max = number(body, "MaxResults", 10)?.unwrap_or(1) as usize;
        let of_source = self.moves.iter().filter(|task| task["SourceArn"] == source).take(max);
        Ok(json!({ "Results": of_source.collect::<Vec<_>>() }))
    }
}

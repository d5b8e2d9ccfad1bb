//! The operations, from JSON to JSON.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use md5::{Digest as _, Md5};
use rand::RngExt as _;
use serde_json::{Map, Value, json};

use super::queue::{Message, Unusable};
use super::{ACCOUNT, REGION, State};

/// Limits of SQS.
const MAX_BYTES: usize = 1_048_576;
const MAX_ENTRIES: usize = 10;
const MAX_VISIBILITY: u64 = 43_200;
const MAX_DELAY: u64 = 900;
const MAX_WAIT: u64 = 20;

/// An error of SQS: its newer name, its older one, and what it says.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) name: &'static str,
    pub(super) query_name: &'static str,
    pub(super) message: String,
}

impl Refused {
    fn new(name: &'static str, query_name: &'static str, message: impl Into<String>) -> Self {
        Self { name, query_name, message: message.into() }
    }

    fn missing(field: &str) -> Self {
        let message = format!("The request must contain the parameter {field}.");
        Self::new("MissingRequiredParameterException", "MissingParameter", message)
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", "InvalidParameterValue", message)
    }

    fn no_queue() -> Self {
        let message = "The specified queue does not exist.";
        Self::new("QueueDoesNotExist", "AWS.SimpleQueueService.NonExistentQueue", message)
    }

    pub(super) fn missing_token() -> Self {
        let message = "Request is missing Authentication Token";
        Self::new("MissingAuthenticationToken", "MissingAuthenticationToken", message)
    }

    pub(super) fn throttled() -> Self {
        Self::new("RequestThrottled", "RequestThrottled", "Rate exceeded")
    }
}

pub(super) type Answer = Result<Value, Refused>;

fn text<'a>(body: &'a Value, field: &str) -> Result<&'a str, Refused> {
    body.get(field).and_then(Value::as_str).ok_or_else(|| Refused::missing(field))
}

fn number(body: &Value, field: &str, max: u64) -> Result<Option<u64>, Refused> {
    let Some(value) = body.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = value.as_u64().filter(|number| *number <= max);
    let wrong = || {
        Refused::invalid(format!(
            "Value {value} for parameter {field} is invalid. Reason: Must be between 0 and {max}."
        ))
    };
    number.map(Some).ok_or_else(wrong)
}

/// A queue's name from its URL or ARN.
fn name_of(path: &str) -> &str {
    path.rsplit(['/', ':']).next().unwrap_or_default()
}

fn arn(name: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{name}")
}

fn md5(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Md5::digest(bytes).iter().fold(String::with_capacity(32), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The digest of attributes, as SQS defines it: by name, each with its length before it.
fn md5_of_attributes(attributes: &Map<String, Value>) -> String {
    let mut bytes = Vec::new();
    for (name, value) in attributes {
        let of = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
        for text in [name, of("DataType")] {
            bytes.extend((text.len() as u32).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        // Marks a text; there are no binary values here.
        bytes.push(1);
        let text = of("StringValue");
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text.as_bytes());
    }
    md5(&bytes)
}

fn size(body: &str, attributes: &Map<String, Value>) -> usize {
    let of = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map_or(0, str::len);
    let attributes: usize = attributes
        .iter()
        .map(|(name, value)| name.len() + of(value, "DataType") + of(value, "StringValue"))
        .sum();
    body.len() + attributes
}

fn random_id(state: &mut State) -> String {
    let n: u128 = state.dice.random();
    let hex = format!("{n:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Checks what is sent, as far as SQS does, and makes a message of it.
fn message(state: &mut State, entry: &Value) -> Result<(Message, Duration), Refused> {
    let body = text(entry, "MessageBody")?.to_owned();
    let attributes = entry.get("MessageAttributes").and_then(Value::as_object).cloned().unwrap_or_default();
    let fits = |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..);
    if body.is_empty() {
        return Err(Refused::missing("MessageBody"));
    }
    if !body.chars().all(fits) {
        let message = "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF";
        return Err(Refused::new("InvalidMessageContents", "InvalidMessageContents", message));
    }
    for (name, value) in &attributes {
        let text = value.get("StringValue").and_then(Value::as_str).unwrap_or_default();
        if text.is_empty() || !text.chars().all(fits) {
            return Err(Refused::invalid(format!(
                "Message (user) attribute '{name}' must contain a non-empty value of valid characters."
            )));
        }
    }
    if attributes.len() > 10 {
        return Err(Refused::invalid(format!(
            "Number of message attributes [{}] exceeds the allowed maximum [10].",
            attributes.len()
        )));
    }
    if size(&body, &attributes) > MAX_BYTES {
        return Err(Refused::invalid(format!(
            "One or more parameters are invalid. Reason: Message must be shorter than {MAX_BYTES} bytes."
        )));
    }
    let delay = number(entry, "DelaySeconds", MAX_DELAY)?.unwrap_or_default();
    let id = random_id(state);
    let message = Message {
        id,
        body,
        attributes,
        sent: SystemTime::now(),
        first_received: None,
        receive_count: 0,
        from: None,
    };
    Ok((message, Duration::from_secs(delay)))
}

/// What SQS says of a message that it has taken.
fn taken(message: &Message) -> Map<String, Value> {
    let mut taken = Map::new();
    taken.insert("MessageId".into(), message.id.clone().into());
    taken.insert("MD5OfMessageBody".into(), md5(message.body.as_bytes()).into());
    if !message.attributes.is_empty() {
        taken.insert("MD5OfMessageAttributes".into(), md5_of_attributes(&message.attributes).into());
    }
    taken
}

impl State {
    fn queue(&mut self, body: &Value) -> Result<String, Refused> {
        let name = name_of(text(body, "QueueUrl")?).to_owned();
        if self.queues.contains_key(&name) { Ok(name) } else { Err(Refused::no_queue()) }
    }

    /// Does an operation, but for the waiting of a receive.
    pub(super) fn run(&mut self, operation: &str, body: &Value, base: &str) -> Answer {
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
                Err(Refused::new("InvalidAction", "InvalidAction", message))
            }
        }
    }

    fn create(&mut self, body: &Value, base: &str) -> Answer {
        let name = text(body, "QueueName")?;
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 80 || !name.chars().all(fits) {
            return Err(Refused::invalid(
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

    fn url(&self, body: &Value, base: &str) -> Answer {
        let name = text(body, "QueueName")?;
        if !self.queues.contains_key(name) {
            return Err(Refused::no_queue());
        }
        Ok(json!({ "QueueUrl": format!("{base}/{ACCOUNT}/{name}") }))
    }

    fn list(&self, base: &str) -> Value {
        let mut urls: Vec<String> =
            self.queues.keys().map(|name| format!("{base}/{ACCOUNT}/{name}")).collect();
        urls.sort();
        json!({ "QueueUrls": urls })
    }

    fn attributes(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        let asked: Vec<&str> = body
            .get("AttributeNames")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let queue = self.queues.get_mut(&name).ok_or_else(Refused::no_queue)?;
        let counted = queue.count(Instant::now());
        let mut all: Map<String, Value> =
            queue.settings.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
        all.entry("VisibilityTimeout").or_insert("30".into());
        all.insert("QueueArn".into(), arn(&name).into());
        for (key, count) in [
            ("ApproximateNumberOfMessages", counted.visible),
            ("ApproximateNumberOfMessagesNotVisible", counted.in_flight),
            ("ApproximateNumberOfMessagesDelayed", counted.delayed),
        ] {
            all.insert(key.into(), count.to_string().into());
        }
        if !asked.contains(&"All") {
            all.retain(|key, _| asked.contains(&key.as_str()));
        }
        Ok(json!({ "Attributes": all }))
    }

    fn set_attributes(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        let settings = body.get("Attributes").and_then(Value::as_object).cloned().unwrap_or_default();
        let queue = self.queues.get_mut(&name).ok_or_else(Refused::no_queue)?;
        for (key, value) in settings {
            match value.as_str() {
                Some("") | None => drop(queue.settings.remove(&key)),
                Some(value) => drop(queue.settings.insert(key, value.to_owned())),
            }
        }
        Ok(json!({}))
    }

    fn delete_queue(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        self.queues.remove(&name);
        Ok(json!({}))
    }

    fn purge(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        self.queues.get_mut(&name).ok_or_else(Refused::no_queue)?.purge();
        Ok(json!({}))
    }

    fn put(&mut self, name: &str, message: Message, delay: Duration) {
        if let Some(queue) = self.queues.get_mut(name) {
            queue.send(message, delay, Instant::now());
            self.counts.messages_sent += 1;
        }
    }

    fn send(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        let (message, delay) = message(self, body)?;
        let taken = taken(&message);
        self.put(&name, message, delay);
        Ok(Value::Object(taken))
    }

    /// Does a batch, entry by entry.
    fn batch(
        &mut self,
        body: &Value,
        mut each: impl FnMut(&mut Self, &str, &Value) -> Result<Map<String, Value>, Refused>,
    ) -> Answer {
        let name = self.queue(body)?;
        let entries = body.get("Entries").and_then(Value::as_array).cloned().unwrap_or_default();
        if entries.is_empty() {
            let message = "There should be at least one entry in the request.";
            return Err(Refused::new(
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
            return Err(Refused::new(
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
                return Err(Refused::new(
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
            return Err(Refused::new(
                "BatchRequestTooLong",
                "AWS.SimpleQueueService.BatchRequestTooLong",
                message,
            ));
        }
        for entry in &entries {
            let id = text(entry, "Id")?;
            let fails = self.faults.entry > 0.0 && self.dice.random_bool(self.faults.entry);
            // Half of those that fail were done all the same.
            if fails && self.dice.random() {
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
                Ok(mut taken) => {
                    taken.insert("Id".into(), id.into());
                    successful.push(Value::Object(taken));
                }
                Err(refused) => failed.push(json!({
                    "Id": id, "SenderFault": true, "Code": refused.name, "Message": refused.message,
                })),
            }
        }
        Ok(json!({ "Successful": successful, "Failed": failed }))
    }

    fn send_batch(&mut self, body: &Value) -> Answer {
        self.batch(body, |state, name, entry| {
            let (message, delay) = message(state, entry)?;
            let taken = taken(&message);
            state.put(name, message, delay);
            Ok(taken)
        })
    }

    fn receive(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        let max = number(body, "MaxNumberOfMessages", 10)?.unwrap_or(1);
        if max == 0 {
            return Err(Refused::invalid(
                "Value 0 for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10, if provided.",
            ));
        }
        number(body, "WaitTimeSeconds", MAX_WAIT)?;
        let asked = number(body, "VisibilityTimeout", MAX_VISIBILITY)?;
        let duplicate = self.faults.duplicate;
        let queue = self.queues.get_mut(&name).ok_or_else(Refused::no_queue)?;
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
            .map_err(|_| Refused::new("OverLimit", "OverLimit", "Too many messages are in flight"))?;
        let mut messages = Vec::new();
        for (receipt, message) in received {
            messages.push(shown(&receipt, &message));
            if duplicate > 0.0 && self.dice.random_bool(duplicate) {
                let queue = self.queues.get_mut(&name).ok_or_else(Refused::no_queue)?;
                // Its receipt is not the newest any more once somebody else has it.
                queue.show(&receipt);
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

    /// When a receive that found nothing should look again, at the latest.
    pub(super) fn next_due(&mut self, body: &Value) -> Option<Instant> {
        let name = self.queue(body).ok()?;
        self.queues.get_mut(&name)?.next_due(Instant::now())
    }

    fn remove(&mut self, name: &str, body: &Value) -> Result<(), Refused> {
        let receipt = text(body, "ReceiptHandle")?;
        let queue = self.queues.get_mut(name).ok_or_else(Refused::no_queue)?;
        queue.delete(receipt).map_err(|_| unusable(Unusable::Invalid, receipt))?;
        self.counts.messages_deleted += 1;
        Ok(())
    }

    fn delete(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        self.remove(&name, body).map(|()| json!({}))
    }

    fn delete_batch(&mut self, body: &Value) -> Answer {
        self.batch(body, |state, name, entry| state.remove(name, entry).map(|()| Map::new()))
    }

    fn hide(&mut self, name: &str, body: &Value) -> Result<(), Refused> {
        let receipt = text(body, "ReceiptHandle")?;
        let seconds = number(body, "VisibilityTimeout", MAX_VISIBILITY)?
            .ok_or_else(|| Refused::missing("VisibilityTimeout"))?;
        let queue = self.queues.get_mut(name).ok_or_else(Refused::no_queue)?;
        queue
            .change_visibility(receipt, Duration::from_secs(seconds), Instant::now())
            .map_err(|why| unusable(why, receipt))
    }

    fn change_visibility(&mut self, body: &Value) -> Answer {
        let name = self.queue(body)?;
        self.hide(&name, body).map(|()| json!({}))
    }

    fn change_visibility_batch(&mut self, body: &Value) -> Answer {
        self.batch(body, |state, name, entry| state.hide(name, entry).map(|()| Map::new()))
    }

    fn move_messages(&mut self, body: &Value) -> Answer {
        let not_there = || {
            let message = "The resource that you specified for the SourceArn parameter doesn't exist.";
            Refused::new("ResourceNotFoundException", "ResourceNotFoundException", message)
        };
        let from = name_of(text(body, "SourceArn")?).to_owned();
        let to = body.get("DestinationArn").and_then(Value::as_str).map(name_of).map(str::to_owned);
        let messages = self.queues.get_mut(&from).ok_or_else(not_there)?.drain(Instant::now());
        if to.as_ref().is_some_and(|to| !self.queues.contains_key(to)) {
            return Err(not_there());
        }
        let (mut moved, mut stuck) = (0, Vec::new());
        for message in messages {
            // Without a destination a message goes back where it came from; one that was sent there stays.
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

    fn moves(&mut self, body: &Value) -> Answer {
        let source = text(body, "SourceArn")?;
        let max = number(body, "MaxResults", 10)?.unwrap_or(1) as usize;
        let of_source = self.moves.iter().filter(|task| task["SourceArn"] == source).take(max);
        Ok(json!({ "Results": of_source.collect::<Vec<_>>() }))
    }
}

fn unusable(why: Unusable, receipt: &str) -> Refused {
    match why {
        Unusable::Invalid => {
            let message = format!("The input receipt handle \"{receipt}\" is not a valid receipt handle.");
            Refused::new("ReceiptHandleIsInvalid", "ReceiptHandleIsInvalid", message)
        }
        Unusable::NotInFlight => Refused::new(
            "MessageNotInflight",
            "AWS.SimpleQueueService.MessageNotInflight",
            "The message referred to is not in flight.",
        ),
    }
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A message as it is handed out.
fn shown(receipt: &str, message: &Message) -> Value {
    let mut shown = json!({
        "MessageId": message.id,
        "ReceiptHandle": receipt,
        "MD5OfBody": md5(message.body.as_bytes()),
        "Body": message.body,
        "Attributes": {
            "ApproximateReceiveCount": message.receive_count.to_string(),
            "SentTimestamp": millis(message.sent).to_string(),
            "ApproximateFirstReceiveTimestamp": message.first_received.map_or(0, millis).to_string(),
            "SenderId": ACCOUNT,
        },
    });
    if !message.attributes.is_empty() {
        shown["MessageAttributes"] = Value::Object(message.attributes.clone());
        shown["MD5OfMessageAttributes"] = md5_of_attributes(&message.attributes).into();
    }
    shown
}

//! The protocol: errors, fields, and messages in requests and answers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use md5::{Digest as _, Md5};
use rand::RngExt as _;
use serde_json::{Map, Value, json};

use super::queue::{Message, Queue, ReceiptError};
use super::state::{ACCOUNT, REGION, State};

pub(super) use super::queue::MAX_BYTES;

/// Limits of SQS.
pub(super) const MAX_ENTRIES: usize = 10;
pub(super) const MAX_VISIBILITY: u64 = 43_200;
const MAX_DELAY: u64 = 900;
pub(super) const MAX_WAIT: u64 = 20;

/// An error of SQS: its newer code, its older code, and its message.
#[derive(Debug)]
pub(super) struct SqsError {
    pub(super) name: &'static str,
    pub(super) query_name: &'static str,
    pub(super) message: String,
}

impl SqsError {
    pub(super) fn new(name: &'static str, query_name: &'static str, message: impl Into<String>) -> Self {
        Self { name, query_name, message: message.into() }
    }

    pub(super) fn missing(field: &str) -> Self {
        let message = format!("The request must contain the parameter {field}.");
        Self::new("MissingRequiredParameterException", "MissingParameter", message)
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", "InvalidParameterValue", message)
    }

    pub(super) fn no_queue() -> Self {
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

pub(super) type SqsResult = Result<Value, SqsError>;

pub(super) fn text<'a>(body: &'a Value, field: &str) -> Result<&'a str, SqsError> {
    body.get(field).and_then(Value::as_str).ok_or_else(|| SqsError::missing(field))
}

pub(super) fn number(body: &Value, field: &str, max: u64) -> Result<Option<u64>, SqsError> {
    let Some(value) = body.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = value.as_u64().filter(|number| *number <= max);
    let wrong = || {
        SqsError::invalid(format!(
            "Value {value} for parameter {field} is invalid. Reason: Must be between 0 and {max}."
        ))
    };
    number.map(Some).ok_or_else(wrong)
}

/// The name of a queue in a URL or an ARN.
pub(super) fn name_of(path: &str) -> &str {
    path.rsplit(['/', ':']).next().unwrap_or_default()
}

pub(super) fn arn(name: &str) -> String {
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

/// The MD5 digest of message attributes, as SQS defines it: sorted by name, each part with its length before
/// it.
fn md5_of_attributes(attributes: &Map<String, Value>) -> String {
    let mut bytes = Vec::new();
    for (name, value) in attributes {
        let of = |key| value.get(key).and_then(Value::as_str).unwrap_or_default();
        for text in [name, of("DataType")] {
            bytes.extend((text.len() as u32).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        // The type byte for text. The double has no binary values.
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

pub(super) fn random_id(state: &mut State) -> String {
    let n: u128 = state.rng.random();
    let hex = format!("{n:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Checks the message of a send as far as SQS does, and builds it.
pub(super) fn message(
    state: &mut State,
    queue: &str,
    entry: &Value,
) -> Result<(Message, Duration), SqsError> {
    let body = text(entry, "MessageBody")?.to_owned();
    let attributes = entry.get("MessageAttributes").and_then(Value::as_object).cloned().unwrap_or_default();
    let fits = |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..);
    if body.is_empty() {
        return Err(SqsError::missing("MessageBody"));
    }
    if !body.chars().all(fits) {
        let message = "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF";
        return Err(SqsError::new("InvalidMessageContents", "InvalidMessageContents", message));
    }
    for (name, value) in &attributes {
        let text = value.get("StringValue").and_then(Value::as_str).unwrap_or_default();
        if text.is_empty() || !text.chars().all(fits) {
            return Err(SqsError::invalid(format!(
                "Message (user) attribute '{name}' must contain a non-empty value of valid characters."
            )));
        }
    }
    if attributes.len() > 10 {
        return Err(SqsError::invalid(format!(
            "Number of message attributes [{}] exceeds the allowed maximum [10].",
            attributes.len()
        )));
    }
    let max = state.queues.get(queue).map_or(MAX_BYTES, Queue::max_bytes);
    if size(&body, &attributes) > max {
        return Err(SqsError::invalid(format!(
            "One or more parameters are invalid. Reason: Message must be shorter than {max} bytes."
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

/// The answer of SQS for a message that it accepted.
pub(super) fn send_result(message: &Message) -> Map<String, Value> {
    let mut send_result = Map::new();
    send_result.insert("MessageId".into(), message.id.clone().into());
    send_result.insert("MD5OfMessageBody".into(), md5(message.body.as_bytes()).into());
    if !message.attributes.is_empty() {
        send_result.insert("MD5OfMessageAttributes".into(), md5_of_attributes(&message.attributes).into());
    }
    send_result
}

pub(super) fn receipt_error(why: ReceiptError, receipt: &str) -> SqsError {
    match why {
        ReceiptError::Invalid => {
            let message = format!("The input receipt handle \"{receipt}\" is not a valid receipt handle.");
            SqsError::new("ReceiptHandleIsInvalid", "ReceiptHandleIsInvalid", message)
        }
        ReceiptError::NotInFlight => SqsError::new(
            "MessageNotInflight",
            "AWS.SimpleQueueService.MessageNotInflight",
            "The message referred to is not in flight.",
        ),
    }
}

pub(super) fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A message in the answer of a receive.
pub(super) fn receive_result(receipt: &str, message: &Message) -> Value {
    let mut receive_result = json!({
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
        receive_result["MessageAttributes"] = Value::Object(message.attributes.clone());
        receive_result["MD5OfMessageAttributes"] = md5_of_attributes(&message.attributes).into();
    }
    receive_result
}

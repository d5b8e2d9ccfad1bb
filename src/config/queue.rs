//! `[queue]`

use std::time::Duration;

use toml::Value;

use super::declare::Rule::{Address, AtLeast, Chooses, Is, OneOf, Seconds, Variable};
use super::error::ConfigError;
use super::read::{Section as _, Setting, section};
use super::system::{NAME_RULE, fits_as_name};
use super::values::Values;

section! {
    /// `[queue]`: where jobs wait.
    pub struct Queue in "queue" {
        /// The queue: pgmq (in the source's database) or sqs.
        kind: QueueKind = "pgmq", OneOf(&["pgmq", "sqs"]);
        /// Prefix of pgmq's queues: `NAME_live`, `NAME_bulk`, `NAME_dead`.
        name: String = "refarch", Is(fits_as_name, NAME_RULE);
        /// Visibility timeout of a received message. It is extended while a worker holds the message.
        visibility as "visibility_s": Duration = 60, Seconds(1, 43_200);
        /// Receives of a message after which each of its changes is counted as a try before its row is read. This
        /// finds a change that ends the process. (From the third receive on, changes are tried one by one. A change
        /// that fails by itself four times becomes a dead letter alone.) On SQS the redrive policy should allow at
        /// least as many receives.
        max_receives: u32 = 25, AtLeast(1);
    }
}

/// The queues that can be chosen.
#[derive(Clone, Debug)]
pub enum QueueKind {
    /// pgmq in the source's database.
    Pgmq,
    /// Amazon SQS.
    Sqs(SqsQueue),
}

section! {
    /// `[queue]` of the kind `sqs`.
    pub struct SqsQueue in "queue" of ["sqs"] {
        /// URL of the queue for live changes. `SQS_QUEUE_URL` sets it, and also chooses sqs.
        url: String = "", Address, Chooses("SQS_QUEUE_URL", "sqs"), Is(is_url, URL_RULE), Is(is_bare, BARE_RULE);
        /// URL of the queue for loads and backfills (`SQS_BULK_QUEUE_URL`). Empty: `queue.url` carries both lanes.
        bulk_url: String = "", Address, Variable("SQS_BULK_QUEUE_URL"), Is(is_bare, BARE_RULE),
            Is(is_url_if_any, URL_RULE);
        /// URL of the dead-letter queue (`SQS_DEAD_LETTER_QUEUE_URL`). Empty: the queue that the redrive policy of
        /// `queue.url` names.
        dead_url: String = "", Address, Variable("SQS_DEAD_LETTER_QUEUE_URL"), Is(is_bare, BARE_RULE),
            Is(is_url_if_any, URL_RULE);
        /// How long a receive waits for a message, 1 to 20 seconds. AWS bills each receive, also an empty one. A
        /// message that arrives while the receive waits is returned at once.
        wait as "wait_s": Duration = 20, Seconds(1, 20);
        /// With one queue for both lanes, a load waits in the outbox while the queue holds more changes than this,
        /// so that live changes get through.
        shared_bound: u64 = 10000, AtLeast(1);
    }
}

const URL_RULE: &str = "use the queue's URL, as https://sqs.REGION.amazonaws.com/ACCOUNT/NAME";
const BARE_RULE: &str =
    "use the queue's URL alone: credentials come from AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role";

/// Whether a text begins as a URL of a server does.
pub(super) fn is_url(value: &Value) -> bool {
    value.as_str().is_some_and(|url| url.starts_with("https://") || url.starts_with("http://"))
}

fn is_url_if_any(value: &Value) -> bool {
    value.as_str() == Some("") || is_url(value)
}

fn is_bare(value: &Value) -> bool {
    !value.as_str().unwrap_or_default().contains(['@', '?', '#'])
}

impl Setting for QueueKind {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        let sqs = SqsQueue::read(values)?;
        if values.text(path) == "pgmq" {
            return Ok(Self::Pgmq);
        }
        for (path, url) in [("queue.bulk_url", &sqs.bulk_url), ("queue.dead_url", &sqs.dead_url)] {
            if *url == sqs.url {
                return Err(values.refused(path, "use another queue than queue.url, or leave it empty"));
            }
        }
        Ok(Self::Sqs(sqs))
    }
}

impl Queue {
    /// Whether jobs wait in the source's database, where they commit with what is written there.
    #[must_use]
    pub fn is_pgmq(&self) -> bool {
        matches!(self.kind, QueueKind::Pgmq)
    }
}

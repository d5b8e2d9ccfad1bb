//! Makes the client (credentials and region come from the SDK's own chain) and inspects the queues before
//! use.

use std::collections::HashMap;
use std::time::Duration;

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName;
use serde_json::Value;

use super::error_policy::{failure, lacking};
use super::options::{MAX_BYTES, SqsOptions};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// The time limit for opening a connection.
const CONNECT: Duration = Duration::from_secs(3);

/// The time limit for one attempt of a call; for a receive, the wait for messages is added. The SDK sets no
/// limit of its own.
pub(super) const ATTEMPT: Duration = Duration::from_secs(10);

/// Makes a client for the region in the queue's URL. If the URL has no region (an endpoint that is not
/// Amazon's), the region comes from the environment or the profile.
pub async fn connect(options: &SqsOptions) -> Result<Client> {
    let region = region_of(&options.url);
    for url in [&options.bulk_url, &options.dead_url].into_iter().flatten() {
        if region_of(url) != region {
            return Err(Error::new(
                FailureKind::WrongSetting,
                "use the queues",
                format!("{} and {url} are in different regions: use queues of one region", options.url),
            ));
        }
    }
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(ATTEMPT).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
    if let Some(region) = region {
        loader = loader.region(Region::new(region.to_owned()));
    }
    let config = loader.load().await;
    if config.region().is_none() {
        return Err(Error::new(
            FailureKind::WrongSetting,
            "use the queues",
            format!("{} names no region: set AWS_REGION", options.url),
        ));
    }
    Ok(Client::new(&config))
}

/// Makes a client for a server that speaks the SQS protocol and accepts any credentials, such as a test
/// double.
#[must_use]
pub fn connect_to(endpoint: &str) -> Client {
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(ATTEMPT).build();
    let config = aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(aws_sdk_sqs::config::Region::new("us-east-1"))
        .credentials_provider(aws_sdk_sqs::config::Credentials::new("any", "any", None, None, "any"))
        .timeout_config(timeouts)
        .endpoint_url(endpoint)
        .build();
    Client::from_conf(config)
}

/// The region in a queue's URL: `sqs.REGION.amazonaws.com`, or the older form `REGION.queue.amazonaws.com`.
fn region_of(url: &str) -> Option<&str> {
    let host = url.split_once("://")?.1.split(['/', ':']).next()?;
    let name = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"))?;
    name.strip_prefix("sqs.").or_else(|| name.strip_suffix(".queue"))
}

/// Seconds that a queue keeps a message: the default and the maximum of SQS.
const DEFAULT_RETENTION_S: u64 = 4 * DAY_S;
const MAX_RETENTION_S: u64 = 14 * DAY_S;
const DAY_S: u64 = 86_400;

/// The result of inspecting the queues.
pub(super) struct QueueInspection {
    pub(super) dead_url: String,
    /// The most bytes of a message: in each lane's queue, and in the dead-letter queue.
    pub(super) max_bytes: [usize; 2],
    pub(super) dead_max_bytes: usize,
    /// Settings of the queues that will lose messages.
    pub(super) warnings: Vec<String>,
    /// Settings of the queues that may lose messages after a long time.
    pub(super) notes: Vec<String>,
}

/// The attributes of a queue that matter here.
struct Queue {
    url: String,
    policy: Option<RedrivePolicy>,
    retention_s: Option<u64>,
    max_bytes: usize,
}

impl Queue {
    async fn inspect(client: &Client, url: &str) -> Result<Self> {
        let attributes = attributes(client, url).await?;
        let number = |name| attributes.get(&name).and_then(|text| text.parse::<u64>().ok());
        let most = number(QueueAttributeName::MaximumMessageSize).map(|bytes| bytes as usize);
        Ok(Self {
            url: url.to_owned(),
            policy: attributes
                .get(&QueueAttributeName::RedrivePolicy)
                .map(|text| policy(text, url))
                .transpose()?,
            retention_s: number(QueueAttributeName::MessageRetentionPeriod),
            max_bytes: most.unwrap_or(MAX_BYTES).min(MAX_BYTES),
        })
    }

    /// Adds a warning if the queue keeps messages for less than `least` seconds, or a note if for less than
    /// SQS allows.
    fn check_retention(&self, least: u64, what: &str, inspection: &mut QueueInspection) {
        let Some(kept) = self.retention_s.filter(|kept| *kept < MAX_RETENTION_S) else { return };
        let to = if kept < least { &mut inspection.warnings } else { &mut inspection.notes };
        to.push(format!(
            "{} has MessageRetentionPeriod = {kept} s ({:.1} days): {what}; set it to {MAX_RETENTION_S} (14 days)",
            self.url,
            kept as f64 / DAY_S as f64,
        ));
    }
}

/// Inspects the queues. Fails if a queue cannot be used.
pub(super) async fn inspect(client: &Client, options: &SqsOptions) -> Result<QueueInspection> {
    let wrong = |message: String| Err(Error::new(FailureKind::WrongSetting, "use the queues", message));
    let mut lanes = Vec::new();
    for url in std::iter::once(&options.url).chain(&options.bulk_url) {
        // Amazon always writes this suffix in lower case.
        if url.trim_end_matches('/').rsplit('.').next() == Some("fifo") {
            return wrong(format!(
                "{url} is a FIFO queue: use a standard queue; refarch does not need the order"
            ));
        }
        lanes.push(Queue::inspect(client, url).await?);
    }
    let dead_url = match (&options.dead_url, lanes.iter().find_map(|lane| lane.policy.as_ref())) {
        (Some(url), _) => url.clone(),
        (None, Some(policy)) => url_of(client, &policy.dead_arn).await?,
        (None, None) => {
            return wrong(format!(
                "{} has no redrive policy, and no dead-letter queue is set: give the queue a redrive policy, or set SQS_DEAD_LETTER_QUEUE_URL",
                options.url
            ));
        }
    };
    let dead = Queue::inspect(client, &dead_url).await?;
    let of_lane = |at: usize| lanes.get(at).or(lanes.first()).map_or(MAX_BYTES, |lane| lane.max_bytes);
    let mut inspection = QueueInspection {
        dead_url,
        max_bytes: [of_lane(0), of_lane(1)],
        dead_max_bytes: dead.max_bytes,
        warnings: Vec::new(),
        notes: Vec::new(),
    };
    for lane in &lanes {
        inspection.warnings.extend(check_policy(lane, options));
        let what = "SQS drops a change that waits longer, for example while no embed runs";
        lane.check_retention(DEFAULT_RETENTION_S, what, &mut inspection);
        if lane.max_bytes > dead.max_bytes {
            inspection.warnings.push(format!(
                "{} has MaximumMessageSize = {}, and {} takes {} bytes: a longer dead letter is cut into several; \
                 set it to {} or more",
                dead.url, dead.max_bytes, lane.url, lane.max_bytes, lane.max_bytes
            ));
        }
    }
    let longest = lanes.iter().filter_map(|lane| lane.retention_s).max().unwrap_or_default();
    let what = "SQS drops a dead letter that is not redriven in this time; if SQS itself moved the message here, \
                the time counts from when the message was first sent";
    dead.check_retention(longest.max(DEFAULT_RETENTION_S), what, &mut inspection);
    Ok(inspection)
}

/// A warning if the redrive policy gives a message up before refarch does, or never.
fn check_policy(lane: &Queue, options: &SqsOptions) -> Option<String> {
    let (url, ours) = (&lane.url, options.max_receives);
    match &lane.policy {
        None => Some(format!(
            "{url} has no redrive policy: a message that no version of refarch can read is received again and again until it expires; \
             set one with maxReceiveCount {ours} or more"
        )),
        Some(policy) if policy.max_receives < u64::from(ours) => Some(format!(
            "the redrive policy of {url} gives a message up after {} receives, before refarch does \
             (queue.max_receives = {ours}): changes may become dead letters without a reason; \
             set maxReceiveCount to {ours} or more",
            policy.max_receives
        )),
        Some(_) => None,
    }
}

async fn attributes(client: &Client, url: &str) -> Result<HashMap<QueueAttributeName, String>> {
    let names = [
        QueueAttributeName::QueueArn,
        QueueAttributeName::RedrivePolicy,
        QueueAttributeName::MessageRetentionPeriod,
        QueueAttributeName::MaximumMessageSize,
    ];
    let answer = client
        .get_queue_attributes()
        .queue_url(url)
        .set_attribute_names(Some(names.to_vec()))
        .send()
        .await
        .map_err(|error| failure("look at the queue", url, error))?;
    Ok(answer.attributes.unwrap_or_default())
}

/// The ARN of a queue, by which other calls name the queue.
pub(super) async fn arn(client: &Client, url: &str) -> Result<String> {
    attributes(client, url)
        .await?
        .remove(&QueueAttributeName::QueueArn)
        .ok_or_else(|| lacking("look at the queue", "QueueArn"))
}

struct RedrivePolicy {
    dead_arn: String,
    max_receives: u64,
}

fn policy(text: &str, url: &str) -> Result<RedrivePolicy> {
    let value: Value = serde_json::from_str(text).unwrap_or_default();
    // The value is a number or a text, as whoever set the policy wrote it.
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
    let read = || {
        Some(RedrivePolicy {
            dead_arn: value.get("deadLetterTargetArn")?.as_str()?.to_owned(),
            max_receives: number(value.get("maxReceiveCount")?)?,
        })
    };
    read().ok_or_else(|| {
        Error::new(
            FailureKind::WrongSetting,
            "use the queues",
            format!(
                "{url} has the redrive policy {text:?}, which lacks deadLetterTargetArn or maxReceiveCount"
            ),
        )
    })
}

/// The URL of the queue with this ARN (`arn:aws:sqs:REGION:ACCOUNT:NAME`).
async fn url_of(client: &Client, arn: &str) -> Result<String> {
    let mut parts = arn.rsplit(':');
    let (name, account) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    client
        .get_queue_url()
        .queue_name(name)
        .queue_owner_aws_account_id(account)
        .send()
        .await
        .map_err(|error| failure("find the dead-letter queue", arn, error))?
        .queue_url
        .ok_or_else(|| lacking("find the dead-letter queue", "QueueUrl"))
}

/// What the queues' own settings will lose: warnings, and notes on what they may lose after a long time.
pub async fn configuration_warnings(
    client: &Client,
    options: &SqsOptions,
) -> Result<(Vec<String>, Vec<String>)> {
    let inspection = inspect(client, options).await?;
    Ok((inspection.warnings, inspection.notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_region_is_read_from_amazons_urls_only() {
        let of = |url| region_of(url);
        assert_eq!(of("https://sqs.eu-west-1.amazonaws.com/123456789012/jobs"), Some("eu-west-1"));
        assert_eq!(of("https://sqs.cn-north-1.amazonaws.com.cn/1/jobs"), Some("cn-north-1"));
        assert_eq!(of("https://us-east-2.queue.amazonaws.com/1/jobs"), Some("us-east-2"));
        assert_eq!(of("http://127.0.0.1:5555/123456789012/jobs"), None);
        assert_eq!(of("jobs"), None);
    }

    #[test]
    fn a_redrive_policy_is_read_with_either_kind_of_number() {
        for count in ["7", "\"7\""] {
            let text =
                format!(r#"{{"deadLetterTargetArn":"arn:aws:sqs:r:1:dead","maxReceiveCount":{count}}}"#);
            assert_eq!(policy(&text, "u").unwrap().max_receives, 7);
        }
        assert!(policy("{}", "u").is_err());
    }
}

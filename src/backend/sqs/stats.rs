//! How full the queues are. SQS counts messages, so backlogs in changes are estimates: the number of messages
//! times the average number of changes in recent messages.

use async_trait::async_trait;
use aws_sdk_sqs::types::QueueAttributeName;
use jiff::Timestamp;

use super::density::MessageDensity;
use super::error_policy::failure;
use super::queue::Sqs;
use crate::pipeline::change::Lane;
use crate::pipeline::failure::Result;
use crate::pipeline::queue::{Backlog, QueueStats};

/// Messages in a queue, as SQS counts them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Messages {
    visible: u64,
    in_flight: u64,
}

impl Messages {
    pub(super) fn total(self) -> u64 {
        self.visible + self.in_flight
    }
}

impl Sqs {
    /// The recent density: as this process saw it, or else as the relay recorded it.
    async fn recent_density(&self, lanes: &[Lane]) -> Result<MessageDensity> {
        let mut sum = MessageDensity::default();
        for lane in lanes {
            sum.add(self.density()[*lane as usize]);
        }
        if sum.messages > 0 {
            return Ok(sum);
        }
        let names: Vec<&str> = lanes.iter().map(|lane| lane.name()).collect();
        let client = self.postgres.client().await?;
        let row = client
            .query_one(
                "SELECT coalesce(sum(messages), 0)::bigint, coalesce(sum(changes), 0)::bigint \
                 FROM refarch.packing WHERE source = $1 AND lane = ANY ($2)",
                &[&self.options.source, &names],
            )
            .await
            .map_err(|error| {
                crate::backend::postgres::failure("read how many changes a message holds", error)
            })?;
        let number = |at| row.get::<_, i64>(at).max(0) as u64;
        Ok(MessageDensity { messages: number(0), changes: number(1) })
    }

    /// Counts the messages of a queue.
    pub(super) async fn count_messages(&self, url: &str) -> Result<Messages> {
        use QueueAttributeName as Name;
        let names = [
            Name::ApproximateNumberOfMessages,
            Name::ApproximateNumberOfMessagesDelayed,
            Name::ApproximateNumberOfMessagesNotVisible,
        ];
        let answer = self
            .client
            .get_queue_attributes()
            .queue_url(url)
            .set_attribute_names(Some(names.to_vec()))
            .send()
            .await
            .map_err(|error| failure("count the queue", url, error))?;
        let number = |name| -> u64 {
            answer
                .attributes()
                .and_then(|all| all.get(&name))
                .and_then(|n| n.parse().ok())
                .unwrap_or_default()
        };
        let [visible, delayed, in_flight] = names;
        Ok(Messages { visible: number(visible) + number(delayed), in_flight: number(in_flight) })
    }
}

#[async_trait]
impl QueueStats for Sqs {
    async fn backlog(&self, lane: Lane) -> Result<Backlog> {
        if self.options.bulk_url.is_some() {
            let counted = self.count_messages(self.url(lane)).await?;
            let recent_density = self.recent_density(&[lane]).await?;
            return Ok(Backlog::estimated(
                recent_density.estimate(counted.visible),
                recent_density.estimate(counted.in_flight),
            ));
        }
        // SQS cannot count the lanes of a shared queue separately. Changes up to the bound of the bulk lane
        // are counted as bulk, so that a load does not make the live backlog look too large.
        let counted = self.count_messages(&self.options.url).await?;
        let recent_density = self.recent_density(&Lane::ALL).await?;
        let (visible, in_flight) =
            (recent_density.estimate(counted.visible), recent_density.estimate(counted.in_flight));
        let bound = self.options.shared_bound;
        let bulk = Backlog::estimated(visible.min(bound - in_flight.min(bound)), in_flight.min(bound));
        Ok(match lane {
            Lane::Bulk => bulk,
            Lane::Live => Backlog::estimated(visible - bulk.visible, in_flight - bulk.in_flight),
        })
    }

    async fn oldest(&self) -> Result<Option<Timestamp>> {
        for receiver in &self.receivers {
            let counted = self.count_messages(&receiver.url).await?;
            if counted.total() > 0 {
                // SQS does not report the oldest message.
                return Ok(Some(Timestamp::UNIX_EPOCH));
            }
        }
        Ok(None)
    }

    fn shared_bound(&self) -> Option<u64> {
        self.options.bulk_url.is_none().then_some(self.options.shared_bound)
    }
}

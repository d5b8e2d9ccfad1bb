//! Opens the queue that the settings choose.

use std::sync::Arc;

use super::pgmq::Pgmq;
use super::postgres::Postgres;
use super::sqs::{self, Sqs};
use crate::config::{QueueKind, Settings, SqsQueue};
use crate::pipeline::failure::Result;
use crate::pipeline::queue::Queue;

pub(super) async fn open_queue(postgres: &Postgres, settings: &Settings) -> Result<Queue> {
    let set = &settings.queue;
    Ok(match &set.kind {
        QueueKind::Pgmq => Queue::new(Arc::new(Pgmq::new(postgres.clone(), &set.name, set.visibility))),
        QueueKind::Sqs(queue) => {
            let options = sqs_options(settings, queue);
            let client = sqs::connect(&options).await?;
            Queue::new(Arc::new(Sqs::open(client, postgres.clone(), options).await?))
        }
    })
}

/// The settings of the queue on SQS.
#[must_use]
pub fn sqs_options(settings: &Settings, queue: &SqsQueue) -> sqs::SqsOptions {
    let named = |url: &str| (!url.is_empty()).then(|| url.to_owned());
    sqs::SqsOptions {
        url: queue.url.clone(),
        bulk_url: named(&queue.bulk_url),
        dead_url: named(&queue.dead_url),
        visibility: settings.queue.visibility,
        wait: queue.wait,
        shared_bound: queue.shared_bound,
        max_receives: settings.queue.max_receives,
        source: settings.source.name.clone(),
    }
}

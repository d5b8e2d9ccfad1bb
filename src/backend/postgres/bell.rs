//! Wake-ups by LISTEN: a connection of its own that rings whoever waits.
//!
//! A ring only wakes; the waiter looks for work itself, and a poll stands behind every wait. So a
//! lost connection costs latency, never a change.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use tokio::sync::watch;
use tokio_postgres::AsyncMessage;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Postgres;

/// Pause before the listening connection is made again.
const RECONNECT: Duration = Duration::from_secs(1);

/// Listens on one channel for as long as it lives.
pub struct Bell {
    rings: watch::Receiver<u64>,
    _stop: DropGuard,
}

/// One waiter's view of a bell.
#[derive(Clone)]
pub struct Waiter(watch::Receiver<u64>);

impl Bell {
    /// Starts to listen in the background. `channel` must be a plain lower-case name.
    #[must_use]
    pub fn listen(postgres: Postgres, channel: &'static str) -> Self {
        let (ring, rings) = watch::channel(0);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            stopped.run_until_cancelled(run(postgres, channel, ring)).await;
        });
        Self { rings, _stop: stop.drop_guard() }
    }

    /// A waiter that has heard every ring so far.
    #[must_use]
    pub fn waiter(&self) -> Waiter {
        let mut rings = self.rings.clone();
        rings.mark_unchanged();
        Waiter(rings)
    }
}

impl Waiter {
    /// Forgets the rings so far: call before looking for work, so that a ring in between is heard.
    pub fn arm(&mut self) {
        self.0.mark_unchanged();
    }

    /// Returns at the next ring since [`Self::arm`], or after `timeout`.
    pub async fn wait(&mut self, timeout: Duration) {
        if let Ok(Err(_)) = tokio::time::timeout(timeout, self.0.changed()).await {
            // The listening task is gone, at the end of the process: leave it to the poll.
            tokio::time::sleep(timeout).await;
        }
    }
}

async fn run(postgres: Postgres, channel: &'static str, ring: watch::Sender<u64>) {
    let mut warned = false;
    loop {
        match hear(&postgres, channel, &ring).await {
            Ok(()) => tracing::debug!(channel, "listening connection closed"),
            Err(error) if warned => tracing::debug!(channel, %error, "cannot listen"),
            Err(error) => {
                tracing::warn!(channel, %error, "cannot listen for wake-ups; polling until it works again");
                warned = true;
            }
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn hear(
    postgres: &Postgres,
    channel: &str,
    ring: &watch::Sender<u64>,
) -> Result<(), tokio_postgres::Error> {
    let (client, mut connection) = postgres.dedicated().await?;
    let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
    let listen = async {
        client.batch_execute(&format!("LISTEN {channel}")).await?;
        // Whatever was sent before LISTEN took hold would be missed.
        ring.send_modify(|count| *count += 1);
        std::future::pending::<Result<(), tokio_postgres::Error>>().await
    };
    let pump = async {
        while let Some(message) = messages.next().await {
            if let AsyncMessage::Notification(_) = message? {
                ring.send_modify(|count| *count += 1);
            }
        }
        Ok(())
    };
    tokio::select! {
        result = listen => result,
        result = pump => result,
    }
}

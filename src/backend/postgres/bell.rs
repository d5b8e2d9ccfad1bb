//! Wake-ups by LISTEN: a connection of its own that rings whoever waits.
//!
//! A ring only wakes; the waiter looks for work itself, and a poll stands behind every wait. So a
//! lost connection costs latency, never a change.
//!
//! A pooler that gives each transaction another session lets a LISTEN succeed and then hears nothing. So
//! after it we ring ourselves through another connection, and take silence for such a pooler: there is
//! nothing in the protocol that would tell.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use tokio::sync::watch;
use tokio_postgres::AsyncMessage;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Postgres;

/// Pause before the listening connection is made again.
const RECONNECT: Duration = Duration::from_secs(1);

/// How long our own ring may take to be heard.
const HEARD_WITHIN: Duration = Duration::from_secs(5);

/// Pause before it is looked again whether wake-ups come, after they did not.
const DEAF: Duration = Duration::from_mins(1);

/// Why a listening connection ended.
enum Ended {
    /// It was closed.
    Closed,
    /// It heard nothing.
    Deaf,
}

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
    let mut warn = |error: Option<crate::pipeline::failure::Error>| {
        let reason = error.map_or_else(
            || "nothing that is sent is heard, as behind a pooler in transaction mode; give database.url the server itself".to_owned(),
            |error| error.to_string(),
        );
        if warned {
            tracing::debug!(channel, reason, "cannot listen");
        } else {
            tracing::warn!(channel, reason, "cannot listen for wake-ups; polling until it works again");
        }
        warned = true;
    };
    loop {
        let pause = match hear(&postgres, channel, &ring).await {
            Ok(Ended::Closed) => {
                tracing::debug!(channel, "listening connection closed");
                RECONNECT
            }
            Ok(Ended::Deaf) => {
                warn(None);
                DEAF
            }
            Err(error) => {
                warn(Some(super::failure("listen", error)));
                RECONNECT
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn hear(
    postgres: &Postgres,
    channel: &str,
    ring: &watch::Sender<u64>,
) -> Result<Ended, tokio_postgres::Error> {
    let (client, mut connection) = postgres.dedicated().await?;
    let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
    let heard = watch::channel(false).0;
    let listen = async {
        client.batch_execute(&format!("LISTEN {channel}")).await?;
        // Whatever was sent before LISTEN took hold would be missed.
        ring.send_modify(|count| *count += 1);
        postgres.ring(channel).await;
        let mut heard = heard.subscribe();
        let is_heard = tokio::time::timeout(HEARD_WITHIN, heard.wait_for(|heard| *heard)).await.is_ok();
        if is_heard { std::future::pending().await } else { Ok(Ended::Deaf) }
    };
    let pump = async {
        while let Some(message) = messages.next().await {
            if let AsyncMessage::Notification(_) = message? {
                heard.send_replace(true);
                ring.send_modify(|count| *count += 1);
            }
        }
        Ok(Ended::Closed)
    };
    tokio::select! {
        result = listen => result,
        result = pump => result,
    }
}

impl Postgres {
    /// Rings on a channel. Plainly, as any pooler lets it through.
    async fn ring(&self, channel: &str) {
        let rung = async {
            let client = self.client().await?;
            let sql = format!("NOTIFY {channel}");
            client.batch_execute(&sql).await.map_err(|error| super::failure("ring", error))
        };
        if let Err(error) = rung.await {
            tracing::debug!(channel, %error, "cannot ring");
        }
    }

    /// Whether a connection of ours is a session of its own: what it sets, locks and listens to is its.
    pub async fn has_sessions(&self) -> crate::pipeline::failure::Result<bool> {
        let fail = |error: tokio_postgres::Error| super::failure("look for a pooler", error);
        // Of this process alone, so that nobody else's ring is taken for it.
        let channel = format!("refarch_probe_{}_{:08x}", std::process::id(), rand::random::<u32>());
        let (client, mut connection) = self.dedicated().await.map_err(fail)?;
        let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
        let ring = async {
            client.batch_execute(&format!("LISTEN {channel}")).await.map_err(fail)?;
            self.ring(&channel).await;
            tokio::time::sleep(HEARD_WITHIN).await;
            Ok(false)
        };
        let pump = async {
            while let Some(message) = messages.next().await {
                if let AsyncMessage::Notification(_) = message.map_err(fail)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        tokio::select! {
            result = ring => result,
            result = pump => result,
        }
    }
}

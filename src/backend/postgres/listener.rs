//! Wake-ups by LISTEN and NOTIFY, over a separate connection.
//!
//! A notification only wakes: the waiter looks for work itself, and every wait ends with a poll. So a lost
//! connection costs latency, never a change.
//!
//! Behind a pooler in transaction mode a LISTEN succeeds, and no notification arrives. The protocol does not
//! show such a pooler. So after LISTEN the listener sends a notification to itself through another
//! connection. If the notification does not arrive, the listener assumes such a pooler.

use std::time::Duration;

use futures::StreamExt;
use futures::stream;
use tokio::sync::watch;
use tokio_postgres::AsyncMessage;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Postgres;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::Result;
use crate::pipeline::retry::Backoff;

/// How long our own notification may take to arrive.
const NOTIFICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause before the next LISTEN if there seems to be a pooler in transaction mode. Only another address
/// helps, so an earlier attempt would be useless.
const POOLER_PAUSE: Duration = Duration::from_mins(1);

/// Why a listening connection ended.
enum Ended {
    /// The server or the network closed it.
    Closed,
    /// The listener's own notification did not arrive.
    HeardNothing,
}

/// Listens on one channel for as long as it lives.
pub struct Listener {
    notified: watch::Receiver<u64>,
    _stop: DropGuard,
}

/// Wakes one waiter when the listener is notified.
#[derive(Clone)]
pub struct WakeUp(watch::Receiver<u64>);

impl Listener {
    /// Starts to listen in the background. `channel` must be a plain lower-case name.
    #[must_use]
    pub fn start(postgres: Postgres, channel: &'static str) -> Self {
        let (notify, notified) = watch::channel(0);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            stopped.run_until_cancelled(listen_for_notifications(postgres, channel, notify)).await;
        });
        Self { notified, _stop: stop.drop_guard() }
    }

    /// An armed wake-up for one waiter.
    #[must_use]
    pub fn wake_up(&self) -> WakeUp {
        let mut wake_up = WakeUp(self.notified.clone());
        wake_up.arm();
        wake_up
    }
}

impl WakeUp {
    /// Forgets the notifications so far. Call this before looking for work, so that a later notification
    /// wakes.
    pub fn arm(&mut self) {
        self.0.mark_unchanged();
    }

    /// Returns at the next notification since [`Self::arm`], or after `timeout`.
    pub async fn wait(&mut self, timeout: Duration) {
        if let Ok(Err(_)) = tokio::time::timeout(timeout, self.0.changed()).await {
            // The listening task has ended, since the process ends. The poll remains.
            tokio::time::sleep(timeout).await;
        }
    }
}

/// Listens for as long as the future is polled, and connects again after a failure. The pauses grow until a
/// notification arrives.
async fn listen_for_notifications(postgres: Postgres, channel: &'static str, notify: watch::Sender<u64>) {
    let mut backoff = Backoff::default();
    let mut warned = false;
    let mut warn = |reason: &str| {
        if warned {
            tracing::debug!(channel, reason, "cannot listen");
        } else {
            tracing::warn!(channel, reason, "cannot listen for wake-ups; polling until it works again");
        }
        warned = true;
    };
    loop {
        let pause = match listen(&postgres, channel, &notify, &mut backoff).await {
            Ok(Ended::Closed) => {
                tracing::debug!(channel, reason = "the connection was closed", "cannot listen");
                backoff.next(&BootClock)
            }
            Ok(Ended::HeardNothing) => {
                warn(
                    "no notification arrives, as behind a pooler in transaction mode; set database.url to the address of the server itself",
                );
                POOLER_PAUSE
            }
            // This process has closed the database, and may have stopped its private server.
            Err(_) if postgres.pool.is_closed() => return,
            Err(error) => {
                let error = super::failure("listen", error);
                warn(&error.to_string());
                backoff.next(&BootClock)
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Listens over one connection until it ends.
async fn listen(
    postgres: &Postgres,
    channel: &str,
    notify: &watch::Sender<u64>,
    backoff: &mut Backoff,
) -> Result<Ended, tokio_postgres::Error> {
    let (client, mut connection) = postgres.dedicated().await?;
    let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
    let delivered = watch::channel(false).0;
    let listen = async {
        client.batch_execute(&format!("LISTEN {channel}")).await?;
        // Wakes once, since a notification before LISTEN does not arrive.
        notify.send_modify(|count| *count += 1);
        postgres.notify(channel).await;
        let mut delivered = delivered.subscribe();
        let is_delivered =
            tokio::time::timeout(NOTIFICATION_TIMEOUT, delivered.wait_for(|delivered| *delivered))
                .await
                .is_ok();
        if !is_delivered {
            return Ok(Ended::HeardNothing);
        }
        // Notifications arrive, so after this connection ends the next one is made soon.
        backoff.reset();
        std::future::pending().await
    };
    let pump = async {
        while let Some(message) = messages.next().await {
            if let AsyncMessage::Notification(_) = message? {
                delivered.send_replace(true);
                notify.send_modify(|count| *count += 1);
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
    /// Sends a notification, in a simple query, which every pooler passes on.
    async fn notify(&self, channel: &str) {
        let sent = async {
            let client = self.client().await?;
            let sql = format!("NOTIFY {channel}");
            client.batch_execute(&sql).await.map_err(|error| super::failure("notify", error))
        };
        if let Err(error) = sent.await {
            tracing::debug!(channel, %error, "cannot notify");
        }
    }

    /// Whether a connection of ours keeps its session, with its settings, locks and LISTEN. False behind a
    /// pooler in transaction mode.
    pub async fn supports_sessions(&self) -> Result<bool> {
        let fail = |error: tokio_postgres::Error| super::failure("look for a pooler", error);
        // A channel that no other process uses, so that only our own notification arrives.
        let channel = format!("refarch_probe_{}_{:08x}", std::process::id(), rand::random::<u32>());
        let (client, mut connection) = self.dedicated().await.map_err(fail)?;
        let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
        let notify = async {
            client.batch_execute(&format!("LISTEN {channel}")).await.map_err(fail)?;
            self.notify(&channel).await;
            tokio::time::sleep(NOTIFICATION_TIMEOUT).await;
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
            result = notify => result,
            result = pump => result,
        }
    }
}

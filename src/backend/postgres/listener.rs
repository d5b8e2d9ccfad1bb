//! Wake-ups by LISTEN and NOTIFY, over a connection of their own.
//!
//! A notification only wakes: a waiter looks for work itself, and a poll stands behind every wait. So a
//! lost connection costs latency, never a change.
//!
//! A pooler that gives each transaction another session lets a LISTEN succeed, and then nothing is heard.
//! Nothing in the protocol tells of such a pooler. So after LISTEN the listener sends a notification to
//! itself through another connection, and takes silence for such a pooler.

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

/// How long a notification of our own may take to be heard.
const NOTIFICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause before LISTEN is tried again behind what seems to be a pooler in transaction mode. Only another
/// address mends that, so trying soon would be in vain.
const POOLER_PAUSE: Duration = Duration::from_mins(1);

/// Why a listening connection ended.
enum Ended {
    /// The server or the network closed it.
    Closed,
    /// It did not hear the listener's own notification.
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

    /// A wake-up for one waiter, which is armed.
    #[must_use]
    pub fn wake_up(&self) -> WakeUp {
        let mut wake_up = WakeUp(self.notified.clone());
        wake_up.arm();
        wake_up
    }
}

impl WakeUp {
    /// Forgets the notifications so far: call before looking for work, so that one in between is heard.
    pub fn arm(&mut self) {
        self.0.mark_unchanged();
    }

    /// Returns at the next notification since [`Self::arm`], or after `timeout`.
    pub async fn wait(&mut self, timeout: Duration) {
        if let Ok(Err(_)) = tokio::time::timeout(timeout, self.0.changed()).await {
            // The listening task is gone, at the end of the process: leave it to the poll.
            tokio::time::sleep(timeout).await;
        }
    }
}

/// Keeps a listening connection for as long as it is polled. Pauses between connections grow while none
/// hears anything.
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
                    "nothing that is sent is heard, as behind a pooler in transaction mode; give database.url the server itself",
                );
                POOLER_PAUSE
            }
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
        // What was sent before LISTEN took hold would be missed.
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
        // However this connection ends, the next one is made soon.
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
    /// Sends a notification. In the plainest way, as any pooler lets that through.
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

    /// Whether a connection of ours is a session of its own, so that what it sets, locks and listens to
    /// stays with it: false behind a pooler in transaction mode.
    pub async fn supports_sessions(&self) -> Result<bool> {
        let fail = |error: tokio_postgres::Error| super::failure("look for a pooler", error);
        // A channel of this process alone, so that a notification by another one is not taken for ours.
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

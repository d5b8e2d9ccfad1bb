//! The database in use: the configured one, or the private cluster.

use std::time::Instant;

use super::embedded::{self, Cluster};
use super::postgres::Postgres;
use crate::config::Settings;
use crate::pipeline::clock::BootClock;
use crate::pipeline::failure::{Class, Error, Result};
use crate::pipeline::retry::Backoff;

/// The database in use, and the private cluster if the settings name no database.
pub struct Database {
    /// The connections.
    pub postgres: Postgres,
    cluster: Option<Cluster>,
}

impl Database {
    /// Connects to the configured database. Without one, joins the private cluster and starts it if needed.
    pub async fn open(settings: &Settings) -> anyhow::Result<Self> {
        let (url, cluster) = embedded::database_url(settings).await?;
        let opened = async {
            let postgres = Postgres::new(&url, &settings.database)?;
            with_connect_retry(settings, async || postgres.check().await).await?;
            Ok(postgres)
        };
        match opened.await {
            Ok(postgres) => Ok(Self { postgres, cluster }),
            Err(error) => {
                if let Some(cluster) = cluster {
                    cluster.leave().await?;
                }
                Err(error)
            }
        }
    }

    /// Whether this is the private cluster, which is set up without a request.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.cluster.is_some()
    }

    /// Closes the connections. The last process that leaves the private cluster stops it.
    pub async fn close(self) -> anyhow::Result<()> {
        self.postgres.pool.close();
        match self.cluster {
            Some(cluster) => cluster.leave().await,
            None => Ok(()),
        }
    }
}

/// Repeats the work on retryable errors for at most `database.connect_timeout_s`: a database that restarts is
/// soon back.
pub async fn with_connect_retry<T>(settings: &Settings, work: impl AsyncFn() -> Result<T>) -> Result<T> {
    retry(settings, |error| error.class() == Class::Retryable, work).await
}

/// Like [`with_connect_retry`], for the start of a role: also waits for what may be missing only just now, since
/// the database is being restored or migrated.
pub async fn with_start_retry<T>(settings: &Settings, work: impl AsyncFn() -> Result<T>) -> Result<T> {
    retry(settings, |error| error.class() == Class::Retryable || error.may_pass(), work).await
}

async fn retry<T>(
    settings: &Settings,
    is_waited_for: impl Fn(&Error) -> bool,
    work: impl AsyncFn() -> Result<T>,
) -> Result<T> {
    let started = Instant::now();
    let timeout = settings.database.connect_timeout;
    let mut backoff = Backoff::default();
    let mut is_told = false;
    loop {
        match work().await {
            Err(error) if is_waited_for(&error) && started.elapsed() < timeout => {
                // Somebody may have to do something about it.
                if error.class() == Class::Fatal && !std::mem::replace(&mut is_told, true) {
                    tracing::warn!(%error, timeout_s = timeout.as_secs(), "cannot start yet: trying again for a while");
                }
                let left = timeout.saturating_sub(started.elapsed());
                tokio::time::sleep(backoff.next(&BootClock).min(left)).await;
            }
            result => return result,
        }
    }
}

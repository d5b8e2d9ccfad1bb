//! The private PostgreSQL that refarch uses when no database is configured.
//!
//! Any number of processes share one cluster. The first process initialises and starts it. The last process
//! to leave stops it. Each process holds a shared lock on one file while it uses the cluster. Starting and
//! stopping happen under an exclusive lock on another file. The operating system releases both locks of a
//! killed process. So if all processes were killed, the next process to join finds the server running, and
//! stops it on leaving.

pub(super) mod digest;
mod layout;
mod log;
mod memory;
mod no_follow;
mod options;
mod postgresql_conf;
mod server;
mod server_user;
mod shared_folder;
mod users;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Settings;
use crate::pipeline::failure::chain;
use crate::secret::Secret;
use layout::ClusterLayout;
use server::{NAME, Server};
use users::{Membership, Transition};

pub use options::ClusterOptions;

/// Time between two checks of the size of the server's log.
const LOG_CHECK: Duration = Duration::from_mins(1);

/// Connection data of a cluster over loopback, for a client such as psql.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Database.
    pub dbname: String,
    /// The role's password.
    pub password: Secret,
}

/// A private cluster in use by this process. Call [`Cluster::leave`] at the end. A drop leaves the cluster
/// too, but blocks the thread and can only log an error.
#[derive(Debug)]
pub struct Cluster {
    url: Secret,
    tcp: Tcp,
    layout: ClusterLayout,
    _log_keeper: AbortOnDropHandle<()>,
    membership: Membership,
}

impl Cluster {
    /// Joins the cluster. Initialises and starts it if necessary.
    ///
    /// Safe to cancel: if the caller drops the future, the join continues in the background and then leaves.
    pub async fn join(options: ClusterOptions) -> anyhow::Result<Self> {
        tokio::spawn(Self::join_to_the_end(options)).await.context("joining the private PostgreSQL")?
    }

    async fn join_to_the_end(options: ClusterOptions) -> anyhow::Result<Self> {
        if !["postgres", "initdb", "pg_ctl"].iter().all(|name| options.binary(name).is_file()) {
            anyhow::bail!(
                "there are no PostgreSQL binaries in {}: run refarch setup, or set DATABASE_URL to use your own database",
                options.install.display()
            );
        }
        let dir = options.dir.display().to_string();
        // Values are dropped in reverse order. On an error the transition must end before the membership,
        // because the end of a membership needs a transition of its own.
        let (membership, _transition, layout) = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&options.dir)
                .with_context(|| format!("cannot create {}", options.dir.display()))?;
            let transition = Transition::begin(&options.dir)?;
            let layout = ClusterLayout::find(&options)?;
            let membership = Membership::enter(&options.dir, layout.clone(), &transition)?;
            anyhow::Ok((membership, transition, layout))
        })
        .await?
        .with_context(|| format!("cannot use the private PostgreSQL in {dir}"))?;
        let server = Server::new(layout.clone());
        let endpoint = server
            .ensure_ready()
            .await
            .with_context(|| format!("cannot start the private PostgreSQL in {dir}"))?;
        let password = layout.password()?;
        let url = endpoint.url(NAME, &password);
        Ok(Self {
            tcp: Tcp {
                host: "127.0.0.1".into(),
                port: endpoint.port,
                user: NAME.into(),
                dbname: NAME.into(),
                password,
            },
            url,
            _log_keeper: keep_log_short(&layout),
            layout,
            membership,
        })
    }

    /// Connection string for tokio-postgres, over the Unix socket.
    #[must_use]
    pub fn url(&self) -> &Secret {
        &self.url
    }

    /// Connection data for other clients.
    #[must_use]
    pub fn tcp(&self) -> &Tcp {
        &self.tcp
    }

    /// The server's data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.layout.data()
    }

    /// Stops the server, with `crash` without a clean shutdown, and starts it again at the same address.
    pub async fn restart(&self, crash: bool) -> anyhow::Result<()> {
        self.while_stopped(crash, |_| Ok(())).await
    }

    /// Stops the server, calls `work` with its data directory, and starts it again.
    pub async fn while_stopped(
        &self,
        crash: bool,
        work: impl FnOnce(&Path) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let layout = self.layout.clone();
        let dir = self.membership.dir().to_owned();
        // The transition stays open, so that no other process starts the server meanwhile.
        let transition = tokio::task::spawn_blocking(move || {
            let transition = Transition::begin(&dir)?;
            let server = Server::new(layout.clone());
            let stopped = if crash { server.crash() } else { server.stop() };
            stopped?;
            work(&layout.data())?;
            anyhow::Ok(transition)
        })
        .await??;
        let endpoint = Server::new(self.layout.clone()).ensure_ready().await?;
        drop(transition);
        let url = endpoint.url(NAME, &self.layout.password()?);
        anyhow::ensure!(url == self.url, "the private PostgreSQL has another address after its restart");
        Ok(())
    }

    /// Leaves the cluster. If no other process uses it, removes all its files.
    pub async fn destroy(self) -> anyhow::Result<()> {
        let (layout, dir) = (self.layout.clone(), self.membership.dir().to_owned());
        self.leave().await?;
        if layout.data().join("postmaster.pid").exists() {
            return Ok(());
        }
        for path in [layout.home, dir] {
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Leaves the cluster. The last process to leave stops the server.
    pub async fn leave(mut self) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || self.membership.end()).await?
    }
}

/// The URL of the configured database. Without one, joins the private cluster: the caller must leave it.
pub async fn database_url(settings: &Settings) -> anyhow::Result<(Secret, Option<Cluster>)> {
    if !settings.database.url.is_empty() {
        return Ok((settings.database.url.clone(), None));
    }
    let cluster = Cluster::join(ClusterOptions::in_runtime_dir(&settings.runtime.dir)).await?;
    Ok((cluster.url().clone(), Some(cluster)))
}

fn keep_log_short(layout: &ClusterLayout) -> AbortOnDropHandle<()> {
    let layout = layout.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOG_CHECK).await;
            let layout = layout.clone();
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || layout.shorten_log()).await {
                tracing::warn!(error = chain(error.as_ref()), "cannot shorten the private PostgreSQL's log");
            }
        }
    }))
}

//! The private PostgreSQL that refarch uses when no database is configured.
//!
//! Any number of processes share one cluster. Whoever comes first initialises and starts it; the
//! last one to leave stops it. Each process holds a shared lock on a file while it uses the
//! cluster, and starting and stopping happen under an exclusive lock on another, so both locks
//! vanish with a killed process: a server whose users were all killed is found by whoever joins
//! next, and stopped when that one leaves.

mod conf;
mod guarded;
mod log;
mod place;
mod server;
mod users;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Settings;
use crate::secret::Secret;
use place::Place;
use server::Server;
use users::{Membership, Transition};

/// The superuser and the database of a private cluster.
const NAME: &str = "refarch";

/// How often a process looks whether the server's log has grown too long.
const LOG_CHECK: Duration = Duration::from_mins(1);

/// Where a cluster is, and where its binaries are.
#[derive(Clone, Debug)]
pub struct Options {
    /// A PostgreSQL installation: the folder that holds `bin`, `lib` and `share`.
    pub install: PathBuf,
    /// The cluster's folder.
    pub dir: PathBuf,
    /// Further server settings, for whoever starts the server; they win over ours.
    pub extra: Vec<(String, String)>,
}

impl Options {
    /// The cluster and the binaries under a runtime folder, as `scripts/setup` lays them out.
    #[must_use]
    pub fn in_runtime_dir(dir: &Path) -> Self {
        Self { install: dir.join("runtime/postgres"), dir: dir.join("postgres"), extra: Vec::new() }
    }

    fn binary(&self, name: &str) -> PathBuf {
        self.install.join("bin").join(name)
    }
}

/// How a client such as psql reaches a cluster over loopback.
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

/// A private cluster that this process uses. [`Cluster::leave`] it when done; dropping it leaves
/// too, but blocks the thread and can only log what goes wrong.
#[derive(Debug)]
pub struct Cluster {
    url: Secret,
    tcp: Tcp,
    place: Place,
    _log_keeper: AbortOnDropHandle<()>,
    membership: Membership,
}

impl Cluster {
    /// Joins the cluster, initialising and starting it if need be.
    ///
    /// A caller that stops waiting leaves nothing behind: joining then goes on, and ends in leaving.
    pub async fn join(options: Options) -> anyhow::Result<Self> {
        tokio::spawn(Self::join_to_the_end(options)).await.context("joining the private PostgreSQL")?
    }

    async fn join_to_the_end(options: Options) -> anyhow::Result<Self> {
        if !["postgres", "initdb", "pg_ctl"].iter().all(|name| options.binary(name).is_file()) {
            anyhow::bail!(
                "there are no PostgreSQL binaries in {}: run scripts/setup, or set DATABASE_URL to use a database of your own",
                options.install.display()
            );
        }
        let dir = options.dir.display().to_string();
        // Dropped in reverse order: on an error the transition ends before the membership, whose own
        // end is a transition.
        let (membership, _transition, place) = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&options.dir)
                .with_context(|| format!("cannot create {}", options.dir.display()))?;
            let transition = Transition::begin(&options.dir)?;
            let place = Place::find(&options)?;
            let membership = Membership::enter(&options.dir, place.clone(), &transition)?;
            anyhow::Ok((membership, transition, place))
        })
        .await?
        .with_context(|| format!("cannot use the private PostgreSQL in {dir}"))?;
        let server = Server::new(place.clone());
        let endpoint = server
            .ensure_ready()
            .await
            .with_context(|| format!("cannot start the private PostgreSQL in {dir}"))?;
        let password = place.password()?;
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
            _log_keeper: keep_log_short(&place),
            place,
            membership,
        })
    }

    /// Connection string for tokio-postgres, by the Unix socket.
    #[must_use]
    pub fn url(&self) -> &Secret {
        &self.url
    }

    /// How other clients reach it.
    #[must_use]
    pub fn tcp(&self) -> &Tcp {
        &self.tcp
    }

    /// The server's data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.place.data()
    }

    /// Stops the server as a crash would, or in good order, and starts it again. Its address stays
    /// what it was.
    pub async fn restart(&self, crash: bool) -> anyhow::Result<()> {
        self.while_stopped(crash, |_| Ok(())).await
    }

    /// Stops the server, does something with its data directory, and starts it again.
    pub async fn while_stopped(
        &self,
        crash: bool,
        work: impl FnOnce(&Path) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let place = self.place.clone();
        let dir = self.membership.dir().to_owned();
        // Nobody else may think that it has to be started.
        let transition = tokio::task::spawn_blocking(move || {
            let transition = Transition::begin(&dir)?;
            let server = Server::new(place.clone());
            let stopped = if crash { server.crash() } else { server.stop() };
            stopped?;
            work(&place.data())?;
            anyhow::Ok(transition)
        })
        .await??;
        let endpoint = Server::new(self.place.clone()).ensure_ready().await?;
        drop(transition);
        let url = endpoint.url(NAME, &self.place.password()?);
        anyhow::ensure!(url == self.url, "the private PostgreSQL came back with another address");
        Ok(())
    }

    /// Leaves the cluster and, if nobody else uses it, removes every file of it.
    pub async fn destroy(self) -> anyhow::Result<()> {
        let (place, dir) = (self.place.clone(), self.membership.dir().to_owned());
        self.leave().await?;
        if place.data().join("postmaster.pid").exists() {
            return Ok(());
        }
        for path in [place.home, dir] {
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Leaves the cluster; the last process to leave stops the server.
    pub async fn leave(mut self) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || self.membership.end()).await?
    }
}

/// The configured database, or else the private cluster, joined: leave that at the end.
pub async fn database_url(settings: &Settings) -> anyhow::Result<(Secret, Option<Cluster>)> {
    if !settings.database.url.is_empty() {
        return Ok((settings.database.url.clone(), None));
    }
    let cluster = Cluster::join(Options::in_runtime_dir(&settings.runtime.dir)).await?;
    Ok((cluster.url().clone(), Some(cluster)))
}

fn keep_log_short(place: &Place) -> AbortOnDropHandle<()> {
    let place = place.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOG_CHECK).await;
            let place = place.clone();
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || place.shorten_log()).await {
                tracing::warn!(error = format!("{error:#}"), "cannot shorten the private PostgreSQL's log");
            }
        }
    }))
}

//! The users of the cluster, counted by file locks only. The last user stops the server.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::layout::ClusterLayout;
use super::no_follow;
use super::server::Server;
use crate::pipeline::failure::chain;

/// A lock for the start or stop of the server, across processes. Released on drop.
#[derive(Debug)]
pub struct Transition {
    _lock: File,
}

impl Transition {
    /// Takes the lock. Waits while another process holds it.
    pub fn begin(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("transition.lock");
        let lock = open(&path)?;
        match lock.try_lock() {
            Ok(()) => return Ok(Self { _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                tracing::debug!("waiting for another process to start or stop the private PostgreSQL");
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { _lock: lock })
    }
}

/// One use of the cluster by this process. Ends at the latest on drop.
#[derive(Debug)]
pub struct Membership {
    dir: PathBuf,
    layout: ClusterLayout,
    /// Holds the shared lock; none after the end.
    lock: Option<File>,
}

impl Membership {
    /// Registers a user, within a transition.
    pub fn enter(dir: &Path, layout: ClusterLayout, _within: &Transition) -> anyhow::Result<Self> {
        let path = dir.join("users.lock");
        let lock = open(&path)?;
        // This does not block: a process holds this lock exclusively only within its own transition.
        lock.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { dir: dir.to_owned(), layout, lock: Some(lock) })
    }

    /// The cluster's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unregisters the user. Stops the server if there is no other user.
    pub fn end(&mut self) -> anyhow::Result<()> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let _transition = Transition::begin(&self.dir)?;
        lock.unlock()?;
        match lock.try_lock() {
            Ok(()) => Server::new(self.layout.clone()).stop(),
            Err(TryLockError::WouldBlock) => Ok(()),
            Err(TryLockError::Error(error)) => Err(error.into()),
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(error = chain(error.as_ref()), "cannot leave the private PostgreSQL");
        }
    }
}

/// Opens a lock file. Read access is enough for a lock, so a file of another user works too.
fn open(path: &Path) -> anyhow::Result<File> {
    no_follow::open_lock(path).with_context(|| format!("cannot open {}", path.display()))
}

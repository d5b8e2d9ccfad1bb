//! Who uses the cluster: "last one out turns off the light", by file locks alone.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::guarded;
use super::place::Place;
use super::server::Server;
use crate::pipeline::failure::chain;

/// Serialises whatever starts or stops the server, across processes, while it lives.
#[derive(Debug)]
pub struct Transition {
    _lock: File,
}

impl Transition {
    /// Waits for its turn.
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

/// One user of the cluster. Ends when dropped, at the latest.
#[derive(Debug)]
pub struct Membership {
    dir: PathBuf,
    place: Place,
    /// Holds the shared lock; gone once ended.
    lock: Option<File>,
}

impl Membership {
    /// Becomes a user, within a transition.
    pub fn enter(dir: &Path, place: Place, _within: &Transition) -> anyhow::Result<Self> {
        let path = dir.join("users.lock");
        let lock = open(&path)?;
        // Nobody holds it exclusively outside a transition, and this one is ours.
        lock.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(Self { dir: dir.to_owned(), place, lock: Some(lock) })
    }

    /// The cluster's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Stops being a user, and stops the server if there is no other.
    pub fn end(&mut self) -> anyhow::Result<()> {
        let Some(lock) = self.lock.take() else { return Ok(()) };
        let _transition = Transition::begin(&self.dir)?;
        lock.unlock()?;
        match lock.try_lock() {
            Ok(()) => Server::new(self.place.clone()).stop(),
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

/// A lock needs no more than reading, so that it can be shared with whoever made the file.
fn open(path: &Path) -> anyhow::Result<File> {
    guarded::open_lock(path).with_context(|| format!("cannot open {}", path.display()))
}

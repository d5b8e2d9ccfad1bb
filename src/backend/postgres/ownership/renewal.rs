//! The renewal of ownership by a running worker.

use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::comparison::read_and_check;
use super::database_epoch::{Check, DatabaseEpoch, advance_epoch, read};
use super::take_over::{advance, requeue_all, shared_namespace};
use crate::backend::postgres::Postgres;
use crate::pipeline::failure::{Error, Result};
use crate::pipeline::index::VectorIndex;

/// How often the database epoch grows, and the ownership record is compared.
const RENEW_EVERY: Duration = Duration::from_mins(1);

/// How soon a worker tries again to handle that the database went back.
const AGAIN_AFTER: Duration = Duration::from_secs(5);

/// What a running worker found out about its index.
#[derive(Debug)]
pub enum Renewal {
    /// The index belongs to this database and has the newest epoch.
    Owned,
    /// Another database took the index over. The error says what to do.
    Lost(Error),
}

/// The epoch that a running worker knows, to notice that the database went back or was replaced.
#[derive(Debug)]
pub struct KnownEpoch {
    name: String,
    epoch: i64,
    /// A heartbeat that the database has lost, until that is handled.
    lost: Option<SystemTime>,
}

impl KnownEpoch {
    /// The epoch after the index has been claimed.
    pub async fn new(postgres: &Postgres, generation: i32) -> Result<Self> {
        let DatabaseEpoch { name, epoch, .. } = read(postgres, generation).await?;
        Ok(Self { name, epoch, lost: None })
    }

    /// The database does not hold a heartbeat that a worker wrote at `lost`. The next renewal handles it.
    pub fn went_back(&mut self, lost: SystemTime) {
        self.lost = Some(lost);
    }

    /// Compares, handles the result, and advances the epoch. May wait for `settle` as [`claim`](super::claim)
    /// does.
    pub async fn renew(
        &mut self,
        postgres: &Postgres,
        generation: i32,
        index: &dyn VectorIndex,
        settle: Duration,
    ) -> Result<Renewal> {
        if let Some(store) = index.ownership_store() {
            let (state, record, found) = read_and_check(postgres, generation, store, self.lost).await?;
            // If the name in the database changed too, the database itself is another one.
            if found == Check::OtherDatabase && state.name == self.name {
                return Ok(Renewal::Lost(shared_namespace(record.as_deref())));
            }
            advance(postgres, generation, store, settle, self.lost).await?;
            *self = Self::new(postgres, generation).await?;
        } else {
            let state = read(postgres, generation).await?;
            if state.has_changed_server()
                || state.epoch < self.epoch
                || state.name != self.name
                || state.went_back(self.lost)
            {
                requeue_all(postgres, generation, &state, self.epoch).await?;
            }
            let (name, epoch) = advance_epoch(postgres, generation).await?;
            *self = Self { name, epoch, lost: None };
        }
        Ok(Renewal::Owned)
    }
}

/// Advances the epoch every `RENEW_EVERY`, and at once when the database `lost` a heartbeat, until `stop`,
/// which also ends the waiting for `settle`. Ends early with an error if another database took the index
/// over.
pub async fn keep(
    postgres: &Postgres,
    generation: i32,
    index: &dyn VectorIndex,
    settle: Duration,
    mut lost: watch::Receiver<Option<SystemTime>>,
    stop: &CancellationToken,
) -> Result<()> {
    let mut known = None;
    let mut unhandled: Option<SystemTime> = None;
    loop {
        let renew = async {
            let Some(known) = &mut known else {
                known = Some(KnownEpoch::new(postgres, generation).await?);
                return Ok(Renewal::Owned);
            };
            if let Some(lost) = unhandled {
                known.went_back(lost);
            }
            let renewed = known.renew(postgres, generation, index, settle).await?;
            unhandled = None;
            Ok::<_, Error>(renewed)
        };
        let Some(renewed) = stop.run_until_cancelled(renew).await else { return Ok(()) };
        match renewed {
            Ok(Renewal::Owned) => {}
            Ok(Renewal::Lost(error)) => return Err(error),
            Err(error) => tracing::debug!(%error, "cannot renew the ownership of the index"),
        }
        let pause = if unhandled.is_some() { AGAIN_AFTER } else { RENEW_EVERY };
        let next = async {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                Ok(()) = lost.changed() => unhandled = *lost.borrow(),
            }
        };
        if stop.run_until_cancelled(next).await.is_none() {
            return Ok(());
        }
    }
}

//! Index ownership: which database, and which epoch of that database, an index outside of the database
//! belongs to.
//!
//! After a restore to an earlier point, the index is ahead of the ledger: the index may hold anything for a
//! row that the ledger calls settled. So the database has an epoch: a name, and a number that grows. The
//! index keeps an ownership record with the same two, written after the database committed them. A worker
//! compares the record with the database when the worker starts, and each time the number grows. The results:
//!
//! - *Another name*: another database wrote to the index. A worker that starts takes the index over: it
//!   trusts no entry of the ledger, and every text is embedded. A worker that was running ends, since two
//!   databases that write to one namespace would overwrite each other for ever.
//! - *No record*, though something was written: the index was created again. The worker does the same.
//! - *A higher number*: this database went back to an earlier state (a restore, or a failover to a replica
//!   that was behind). Every row is sent again. A record that carries the row's content hash supplies its
//!   vector.
//! - *The same record, on another server or timeline* (see `refarch.incarnation`): a failover or a restore,
//!   which may have lost what came after the number last grew. Rows and ledger went back together, so they do
//!   not show which records are ahead. Every row is sent again in the same way, which costs requests and no
//!   embedding. The database gets a new name. So the old server, if it still runs, is recognised as another
//!   database.
//!
//! The number grows once a minute, so it does not show a restore to a state of less than a minute ago, if
//! server and timeline stay the same (a storage snapshot, or a copy of the files). A running worker shows it:
//! it wrote a heartbeat each second to `refarch.worker`, and the restored database does not hold the last
//! heartbeat. Writes after the restore cannot hide the loss, as they could if a position in the write-ahead log
//! were compared. Each worker of a fleet notices the loss. The first worker that gets the lock queues every row
//! and sets `changed_at`, which is later than the lost heartbeats of all other workers, so they queue nothing. If
//! no worker ran at the restore, only the number shows the restore. A restored state that holds the last
//! heartbeats of all workers is not recognised as a restored state.
//!
//! The index may apply a write up to the settling time after it accepted the write. While that may still
//! happen, the ledger keeps the row open. A restore loses the newest entries of the ledger, and with them the
//! record of such writes. If a row were written again at once, a lost write could still replace it, and nothing
//! would show that. So a worker that finds that the database went back or moved, or that the index is
//! another database's, first waits for the settling time, and only then queues every row. Records that
//! running workers write meanwhile do no harm, because they are written again. An index that was created again needs no
//! waiting, and neither does pgvector: its writes are part of the transactions that went back.
//!
//! None of these cases finds a record whose id this database never had. The proof and `verify`, which list
//! the index, find such a record.
//!
//! pgvector keeps no ownership record: its vectors are restored together with rows and ledger, and agree with
//! them. But a queue outside of the database is not restored: it may have delivered and deleted messages
//! about changes that the restored outbox does not hold any more. So the number grows with pgvector too. If
//! the database went back (another server or timeline, or a number lower than one that this process set),
//! every id is queued. A row that agrees with the index costs one comparison.

mod comparison;
mod database_epoch;
mod renewal;
mod take_over;

pub use comparison::{Ownership, compare, is_owned_by};
pub use renewal::{KnownEpoch, Renewal, keep};
pub use take_over::{claim, renew};

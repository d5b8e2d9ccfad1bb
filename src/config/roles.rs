//! The roles' sections: `[relay]`, `[indexer]`, `[scaling]`, `[audit]`, `[serve]` and `[up]`

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use toml::Value;

use super::declare::Rule::{AtLeast, Between, Each, Is, Seconds};
use super::declare::lies;
use super::error::ConfigError;
use super::read::{Setting, section};
use super::values::Values;
use crate::secret::Secret;

section! {
    /// `[relay]`: changes on their way from the outbox to the queue.
    pub struct Relay in "relay" {
        /// How often the outbox is polled when no wake-up arrives.
        poll as "poll_ms": Duration = 100, AtLeast(1);
        /// Changes in one message, 500 at most.
        pack: usize = 500, Between(1, 500);
        /// A transaction with more changes than this goes to the bulk lane. Its changes so far are counted each
        /// time some of them are claimed.
        bulk_threshold: u64 = 100;
        /// While more changes than this wait in the live lane, further changes go to the bulk lane.
        live_bound: u64 = 5000;
    }
}

section! {
    /// `[indexer]`: changes on their way from the queue to the index.
    pub struct Indexer in "indexer" {
        /// Embedding threads of a process. 0: one for each core.
        workers: usize = 0, Is(is_workers, "use 1 to 1024, or 0 for one for each core");
        /// Embedding threads at most: threads are added while too much work waits (see `[scaling]`), and end again.
        /// 0: always as many as `workers`.
        max_workers: usize = 0, Is(is_workers, "use 1 to 1024, or 0 for as many as indexer.workers");
        /// Texts are embedded in slices that take about this long. Live work goes first between two slices.
        slice as "slice_ms": Duration = 50, AtLeast(1);
        /// A process holds as many changes as it embeds in this time.
        hold as "hold_ms": Duration = 2000, AtLeast(1);
        /// How often a lane is polled when no wake-up arrives.
        poll as "poll_ms": Duration = 100, AtLeast(1);
        /// With an index outside of the database, a worker stops writing when its last heartbeat in the database is
        /// older than this.
        lease as "lease_ms": Duration = 15000;
        /// With an index outside of the database: after this time an accepted write has been applied, or never will
        /// be. Writes of a dead worker, and writes that returned a failure, are done again after it. After a restore
        /// or a failover, embed waits for both times before it writes every row anew.
        settle as "settle_ms": Duration = 60000;
    }
}

fn is_workers(value: &Value) -> bool {
    lies(value, 0, 1024)
}

impl Indexer {
    /// How long a tracked write of a dead worker stays open. The worker may have written until its lease
    /// ended, and its writes are applied within [`Self::settle`].
    #[must_use]
    pub fn attempt(&self) -> Duration {
        self.lease + self.settle
    }

    /// Number of embedding threads: as set, or one for each core.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        if self.workers > 0 {
            return self.workers;
        }
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Number of embedding threads at most, no less than [`Self::worker_count`].
    #[must_use]
    pub fn max_worker_count(&self) -> usize {
        self.max_workers.max(self.worker_count())
    }
}

section! {
    /// `[scaling]`: how the number of embedding threads (`indexer.max_workers`) and of processes (`up.max_processes`)
    /// follows the load.
    pub struct Scaling in "scaling" {
        /// Workers are added while the changes that wait would take longer than this.
        backlog as "backlog_s": Duration = 10, Seconds(1, 86_400);
        /// Cooldown: time between two steps that add workers.
        cooldown_out as "cooldown_out_s": Duration = 30, Seconds(0, 86_400);
        /// One step multiplies the number of workers by this at most. With 1, it adds one worker.
        growth: f64 = 2.0, Between(1, 100);
        /// Cooldown: workers end only after fewer were enough for so long.
        cooldown_in as "cooldown_in_s": Duration = 30, Seconds(0, 86_400);
    }
}

section! {
    /// `[audit]`: the continuous proof.
    pub struct Audit in "audit" {
        /// The continuous proof: one embed of a fleet compares table, ledger and index all the time. A round takes
        /// this many hours. Rows that differ are queued again. `refarch status` shows when the last round ended. A
        /// fraction such as 0.5 is half an hour. 0: no proof.
        period as "period_h": Option<Duration> = 24.0, Is(is_period, "use up to 8760 hours; 0 for no proof");
        /// What a round compares of an index outside of the database. sample: the ids of all records, and some
        /// records of each page. full: every record, which costs ten times as many read units.
        index: IndexCheck = "sample";
        /// How often to check that changes are still captured (a disabled trigger is armed again). 0: never.
        armed as "armed_s": Option<Duration> = 60;
    }
}

/// How much of an index outside of the database the proof compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IndexCheck {
    /// The ids of all records, and some records.
    Sample,
    /// Every record.
    Full,
}

impl Setting for IndexCheck {
    fn read(values: &Values, path: &'static str) -> Result<Self, ConfigError> {
        values.parse(path)
    }
}

fn is_period(value: &Value) -> bool {
    lies(value, 0, 8_760)
}

section! {
    /// `[serve]`: the page and its API.
    pub struct Serve in "serve" {
        /// Address of the web page. Anyone who can reach it can search. Off loopback, edits need `edit_token`.
        bind: SocketAddr = "127.0.0.1:3000";
        /// Bearer token that every edit needs, on loopback too. Empty: programs on this machine may edit through
        /// loopback. Edits are then off for all other clients and for requests that came through a proxy.
        edit_token: Secret = "";
        /// More host names of this page, such as `["shop.example.com"]` behind a proxy. A name with a port allows
        /// that port only. `"*.example.com"` allows every name with that ending. On loopback all other names except
        /// localhost are refused. On another address every name is allowed while this list is empty.
        allowed_hosts: Vec<String> = [], Each(is_host, HOST_RULE);
        /// Rows on a page.
        page_size: u32 = 10, Between(1, 100);
        /// Most connections of clients. When all are taken, the connection that has waited longest is closed for
        /// the next client. 0: as many as the process's limit on open files allows, 512 at most.
        max_connections: usize = 0;
        /// Connections to the database for requests of clients. They are separate from those of
        /// `database.pool_size`, so that requests never wait for indexing, nor indexing for requests.
        pool_size: usize = 12, Between(4, 200);
    }
}

const HOST_RULE: &str = "use names as browsers ask for them, without http:// and path: shop.example.com, \
                         shop.example.com:8443 or *.example.com";

/// Whether a text is a host name, optionally with a port and a leading `*.`.
fn is_host(text: &str) -> bool {
    let name = match text.rsplit_once(':') {
        Some((name, port)) if !text.ends_with(']') => {
            if port.parse::<u16>().is_err() {
                return false;
            }
            name
        }
        _ => text,
    };
    let name = name.strip_prefix("*.").unwrap_or(name);
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    if let Some(address) = address {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

section! {
    /// `[up]`: everything in one process.
    pub struct Up in "up" {
        /// Products to generate when the table is empty.
        products: u64 = 10000;
        /// Embed processes. 0: none, texts are embedded in this process.
        processes: usize = 0, Between(0, 256);
        /// Embed processes at most: processes are added while too much work waits (see `[scaling]`), and end again.
        /// 0: always as many as `processes`.
        max_processes: usize = 0, Between(0, 256);
    }
}

impl Up {
    /// Number of embed processes at least and at most. None if texts are embedded in this process.
    #[must_use]
    pub fn process_range(&self) -> Option<(usize, usize)> {
        let most = self.max_processes.max(self.processes);
        (most > 0).then_some((self.processes.max(1), most))
    }
}

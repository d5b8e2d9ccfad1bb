//! Every metric that refarch has: its name, kind, unit, labels, roles and meaning. `docs/metrics.md` is made of this
//! file.
//!
//! Names follow the conventions of Prometheus. A label has few values: lanes, kinds of failure, routes. No label has a
//! value from a row, a message or a client.

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows while the process lives.
    Counter,
    /// It grows and shrinks.
    Gauge,
    /// How many values fell between bounds.
    Histogram,
}

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, with unit and `_total`.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its unit, the end of its name; none for a number of things.
    pub unit: Option<&'static str>,
    /// Its labels, in the order in which values are given.
    pub labels: &'static [&'static str],
    /// The roles that have it.
    pub roles: &'static str,
    /// Its meaning.
    pub about: &'static [&'static str],
}

impl Metric {
    /// Its meaning on one line.
    #[must_use]
    pub fn help(&self) -> String {
        self.about.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
    }
}

macro_rules! unit {
    () => {
        None
    };
    ($unit:literal) => {
        Some($unit)
    };
}

macro_rules! metrics {
    ($($(#[doc = $about:literal])* $metric:ident: $kind:ident $name:literal $(in $unit:literal)? by $labels:tt of $roles:expr;)*) => {
        $($(#[doc = $about])*
        pub const $metric: Metric = Metric {
            name: $name,
            kind: Kind::$kind,
            unit: unit!($($unit)?),
            labels: &$labels,
            roles: $roles,
            about: &[$($about),*],
        };)*

        /// Every metric, in the order of the documentation.
        pub const ALL: &[&Metric] = &[$(&$metric),*];
    };
}

/// Roles with an admin endpoint.
const EVERY: &str = "all";
/// Roles that are workers.
const WORKERS: &str = "`listen`, `embed`, `serve`, `up`";
const RELAYS: &str = "`listen`, `up`";
const INDEXERS: &str = "`embed`, `up`";
const PAGES: &str = "`serve`, `up`";
/// Roles that report the state of the whole fleet. `embed` does not: a fleet has many, and each count of a queue of
/// SQS is paid for.
const REPORTERS: &str = "`listen`, `serve`, `up`";

metrics! {
    /// 1, with the version and the role of the process.
    BUILD_INFO: Gauge "refarch_build_info" by ["version", "role"] of EVERY;
    /// Whether `/readyz` answers 200.
    READY: Gauge "refarch_ready" by [] of EVERY;
    /// CPU time that the process used.
    CPU: Counter "process_cpu_seconds_total" in "seconds" by [] of EVERY;
    /// Resident memory.
    RESIDENT: Gauge "process_resident_memory_bytes" in "bytes" by [] of EVERY;
    /// Virtual memory.
    VIRTUAL: Gauge "process_virtual_memory_bytes" in "bytes" by [] of EVERY;
    /// Open files, sockets included.
    OPEN_FDS: Gauge "process_open_fds" by [] of EVERY;
    /// The limit on open files.
    MAX_FDS: Gauge "process_max_fds" by [] of EVERY;
    /// Threads of the operating system.
    THREADS: Gauge "process_threads" by [] of EVERY;
    /// When the process started, in seconds since 1970.
    START: Gauge "process_start_time_seconds" in "seconds" by [] of EVERY;

    /// 1, with the worker's name in the worker registry.
    WORKER_INFO: Gauge "refarch_worker_info" by ["role", "worker_id"] of WORKERS;
    /// Time since the worker's last heartbeat that reached the database.
    HEARTBEAT_AGE: Gauge "refarch_heartbeat_age_seconds" in "seconds" by ["role"] of WORKERS;
    /// Heartbeats that did not reach the database.
    HEARTBEAT_FAILURES: Counter "refarch_heartbeat_failures_total" by ["role"] of WORKERS;
    /// Whether the worker has a fault of this kind now. `held`: nothing goes through, because index or embedder refuse
    /// or do not answer. `queue`: nothing can be received. `relay`: nothing can be queued. `misdirected`: messages of a
    /// later build or of another source.
    FAULT: Gauge "refarch_fault" by ["role", "kind"] of WORKERS;
    /// How long the worker may still write to an index outside of the database without another heartbeat.
    LEASE: Gauge "refarch_lease_remaining_seconds" in "seconds" by [] of INDEXERS;
    /// Connections to the database: `work` for the pipeline, `requests` for clients of the page.
    POOL: Gauge "refarch_pool_connections" by ["pool", "state"] of WORKERS;
    /// Most connections of the pool.
    POOL_MAX: Gauge "refarch_pool_max_connections" by ["pool"] of WORKERS;
    /// Tasks that wait for a connection.
    POOL_WAITING: Gauge "refarch_pool_waiting" by ["pool"] of WORKERS;

    /// Changes that were moved from the outbox to the queue.
    QUEUED: Counter "refarch_changes_queued_total" by ["source", "lane"] of RELAYS;
    /// Changes in one claim of the outbox.
    CLAIMS: Histogram "refarch_claim_changes" by ["source"] of RELAYS;
    /// Time from statement to queue, of the oldest change of each claim.
    CAPTURE_LAG: Histogram "refarch_capture_lag_seconds" in "seconds" by ["source"] of RELAYS;

    /// Changes that were received from the queue.
    RECEIVED: Counter "refarch_changes_received_total" by ["source", "lane"] of INDEXERS;
    /// Changes that this process holds: received, and not finished.
    IN_FLIGHT: Gauge "refarch_changes_in_flight" by ["source", "lane"] of INDEXERS;
    /// Workers, threads or processes, that this process asked for at its last decision; 0 if it scales nothing.
    WORKERS_DESIRED: Gauge "refarch_scaling_desired_workers" by ["source"] of INDEXERS;
    /// Workers that worked at the last decision.
    WORKERS_READY: Gauge "refarch_scaling_ready_workers" by ["source"] of INDEXERS;
    /// Decisions that changed the number of workers, by direction.
    SCALED: Counter "refarch_scaling_steps_total" by ["source", "direction"] of INDEXERS;
    /// Changes in one batch.
    BATCHES: Histogram "refarch_batch_changes" by ["source", "lane"] of INDEXERS;
    /// Changes whose outcome is in the index.
    APPLIED: Counter "refarch_changes_applied_total" by ["source", "lane"] of INDEXERS;
    /// Time from statement to searchable, of each change. With Pinecone, of samples (`index.freshness_sample_s`).
    FRESHNESS: Histogram "refarch_freshness_seconds" in "seconds" by ["source", "lane"] of INDEXERS;
    /// Texts that were embedded.
    EMBEDDED: Counter "refarch_texts_embedded_total" by ["source", "lane"] of INDEXERS;
    /// Texts that were not embedded. `unchanged`: the index has the text's vector. `same_text`: another row of the
    /// group has the same text.
    AVOIDED: Counter "refarch_embeddings_avoided_total" by ["source", "reason"] of INDEXERS;
    /// Time of one call of the embedder, failures included.
    EMBEDDER: Histogram "refarch_embedder_call_seconds" in "seconds" by [] of INDEXERS;
    /// Texts in one call of the embedder.
    EMBEDDER_TEXTS: Histogram "refarch_embedder_call_texts" by [] of INDEXERS;
    /// Tokens that the embedder was given.
    TOKENS: Counter "refarch_embedder_tokens_total" by [] of INDEXERS;
    /// Panics of embedding workers, and of the tasks beside them. Each is an event, and is started again.
    PANICS: Counter "refarch_worker_panics_total" by ["source"] of INDEXERS;
    /// Time of one request to the index (`write`, `delete`), failures included. With pgvector a write is one
    /// transaction, deletes included.
    INDEX: Histogram "refarch_index_request_seconds" in "seconds" by ["source", "generation", "operation"] of INDEXERS;
    /// Groups of changes that were done again because a row or an entry changed meanwhile.
    CONFLICTS: Counter "refarch_conflicts_total" by ["source"] of INDEXERS;
    /// Tries that failed and are made again, by the step (`queue`, `receive`, `apply`) and the kind of failure. A kind
    /// appears with its first failure.
    RETRIES: Counter "refarch_retries_total" by ["source", "step", "kind"] of "`listen`, `embed`, `up`";
    /// Changes and messages that this process moved to the dead letters.
    DEAD_LETTERED: Counter "refarch_dead_lettered_total" by ["source", "reason"] of INDEXERS;

    /// Requests of clients of the page, by route and class of the answer (`2xx`). A route appears with its first
    /// request.
    REQUESTS: Counter "refarch_http_requests_total" by ["route", "code"] of PAGES;
    /// Time from a request's head to its answer.
    REQUEST: Histogram "refarch_http_request_seconds" in "seconds" by ["route"] of PAGES;

    /// Searches whose best match was weak, so that they read the texts unlike all others too (see README.md, Search):
    /// `found` if one of these was the best match, else `nothing`. Missing with an index outside of the database.
    SECOND_LOOKS: Counter "refarch_search_second_looks_total" by ["outcome"] of PAGES;
    /// Products that were generated.
    GENERATED: Counter "refarch_generated_rows_total" by [] of "`generate`";

    /// Whether the state of the fleet could be read for this answer. If not, the metrics below are missing.
    STATE_READABLE: Gauge "refarch_state_readable" by [] of REPORTERS;
    /// Changes that are not in the index yet: in the outbox, in the queue, or received and not finished (`in_flight`).
    BACKLOG: Gauge "refarch_backlog_changes" by ["source", "place", "lane"] of REPORTERS;
    /// How long the backlog takes: its changes over the fleet's rate. If nothing was applied for two minutes, the age of
    /// the oldest change.
    BACKLOG_SECONDS: Gauge "refarch_backlog_seconds" in "seconds" by ["source"] of REPORTERS;
    /// Changes a second that the fleet applied while it worked, in the last two minutes. Missing if it applied none.
    RATE: Gauge "refarch_fleet_changes_per_second" by ["source"] of REPORTERS;
    /// Age of the oldest change that is not in the index yet; 0 if there is none. Missing if the queue cannot tell
    /// (SQS, while it holds anything).
    OLDEST: Gauge "refarch_oldest_change_age_seconds" in "seconds" by ["source"] of REPORTERS;
    /// Changes in the dead-letter queue.
    DEAD_LETTERS: Gauge "refarch_dead_letters" by ["source"] of REPORTERS;
    /// Rows of the table; an estimate for a large table.
    ROWS: Gauge "refarch_source_rows" by ["source"] of REPORTERS;
    /// Rows whose current state the index holds, by the ledger.
    IN_SYNC: Gauge "refarch_source_rows_in_sync" by ["source"] of REPORTERS;
    /// Whether every row is searchable in its current state, by the ledger and by all counts.
    SYNCED: Gauge "refarch_synced" by ["source"] of REPORTERS;
    /// Reasons why changes of the table are not captured.
    CAPTURE_FAULTS: Gauge "refarch_capture_faults" by ["source"] of REPORTERS;
    /// Entries of the ledger that are not settled.
    UNSETTLED: Gauge "refarch_ledger_unsettled" by ["source", "generation"] of REPORTERS;
    /// Records in the index. Missing while the index cannot be asked.
    RECORDS: Gauge "refarch_index_records" by ["source", "generation"] of REPORTERS;
    /// Records that the index must hold, by the ledger.
    EXPECTED: Gauge "refarch_index_records_expected" by ["source", "generation"] of REPORTERS;
    /// Recall of searches through the lists, of the true ten nearest, as last sampled. Missing without lists.
    RECALL: Gauge "refarch_search_recall_at_10_ratio" in "ratio" by ["source", "generation"] of REPORTERS;
    /// Whether the lists no longer find enough. Missing without lists.
    DEGRADED: Gauge "refarch_search_lists_degraded" by ["source", "generation"] of REPORTERS;
    /// Rows whose texts are unlike all others, at the last check. Missing without lists, and until the first check.
    OUTLIERS: Gauge "refarch_search_outliers" by ["source", "generation"] of REPORTERS;
    /// Whether the continuous proof is on (`audit.period_h`).
    PROOF_ON: Gauge "refarch_proof_on" by ["source", "generation"] of REPORTERS;
    /// Time since the last round of the continuous proof ended. Missing before the first.
    PROOF_AGE: Gauge "refarch_proof_age_seconds" in "seconds" by ["source", "generation"] of REPORTERS;
    /// Whether no round has ended for two periods.
    PROOF_OVERDUE: Gauge "refarch_proof_overdue" by ["source", "generation"] of REPORTERS;
    /// Rows that differed in the last round, and were queued again.
    PROOF_DIFFERENCES: Gauge "refarch_proof_differences" by ["source", "generation"] of REPORTERS;
    /// Rows that could not be read in the last round.
    PROOF_UNREADABLE: Gauge "refarch_proof_unreadable" by ["source", "generation"] of REPORTERS;
    /// Workers with a recent heartbeat in the worker registry.
    WORKERS_ALIVE: Gauge "refarch_workers" by ["role"] of REPORTERS;
    /// Embedding threads of these workers.
    WORKER_THREADS: Gauge "refarch_worker_threads" by ["role"] of REPORTERS;
    /// Workers of the fleet that have a fault of this kind now.
    FLEET_FAULTS: Gauge "refarch_fleet_faults" by ["kind"] of REPORTERS;
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fmt::Write as _;

    use super::*;
    use crate::pipeline::failure::FailureKind;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    const BEGIN: &str = "<!-- made of src/role/admin/catalogue.rs -->\n";

    fn rendered() -> String {
        let mut text = BEGIN.to_owned();
        text += "\n| metric | kind | labels | roles | meaning |\n| --- | --- | --- | --- | --- |\n";
        for metric in ALL {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let kind = format!("{:?}", metric.kind).to_lowercase();
            let _ = writeln!(
                text,
                "| `{}` | {kind} | {} | {} | {} |",
                metric.name,
                labels.join(", "),
                metric.roles,
                metric.help()
            );
        }
        let kinds: Vec<String> = FailureKind::ALL.iter().map(|kind| format!("`{}`", kind.name())).collect();
        let _ = writeln!(text, "\nKinds of failure: {}.", kinds.join(", "));
        text
    }

    /// With `REFARCH_RENDER_DEFAULTS` set, the page's tables are written anew.
    #[test]
    fn the_page_of_metrics_is_made_of_the_catalogue() {
        let page = std::fs::read_to_string(PAGE).unwrap();
        let (before, _) = page.split_once(BEGIN).expect("the page has the marker of its table");
        let wanted = before.to_owned() + &rendered();
        if std::env::var_os("REFARCH_RENDER_DEFAULTS").is_some() {
            std::fs::write(PAGE, wanted).unwrap();
        } else {
            let cure = "write it anew: REFARCH_RENDER_DEFAULTS=1 cargo test --lib page_of_metrics";
            assert!(page == wanted, "{cure}");
        }
    }

    #[test]
    fn names_follow_the_conventions() {
        let names: HashSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "a name twice");
        for metric in ALL {
            let Metric { name, kind, unit, labels, .. } = metric;
            assert!(name.starts_with("refarch_") || name.starts_with("process_"), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            let base = name.strip_suffix("_total").unwrap_or(name);
            assert!(unit.is_none_or(|unit| base.ends_with(&format!("_{unit}"))), "{name} and its unit");
            for other in ["_ms", "_milliseconds", "_minutes", "_hours", "_kib", "_mib", "_percent"] {
                assert!(!base.ends_with(other), "{name}: use a base unit");
            }
            assert!(!metric.help().is_empty() && !labels.contains(&"le"), "{name}");
        }
    }
}

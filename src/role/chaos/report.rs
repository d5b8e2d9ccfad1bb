//! The report of `refarch chaos`.

use std::fmt::Write as _;

use serde::Serialize;

use super::fault_injector::InjectedFaults;
use super::operator::OperationCounts;
use super::workload::WorkloadCounts;
use crate::double::pinecone::PineconeCounts;
use crate::double::sqs::SqsCounts;
use crate::pipeline::audit::Report;

/// The report: what was done, and the comparisons.
#[derive(Debug, Serialize)]
pub(super) struct ChaosReport {
    pub(super) seed: u64,
    pub(super) minutes: f64,
    pub(super) products: u64,
    /// Faults that were injected.
    pub(super) faults: InjectedFaults,
    /// Operations on the database, as operators do them.
    pub(super) operated: OperationCounts,
    /// Processes that refused settings which differed from those of the fleet.
    pub(super) configurations_refused: u64,
    /// Requests to the Pinecone double and its faults; none with pgvector.
    pub(super) index: Option<PineconeCounts>,
    /// Requests to the SQS double and its faults; none with pgmq.
    pub(super) queue: Option<SqsCounts>,
    /// Statements of the application.
    pub(super) written: WorkloadCounts,
    /// Errors of the application's statements, the first few.
    pub(super) failures: Vec<String>,
    /// Seconds from the end of the faults to the end of a round of the continuous proof; none without the
    /// proof.
    pub(super) proved_s: Option<f64>,
    /// Differences that the proof found and queued again, also during the faults.
    pub(super) proof_differences: u64,
    /// Seconds from the end of the faults until nothing was under way.
    pub(super) drained_s: f64,
    /// Number of dead letters.
    pub(super) dead_letters: u64,
    /// Processes that ended by themselves, with their exit status.
    pub(super) ended: Vec<String>,
    /// Rows that differ between the table and the writer's memory.
    pub(super) table_differs: u64,
    /// Records that differ between the index and the writer's memory.
    pub(super) index_differs: u64,
    #[serde(flatten)]
    pub(super) report: Report,
}

impl ChaosReport {
    /// The exit code: 0 if nothing differs, 1 if something does, 2 if something could not be compared.
    pub(super) fn code(&self) -> u8 {
        let differs = self.report.differences()
            + self.dead_letters
            + self.table_differs
            + self.index_differs
            + self.operated.rows_hidden_untold
            + self.written.writes_failed;
        if differs > 0 || !self.ended.is_empty() {
            1
        } else if self.report.undecided + self.report.unsampled > 0 {
            2
        } else {
            0
        }
    }
}

/// The report for people.
pub(super) fn text(outcome: &ChaosReport) -> String {
    let ChaosReport { faults, written, report, .. } = outcome;
    let index = outcome.index.map_or_else(String::new, |index| {
        format!(
            "index            {} requests: {} unavailable, {} rate limited, {} delayed, {} applied but reported as failed, {} applied late, {} connections cut\n",
            index.requests, index.unavailable, index.rate_limited, index.hung, index.lied, index.late, index.dropped
        )
    });
    let calls = outcome.queue.map_or_else(String::new, |queue| {
        format!(
            "queue's calls    {} send, {} receive, {} delete, {} extend: {} unavailable, {} throttled, {} applied but reported as failed, {} connections cut, {} entries failed, {} delivered twice\n",
            queue.send, queue.receive, queue.delete, queue.extend, queue.unavailable, queue.throttled, queue.lied,
            queue.dropped, queue.entries_failed, queue.duplicated
        )
    });
    let refused = outcome.configurations_refused;
    let operated = outcome.operated;
    let operations = format!(
        "operators        {} columns added to the metadata, {} columns renamed, {} keys widened, {} tables swapped, {} times triggers disabled, {} times rows hidden ({} not reported), {} databases restored, {} migrations ({} refused), {} times other settings for half of the fleet ({refused} processes refused)\n",
        operated.metadata_added,
        operated.columns_renamed,
        operated.keys_widened,
        operated.tables_swapped,
        operated.triggers_disabled,
        operated.rows_hidden,
        operated.rows_hidden_untold,
        operated.databases_restored,
        operated.migrations,
        operated.migrations_refused,
        operated.fleets_of_two_configurations,
    );
    let failures = outcome.failures.iter().fold(String::new(), |mut text, failure| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "failed           {failure}");
        text
    });
    let proved = outcome.proved_s.map_or_else(String::new, |s| {
        let healed = outcome.proof_differences;
        format!(
            "proved           after {s:.1} s; the proof found {healed} differences and queued them again\n"
        )
    });
    let ended = if outcome.ended.is_empty() {
        String::new()
    } else {
        format!("ended            {}\n", outcome.ended.join(", "))
    };
    let verdict = match outcome.code() {
        0 => "nothing is missing, stale or orphaned",
        1 => "index and table differ",
        _ => "could not tell",
    };
    format!(
        "chaos            {} minutes on {} products, seed {}\n\
         processes        {} kills, {} freezes\n\
         database         {} crashes, {} restarts, {} connections cut\n\
         queue            {} messages duplicated, {} delayed, {} made visible early, {} purged\n\
         embedder         refused every text, {} times\n\
         {operations}{calls}{index}{ended}\
         written          {} statements: {} rows inserted, {} updated, {} deleted, {} inserted again, {} truncations; {} failed\n\
         {failures}\
         drained          in {:.1} s\n\
         {proved}\
         {report}\
         dead letters     {}\n\
         writer's memory  {} rows differ in the table, {} records differ in the index\n\
         {verdict}\n",
        outcome.minutes,
        outcome.products,
        outcome.seed,
        faults.kills,
        faults.freezes,
        faults.database_crashes,
        faults.database_restarts,
        faults.connections_cut,
        faults.messages_duplicated,
        faults.messages_delayed,
        faults.messages_hurried,
        faults.messages_purged,
        faults.embedder_refusals,
        written.statements,
        written.inserted,
        written.updated,
        written.deleted,
        written.reinserted,
        written.truncations,
        written.writes_failed,
        outcome.drained_s,
        outcome.dead_letters,
        outcome.table_differs,
        outcome.index_differs,
    )
}

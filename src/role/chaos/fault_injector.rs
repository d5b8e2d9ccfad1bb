//! Injects the scheduled faults.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use super::environment::Environment;
use super::fault_schedule::{Fault, baseline_faults, baseline_sqs_faults};
use super::operator::Operation;
use super::processes::RoleProcesses;
use crate::role::progress::Progress;

/// How often processes are checked and due faults injected.
const TICK: Duration = Duration::from_millis(50);

/// Counts of injected faults.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct InjectedFaults {
    pub kills: u64,
    pub freezes: u64,
    pub database_crashes: u64,
    pub database_restarts: u64,
    pub connections_cut: u64,
    pub messages_duplicated: u64,
    pub messages_delayed: u64,
    pub messages_hurried: u64,
    pub index_storms: u64,
    /// Messages that purges deleted.
    pub messages_purged: u64,
    pub purges: u64,
    /// Periods in which the embedder refused every text.
    pub embedder_refusals: u64,
}

/// Injects the faults when they are due, until the time is over or `stop`.
pub struct FaultInjector<'a> {
    /// The environment.
    pub environment: &'a Environment,
    /// The processes.
    pub processes: &'a Mutex<RoleProcesses>,
    /// Sends operations to the operator.
    pub operations: UnboundedSender<Operation>,
    /// Set to make the writer truncate the table.
    pub truncate: &'a std::sync::atomic::AtomicBool,
    /// Faults injected so far.
    pub done: InjectedFaults,
}

impl FaultInjector<'_> {
    /// Injects the faults of `schedule` for the time `lasting`.
    pub async fn run(
        &mut self,
        schedule: Vec<(Duration, Fault)>,
        lasting: Duration,
        stop: &CancellationToken,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let mut schedule = schedule.into_iter().peekable();
        let mut storm_until: Option<Instant> = None;
        if let Some(double) = &self.environment.pinecone_double {
            double.set_faults(baseline_faults());
        }
        if let Some(double) = &self.environment.sqs_double {
            double.set_faults(baseline_sqs_faults());
        }
        while started.elapsed() < lasting && !stop.is_cancelled() {
            while let Some((_, fault)) = schedule.next_if(|(at, _)| *at <= started.elapsed()) {
                tracing::debug!(?fault, at_ms = started.elapsed().as_millis() as u64, "fault");
                if let Fault::Storm(faults, long) = fault {
                    if let Some(double) = &self.environment.pinecone_double {
                        double.set_faults(faults);
                        storm_until = Some(Instant::now() + long);
                        self.done.index_storms += 1;
                    }
                } else {
                    self.inject(fault).await?;
                }
            }
            if storm_until.is_some_and(|until| until <= Instant::now())
                && let Some(double) = &self.environment.pinecone_double
            {
                double.set_faults(baseline_faults());
                storm_until = None;
            }
            self.processes.lock().await.supervise()?;
            progress.set(started.elapsed().as_secs());
            stop.run_until_cancelled(tokio::time::sleep(TICK)).await;
        }
        Ok(())
    }

    async fn inject(&mut self, fault: Fault) -> anyhow::Result<()> {
        match fault {
            Fault::Kill(at) => {
                self.processes.lock().await.kill(at).await?;
                self.done.kills += 1;
            }
            Fault::Freeze(at, long) => {
                self.processes.lock().await.freeze(at, long);
                self.done.freezes += 1;
            }
            Fault::RestartDatabase { crash } => {
                self.environment.restart_database(crash).await?;
                if crash {
                    self.done.database_crashes += 1;
                } else {
                    self.done.database_restarts += 1;
                }
            }
            Fault::Truncate => self.truncate.store(true, std::sync::atomic::Ordering::Relaxed),
            Fault::CutConnections => {
                self.done.connections_cut += self
                    .sql(
                        "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
                         WHERE application_name = 'refarch' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 5) p",
                    )
                    .await;
            }
            Fault::Duplicate | Fault::Delay | Fault::Hurry if self.environment.sqs_double.is_some() => {
                self.inject_into_sqs_double(fault);
            }
            Fault::Duplicate => {
                self.done.messages_duplicated += self
                    .count_on_both_lanes(
                        "WITH again AS (INSERT INTO pgmq.q_LANE (vt, message, headers) \
                         SELECT clock_timestamp(), message, headers FROM pgmq.q_LANE ORDER BY random() LIMIT 3 RETURNING 1) \
                         SELECT count(*) FROM again",
                    )
                    .await;
            }
            Fault::Delay => {
                self.done.messages_delayed += self
                    .count_on_both_lanes(
                        "WITH later AS (UPDATE pgmq.q_LANE SET vt = clock_timestamp() + random() * interval '5 s' \
                         WHERE msg_id IN (SELECT msg_id FROM pgmq.q_LANE WHERE vt <= clock_timestamp() ORDER BY random() LIMIT 5) \
                         RETURNING 1) SELECT count(*) FROM later",
                    )
                    .await;
            }
            Fault::Hurry => {
                self.done.messages_hurried += self
                    .count_on_both_lanes(
                        "WITH sooner AS (UPDATE pgmq.q_LANE SET vt = clock_timestamp() \
                         WHERE msg_id IN (SELECT msg_id FROM pgmq.q_LANE WHERE vt > clock_timestamp() ORDER BY random() LIMIT 2) \
                         RETURNING 1) SELECT count(*) FROM sooner",
                    )
                    .await;
            }
            // An operator that has ended runs no more operations.
            Fault::Operate(operation) => drop(self.operations.send(operation)),
            Fault::Purge => {
                if let Some(double) = &self.environment.sqs_double {
                    self.done.messages_purged += double.purge();
                    self.done.purges += 1;
                }
            }
            Fault::Refuse(long) => {
                if let Some(double) = &self.environment.embedder_double {
                    double.refuse(long);
                    self.done.embedder_refusals += 1;
                }
            }
            // A storm lasts, so `run` handles it.
            Fault::Storm(..) => {}
        }
        Ok(())
    }

    /// Injects into the SQS double the faults that SQL injects into pgmq's tables.
    fn inject_into_sqs_double(&mut self, fault: Fault) {
        let Some(double) = &self.environment.sqs_double else { return };
        match fault {
            Fault::Duplicate => self.done.messages_duplicated += double.duplicate(3),
            Fault::Delay => self.done.messages_delayed += double.delay(5, Duration::from_secs(3)),
            Fault::Hurry => self.done.messages_hurried += double.make_visible(2),
            _ => {}
        }
    }

    async fn count_on_both_lanes(&self, sql: &str) -> u64 {
        let mut count = 0;
        for lane in ["live", "bulk"] {
            count += self.sql(&sql.replace("LANE", &format!("refarch_{lane}"))).await;
        }
        count
    }

    /// The count that a statement returns; 0 if the database is away, which is one of the faults.
    async fn sql(&self, sql: &str) -> u64 {
        let counted = async {
            let client = self.environment.client().await?;
            client.query_one(sql, &[]).await
        };
        counted.await.map_or(0, |row| row.get::<_, i64>(0).try_into().unwrap_or_default())
    }
}

//! Operations that operators do on a database in use. They run one at a time, while the application writes.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use tokio::process::Command;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Mutex, RwLock};
use tokio_util::sync::CancellationToken;

use super::environment::{APPLICATION_POLICY, APPLICATION_ROLE, Environment, FLEET_ROLE};
use super::processes::RoleProcesses;
use super::workload::TableShape;

/// The application's table.
const TABLE: &str = "public.products_with_increment";

/// The column that is added to the table and to the metadata.
pub const ADDED_COLUMN: &str = "stock";

/// Lock timeout of the operator's statements. It is short, because the application waits behind them.
const LOCK_TIMEOUT: &str = "1s";

/// Pause before a retry.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// How long an operation is retried: the database may be away, or the table locked.
const OPERATION_TIMEOUT: Duration = Duration::from_mins(2);

/// An operation on the database or the fleet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    /// A column is added to the table and to the settings; `migrate` runs; the fleet restarts.
    AddMetadata,
    /// The embedded column is renamed, and renamed back after this time.
    RenameColumn(Duration),
    /// The key becomes a bigint, and gets values outside of integer's range.
    WidenKey,
    /// A copy of the table takes the table's name.
    SwapTable,
    /// The triggers are disabled for this time.
    DisableTriggers(Duration),
    /// A policy shows rows to the application only, for this time.
    HideRows(Duration),
    /// The database is restored to its state of this time ago.
    Restore(Duration),
    /// `refarch migrate` runs.
    Migrate,
    /// Half of the fleet has other settings for this time.
    TwoConfigurations(Duration),
}

/// Counts of operations.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct OperationCounts {
    pub metadata_added: u64,
    pub columns_renamed: u64,
    pub keys_widened: u64,
    pub tables_swapped: u64,
    pub triggers_disabled: u64,
    pub rows_hidden: u64,
    /// Times that no worker reported a fault although rows were hidden.
    pub rows_hidden_untold: u64,
    pub databases_restored: u64,
    pub migrations: u64,
    /// Runs of `migrate` that refused because roles were running.
    pub migrations_refused: u64,
    pub fleets_of_two_configurations: u64,
}

/// Runs operations one after the other.
pub struct Operator<'a> {
    /// The environment.
    pub environment: &'a Environment,
    /// The processes, which some operations restart with other settings.
    pub processes: &'a Mutex<RoleProcesses>,
    /// The table's form, which the application must know.
    pub table_shape: &'a RwLock<TableShape>,
    /// Operations done so far.
    pub done: OperationCounts,
}

impl Operator<'_> {
    /// Runs the operations that arrive, until `over`. It finishes an operation that has begun, so that the
    /// table has its original form again.
    pub async fn run(
        &mut self,
        mut operations: UnboundedReceiver<Operation>,
        over: &CancellationToken,
    ) -> anyhow::Result<()> {
        while let Some(Some(operation)) = over.run_until_cancelled(operations.recv()).await {
            tracing::debug!(?operation, "the operator begins");
            self.operate(operation, over).await.with_context(|| format!("{operation:?}"))?;
        }
        Ok(())
    }

    async fn operate(&mut self, operation: Operation, over: &CancellationToken) -> anyhow::Result<()> {
        let pause = async |long| {
            over.run_until_cancelled(tokio::time::sleep(long)).await;
        };
        match operation {
            Operation::AddMetadata => self.add_metadata().await?,
            Operation::RenameColumn(long) => {
                self.rename("description", "descripcion").await?;
                pause(long).await;
                self.rename("descripcion", "description").await?;
                self.done.columns_renamed += 1;
            }
            Operation::WidenKey => {
                self.sql(&format!("ALTER TABLE {TABLE} ALTER id TYPE bigint")).await?;
                self.table_shape.write().await.is_wide = true;
                self.done.keys_widened += 1;
            }
            Operation::SwapTable => {
                let number = self.done.tables_swapped;
                self.sql(&format!(
                    "LOCK TABLE {TABLE} IN SHARE ROW EXCLUSIVE MODE; \
                     CREATE TABLE public.products_next_{number} (LIKE {TABLE} INCLUDING ALL); \
                     INSERT INTO public.products_next_{number} SELECT * FROM {TABLE}; \
                     GRANT SELECT ON public.products_next_{number} TO {FLEET_ROLE}; \
                     GRANT ALL ON public.products_next_{number} TO {APPLICATION_ROLE}; \
                     ALTER TABLE {TABLE} RENAME TO products_before_{number}; \
                     ALTER TABLE public.products_next_{number} RENAME TO products_with_increment"
                ))
                .await?;
                self.done.tables_swapped += 1;
            }
            Operation::DisableTriggers(long) => {
                self.sql(&format!("ALTER TABLE {TABLE} DISABLE TRIGGER USER")).await?;
                pause(long).await;
                self.sql(&format!("ALTER TABLE {TABLE} ENABLE TRIGGER USER")).await?;
                self.done.triggers_disabled += 1;
            }
            Operation::HideRows(long) => {
                let hidden_at = self.database_time().await?;
                self.sql(&format!(
                    "CREATE POLICY application ON {TABLE} USING ({APPLICATION_POLICY}); \
                     ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; ALTER TABLE {TABLE} FORCE ROW LEVEL SECURITY"
                ))
                .await?;
                pause(long).await;
                // The index does not change either way. Only the fault shows whether the workers noticed.
                let told = over.run_until_cancelled(self.is_told_of_hidden_rows(&hidden_at)).await;
                self.done.rows_hidden_untold += u64::from(told == Some(false));
                self.sql(&format!(
                    "DROP POLICY application ON {TABLE}; \
                     ALTER TABLE {TABLE} NO FORCE ROW LEVEL SECURITY; ALTER TABLE {TABLE} DISABLE ROW LEVEL SECURITY"
                ))
                .await?;
                self.done.rows_hidden += 1;
            }
            // pgvector is restored together with the database, so there is nothing to test.
            Operation::Restore(_) if self.environment.pinecone_double.is_none() => {}
            Operation::Restore(ago) => {
                self.environment.while_database_is_stopped(|data| copy(data, &copy_path(data))).await?;
                pause(ago).await;
                // The lock keeps the application from writing until it knows that the database was restored.
                let mut table_shape = self.table_shape.write().await;
                self.environment
                    .while_database_is_stopped(|data| {
                        std::fs::remove_dir_all(data)
                            .and_then(|()| std::fs::rename(copy_path(data), data))
                            .context("replace the database by its copy")
                    })
                    .await?;
                table_shape.was_restored = true;
                self.done.databases_restored += 1;
            }
            Operation::Migrate => {
                if self.migrate().await? {
                    self.done.migrations += 1;
                } else {
                    self.done.migrations_refused += 1;
                }
            }
            Operation::TwoConfigurations(long) => {
                let fewer: Vec<String> =
                    self.environment.metadata().into_iter().filter(|column| column != "uuid").collect();
                let other = [("REFARCH_SOURCE_METADATA".to_owned(), fewer.join(","))];
                self.processes.lock().await.reconfigure_half(&other).await?;
                pause(long).await;
                self.processes.lock().await.reconfigure_all(self.environment.variables()).await?;
                self.done.fleets_of_two_configurations += 1;
            }
        }
        Ok(())
    }

    async fn add_metadata(&mut self) -> anyhow::Result<()> {
        self.sql(&format!(
            "ALTER TABLE {TABLE} ADD COLUMN IF NOT EXISTS {ADDED_COLUMN} text DEFAULT 'plenty'"
        ))
        .await?;
        self.environment.add_metadata(ADDED_COLUMN);
        if !self.migrate().await? {
            self.done.migrations_refused += 1;
            // Hold the lock: otherwise the fleet would be restarted meanwhile.
            let mut processes = self.processes.lock().await;
            processes.stop().await?;
            // A killed process counts as running for a while.
            let started = Instant::now();
            while !self.migrate().await? {
                anyhow::ensure!(
                    started.elapsed() < OPERATION_TIMEOUT,
                    "migrate still refuses after {OPERATION_TIMEOUT:?} although no role runs: see migrate.log"
                );
            }
        }
        self.done.migrations += 1;
        self.processes.lock().await.reconfigure_all(self.environment.variables()).await?;
        self.done.metadata_added += 1;
        Ok(())
    }

    /// Renames a column while the application does not write, and passes the new name on.
    async fn rename(&self, from: &str, to: &str) -> anyhow::Result<()> {
        let mut table_shape = self.table_shape.write().await;
        self.sql(&format!("ALTER TABLE {TABLE} RENAME {from} TO {to}")).await?;
        to.clone_into(&mut table_shape.description);
        Ok(())
    }

    /// Runs statements in one transaction. Retries until they succeed.
    async fn sql(&self, statements: &str) -> anyhow::Result<()> {
        let sql = format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {statements}; COMMIT");
        let started = Instant::now();
        loop {
            let done = async {
                let client = self.environment.client().await?;
                client.batch_execute(&sql).await
            };
            let Err(error) = done.await else { return Ok(()) };
            let passes =
                error.code().is_none_or(|code| matches!(&code.code()[..2], "08" | "40" | "53" | "55" | "57"));
            if !passes || started.elapsed() > OPERATION_TIMEOUT {
                return Err(error).with_context(|| format!("the operator's statements: {statements}"));
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// The database's clock, as text.
    async fn database_time(&self) -> anyhow::Result<String> {
        let started = Instant::now();
        loop {
            let asked = async {
                let row =
                    self.environment.client().await?.query_one("SELECT clock_timestamp()::text", &[]).await?;
                Ok::<_, tokio_postgres::Error>(row.get(0))
            };
            match asked.await {
                Err(_) if started.elapsed() < OPERATION_TIMEOUT => tokio::time::sleep(RETRY_PAUSE).await,
                time => return time.context("ask the database's time"),
            }
        }
    }

    /// Waits until a worker reports, after the time `since`, that rows are hidden from it; false if none does.
    async fn is_told_of_hidden_rows(&self, since: &str) -> bool {
        let sql = format!(
            "SELECT EXISTS (SELECT FROM refarch.fault WHERE seen_at >= '{since}' AND message LIKE '%BYPASSRLS%')"
        );
        let started = Instant::now();
        loop {
            let asked = async { self.environment.client().await?.query_one(&sql, &[]).await };
            if asked.await.is_ok_and(|row| row.get(0)) {
                return true;
            }
            if started.elapsed() > OPERATION_TIMEOUT {
                return false;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Runs `refarch migrate` with the current settings, up to three times; false if all runs failed.
    async fn migrate(&self) -> anyhow::Result<bool> {
        for _ in 0..3 {
            if self.run_migrate().await? {
                return Ok(true);
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        Ok(false)
    }

    async fn run_migrate(&self) -> anyhow::Result<bool> {
        let path = self.environment.dir.join("migrate.log");
        let log = std::fs::File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let status = Command::new(std::env::current_exe().context("find this executable")?)
            .arg("migrate")
            .env_clear()
            .envs(self.environment.variables())
            // The fleet's database role owns nothing, so migrate connects as the superuser.
            .env("DATABASE_URL", self.environment.url().expose())
            .current_dir(&self.environment.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .status();
        let status = tokio::time::timeout(OPERATION_TIMEOUT, status)
            .await
            .context("refarch migrate did not end in time: see migrate.log")??;
        Ok(status.success())
    }
}

/// Path of the copy of a data directory.
fn copy_path(data: &Path) -> PathBuf {
    data.with_extension("copy")
}

/// Copies a folder with its owners and permissions.
fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
    anyhow::ensure!(status.context("run cp")?.success(), "cannot copy {}", from.display());
    Ok(())
}

//! The command line: types only.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::config::Override;

const AFTER_HELP: &str = "\
Without a database setting, every role uses a private PostgreSQL under .refarch/ (see scripts/setup).
With DATABASE_URL, or POSTGRES_DB_HOST, _PORT, _NAME, _USER and _PASSWORD, every role uses that database.

Start here:
  refarch up                   run every role on this machine, with 10,000 generated products
  refarch status --watch       show what is pending, in flight and in sync
  refarch config               print every setting and its value

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 forced by a second stop signal.";

const AFTER_REDRIVE_HELP: &str = "\
A dead letter is a change (or a message) that refarch gave up, stored with the reason. Repair the
cause first. Otherwise the change fails again and becomes a dead letter again.

  refarch redrive                    list the dead letters with their reasons, newest last
  refarch redrive --all --dry-run    show how many dead letters would be queued again
  refarch redrive --all              queue all present dead letters again
  refarch redrive --id 7 --id 9      queue only these two again

refarch embed or refarch up then applies the changes. Queueing a change twice is safe: the row is
read again. If an --id does not exist, the other dead letters are queued, and the exit code is 1.";

/// Keeps a semantic search index in sync with a PostgreSQL table, and proves it row by row.
#[derive(Debug, Parser)]
#[command(name = "refarch", version, after_help = AFTER_HELP, propagate_version = true)]
pub struct Cli {
    /// Settings for every role.
    #[command(flatten)]
    pub global: Global,
    /// The role to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every role.
#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file (TOML) [default: refarch.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE", env = "REFARCH_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// Format of the log on standard error
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Log level: error, warn, info, debug or trace; or one per module, as in refarch=debug,warn
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// One line for each event, for people.
    Text,
    /// One JSON object for each event, for programs.
    Json,
}

/// The roles.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run every role in one process: fill an empty table, embed its rows, serve the web page
    Up(Up),
    /// Serve the web page and the HTTP API
    Serve(Serve),
    /// Read committed changes from PostgreSQL and send them to the queue
    Listen(Listen),
    /// Receive changes from the queue, embed texts, upsert and delete vectors
    Embed(Embed),
    /// Generate fake products, as CSV or directly into the table
    Generate(Generate),
    /// Create or update the schema, and arm change capture on the table
    Migrate(Migrate),
    /// Show counts, backlog, freshness and workers
    Status(Status),
    /// Compare index and table row by row, and repair differences on request
    Verify(Verify),
    /// Inject faults on a private database, then prove that index and table agree
    Chaos(Chaos),
    /// List the dead letters, or queue them again
    Redrive(Redrive),
    /// Print the settings in use as TOML, without secrets
    Config,
    /// Open psql on the database in use
    Psql(Psql),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `refarch up`
#[derive(Debug, Args)]
pub struct Up {
    /// Number of products to generate if the table is empty [default: 10000]
    #[arg(long, value_name = "N")]
    pub products: Option<u64>,
    /// Number of embedding threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<usize>,
    /// Address of the web page [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Print a summary and exit as soon as every row is searchable
    #[arg(long)]
    pub until_synced: bool,
    /// With --until-synced: print the summary as JSON
    #[arg(long, requires = "until_synced")]
    pub json: bool,
}

/// `refarch serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// Address of the web page [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
}

/// `refarch listen`
#[derive(Debug, Args)]
pub struct Listen {
    /// Exit as soon as no change is pending
    #[arg(long)]
    pub until_idle: bool,
}

/// `refarch embed`
#[derive(Debug, Args)]
pub struct Embed {
    /// Number of embedding threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<usize>,
    /// Exit as soon as the queue is empty
    #[arg(long)]
    pub until_idle: bool,
}

/// `refarch generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// Number of products
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub count: u64,
    /// Random seed; the same seed gives the same bytes
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// CSV file to write; - is standard output
    #[arg(long, short, value_name = "FILE", default_value = "products.csv", conflicts_with = "load")]
    pub output: PathBuf,
    /// Load the products into the table with COPY, without a file
    #[arg(long)]
    pub load: bool,
}

const MIGRATE_HELP: &str = "\
Safe to repeat, and safe on a table in use. Migrate changes only what is not up to date. No writer waits
longer than one or two seconds. Migrate queues existing rows at the end, in many short steps.
Migrate also converts a database of Pinecone's reference architecture: one transaction removes the old
triggers from the table and adds the triggers of refarch. Then every row is queued once.

  refarch migrate --dry-run            print what migrate would do
  refarch migrate                      do it
  refarch migrate --rebuild            also replace the index if the settings ask for another one:
                                       the old index is removed, and every row is indexed again
  refarch migrate --roles listen=a,embed=b,serve=c,verify=d
                                       grant database roles the rights that they need, and no more;
                                       add edit=c if the web page may change rows
  refarch migrate --uninstall          print what uninstall would remove
  refarch migrate --uninstall --yes    remove it; the table and its rows stay

Exit codes: 0 done (or nothing to do), 1 failed, 2 not uninstalled because --yes was missing.";

/// `refarch migrate`
#[derive(Debug, Args)]
#[command(after_help = MIGRATE_HELP)]
#[allow(clippy::struct_excessive_bools, reason = "each is a separate flag")]
pub struct Migrate {
    /// Print what migrate would do, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Remove the index if the settings ask for another one: another model, text column or table
    #[arg(long, conflicts_with = "uninstall")]
    pub rebuild: bool,
    /// Grant the database role NAME the rights of ROLE: listen, embed, serve, verify or edit
    #[arg(long, value_name = "ROLE=NAME", value_delimiter = ',', value_parser = grant, conflicts_with = "uninstall")]
    pub roles: Vec<(String, String)>,
    /// Remove refarch from the database; the table and its rows stay
    #[arg(long)]
    pub uninstall: bool,
    /// With --uninstall: do it; without --yes, only print what would be removed
    #[arg(long, requires = "uninstall", conflicts_with = "dry_run")]
    pub yes: bool,
    /// With --uninstall: uninstall even while roles are running
    #[arg(long, requires = "uninstall")]
    pub force: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

/// `refarch status`
#[derive(Debug, Args)]
pub struct Status {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Print again every second until stopped
    #[arg(long)]
    pub watch: bool,
}

const CHAOS_HELP: &str = "\
Runs on a private database, which is removed afterwards. Your own data is not touched. Chaos kills,
freezes and restarts the roles, restarts the database and cuts connections. It duplicates, delays and
reorders messages. It makes the index fail and return wrong answers. Meanwhile a writer inserts, updates,
deletes and truncates. Then the faults and the writes stop, and every row and record is compared.

Exit codes: 0 nothing is missing, stale or orphaned, 1 something is, 2 could not tell.";

/// `refarch chaos`
#[derive(Debug, Args)]
#[command(after_help = CHAOS_HELP)]
pub struct Chaos {
    /// Number of products in the table at the start
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    pub products: u64,
    /// Duration of the faults, in minutes
    #[arg(long, value_name = "M", default_value_t = 2.0, value_parser = minutes)]
    pub minutes: f64,
    /// Random seed; the same seed gives the same schedule of faults
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// Vector index to write to
    #[arg(long, value_enum, value_name = "KIND", default_value = "pinecone")]
    pub index: ChaosIndex,
    /// Queue between listen and embed
    #[arg(long, value_enum, value_name = "KIND", default_value = "pgmq")]
    pub queue: ChaosQueue,
    /// Embedder that turns text into vectors
    #[arg(long, value_enum, value_name = "KIND", default_value = "minilm")]
    pub embedder: ChaosEmbedder,
    /// Only these kinds of faults, separated by commas [default: all]
    #[arg(long, value_enum, value_name = "KINDS", value_delimiter = ',')]
    pub faults: Vec<ChaosFault>,
    /// Run without the continuous proof
    // The continuous proof repairs nearly every mistake before the comparison. Without the proof, a lost
    // message stays lost, which shows that the drill notices the loss.
    #[arg(long, hide = true)]
    pub no_proof: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Vector indexes for `refarch chaos`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosIndex {
    /// Test double of Pinecone in this process, which fails, answers late and answers wrongly
    Pinecone,
    /// pgvector, in the private database
    Pgvector,
}

/// Embedders for `refarch chaos`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosEmbedder {
    /// The model on this machine
    Minilm,
    /// Test double of an embedding server in this process, with meaningless vectors; can refuse every text
    Double,
}

/// Faults that `refarch chaos` injects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosFault {
    /// Kill processes
    Kill,
    /// Freeze processes for a while
    Freeze,
    /// Crash or restart the database
    Restart,
    /// Cut connections to the database
    Cut,
    /// Queue messages twice
    Duplicate,
    /// Delay messages
    Delay,
    /// Make messages visible while a worker holds them
    Hurry,
    /// Make the index fail more often than usual
    Storm,
    /// Truncate the table
    Truncate,
    /// Add a column to the table and to the metadata
    Metadata,
    /// Rename the embedded column for a while
    Rename,
    /// Widen the type of the key
    Widen,
    /// Swap the table for a copy
    Swap,
    /// Disable the triggers for a while
    Disable,
    /// Restore the database to an earlier state (only if the index is outside the database)
    Restore,
    /// Hide rows from refarch with a row security policy for a while
    RowSecurity,
    /// Run `refarch migrate`
    Migrate,
    /// Give half of the processes other settings for a while
    Configurations,
    /// Purge the queue (only sqs)
    Purge,
    /// Make the embedder refuse every text for a while (only the embedder double)
    Refuse,
}

/// Queues for `refarch chaos`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosQueue {
    /// pgmq, in the private database
    Pgmq,
    /// Test double of SQS in this process, which fails, answers wrongly and delivers twice
    Sqs,
}

const VERIFY_HELP: &str = "\
Safe while writes go on: rows that differ are compared again until their changes are applied.

Exit codes: 0 index and table agree, 1 they differ (even if repaired), 2 could not tell.";

/// `refarch verify`
#[derive(Debug, Args)]
#[command(after_help = VERIFY_HELP)]
pub struct Verify {
    /// Embed this many rows again and compare their vectors with the index
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub sample: usize,
    /// Queue every row that differs, and arm change capture where it is not armed
    #[arg(long)]
    pub repair: bool,
    /// Wait up to this long for changes in the outbox and the queue
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub wait: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `refarch redrive`
#[derive(Debug, Args)]
#[command(after_help = AFTER_REDRIVE_HELP, group(ArgGroup::new("letters").args(["id", "all"])))]
pub struct Redrive {
    /// Queue the dead letter with this id again; can be repeated
    #[arg(long, value_name = "ID")]
    pub id: Vec<String>,
    /// Queue all present dead letters again
    #[arg(long)]
    pub all: bool,
    /// Print what would be queued, and change nothing
    #[arg(long, requires = "letters")]
    pub dry_run: bool,
    /// Print one JSON object; in a list, one object for each dead letter
    #[arg(long)]
    pub json: bool,
}

/// `refarch psql`
#[derive(Debug, Args)]
pub struct Psql {
    /// Arguments for psql
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub args: Vec<std::ffi::OsString>,
}

fn grant(text: &str) -> Result<(String, String), String> {
    let parts = crate::backend::postgres::migrate::PARTS;
    match text.split_once('=') {
        Some((part, name)) if parts.contains(&part) && !name.is_empty() => Ok((part.into(), name.into())),
        _ => Err(format!("use ROLE=NAME, where ROLE is one of {}", parts.join(", "))),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.05..=10_000.0).contains(&minutes) => Ok(minutes),
        _ => Err("use a number of minutes from 0.05 to 10000".into()),
    }
}

fn workers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("use 1 to 1024 embedding threads".into()),
    }
}

impl Cli {
    /// The settings that the flags set.
    #[must_use]
    pub fn overrides(&self) -> Vec<Override> {
        let mut list = Vec::new();
        let mut set = |flag, key, value: Option<String>| {
            list.extend(value.map(|value| Override { flag, key, value }));
        };
        let format = self.global.log_format.map(|format| match format {
            LogFormat::Text => "text".to_owned(),
            LogFormat::Json => "json".to_owned(),
        });
        set("--log-format", "log.format", format);
        set("--log-level", "log.level", self.global.log_level.clone());
        let (bind, workers) = match &self.command {
            Command::Up(up) => {
                set("--products", "up.products", up.products.map(|n| n.to_string()));
                (up.bind, up.workers)
            }
            Command::Serve(serve) => (serve.bind, None),
            Command::Embed(embed) => (None, embed.workers),
            _ => (None, None),
        };
        set("--bind", "serve.bind", bind.map(|b| b.to_string()));
        set("--workers", "indexer.workers", workers.map(|n| n.to_string()));
        list
    }

    /// Whether the command's standard output is its result. Then only warnings are logged.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        !matches!(self.command, Command::Up(_) | Command::Serve(_) | Command::Listen(_) | Command::Embed(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}

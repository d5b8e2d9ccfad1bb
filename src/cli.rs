//! The command line: types only.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::config::Override;

const AFTER_HELP: &str = "\
Without a database setting, every role uses a private PostgreSQL under .refarch/ (see scripts/setup).
With DATABASE_URL, or POSTGRES_DB_HOST, _PORT, _NAME, _USER and _PASSWORD, it uses that database.

Start here:
  refarch up                   everything on this machine, with 10,000 products
  refarch status --watch       what is pending, in flight and in sync
  refarch config               every setting and its value

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 forced by a second stop signal.";

const AFTER_REDRIVE_HELP: &str = "\
A dead letter is a change (or a message) that was given up, with the reason. Mend the cause
first, or what goes back comes to lie here again.

  refarch redrive                    what lies here, and why; the newest last
  refarch redrive --all --dry-run    how much would go back
  refarch redrive --all              bring back everything that lies here now
  refarch redrive --id 7 --id 9      bring back these two only

What goes back is worked off by refarch embed or refarch up. Bringing a change back twice does
no harm: the row is read anew. An --id that is not there fails, after the others went back.";

/// Keeps a semantic search index in step with a PostgreSQL table, and proves that it is.
#[derive(Debug, Parser)]
#[command(name = "refarch", version, after_help = AFTER_HELP, propagate_version = true)]
pub struct Cli {
    /// Settings that hold for every role.
    #[command(flatten)]
    pub global: Global,
    /// The role to take.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every role takes.
#[derive(Debug, Args)]
pub struct Global {
    /// Configuration file (TOML) [default: refarch.toml, if there is one]
    #[arg(long, global = true, value_name = "FILE", env = "REFARCH_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// How logs are written to standard error
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or per module as in refarch=debug,warn
    #[arg(long, global = true, value_name = "FILTER")]
    pub log_level: Option<String>,
}

/// How logs are written.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum LogFormat {
    /// One line an event, for people.
    Text,
    /// One JSON object an event, for machines.
    Json,
}

/// The roles.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run every role in one process: fill an empty table, embed it, serve the page
    Up(Up),
    /// Serve the web page and the HTTP API
    Serve(Serve),
    /// Capture committed changes from PostgreSQL and put jobs on the queue
    Listen(Listen),
    /// Take jobs, embed texts, upsert or delete vectors
    Embed(Embed),
    /// Make fake products, as CSV or straight into the table
    Generate(Generate),
    /// Create or update the schema, and arm change capture on the table
    Migrate(Migrate),
    /// Show counts, backlog, freshness and workers
    Status(Status),
    /// Prove that index and table agree, row by row, and repair what does not
    Verify(Verify),
    /// Let everything go wrong on a private database, and prove that index and table agree afterwards
    Chaos(Chaos),
    /// List the dead letters, or bring them back into work
    Redrive(Redrive),
    /// Print the resolved settings as TOML, secrets hidden
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
    /// Products to generate when the table is empty [default: 10000]
    #[arg(long, value_name = "N")]
    pub products: Option<u64>,
    /// Embedding threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<usize>,
    /// Address of the web page [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Print a summary and exit once every row is searchable
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
    /// Work until nothing is pending, then exit
    #[arg(long)]
    pub until_idle: bool,
}

/// `refarch embed`
#[derive(Debug, Args)]
pub struct Embed {
    /// Embedding threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<usize>,
    /// Work until the queue is empty, then exit
    #[arg(long)]
    pub until_idle: bool,
}

/// `refarch generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// How many products
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub count: u64,
    /// Same seed, same bytes
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// Where the CSV goes; - is standard output
    #[arg(long, short, value_name = "FILE", default_value = "products.csv", conflicts_with = "load")]
    pub output: PathBuf,
    /// Load into the table by COPY, with no file in between
    #[arg(long)]
    pub load: bool,
}

const MIGRATE_HELP: &str = "\
Safe to run again and again, and on a table in use: what is as it should be is left alone, no writer waits
longer than a second or two, and rows that are there already are queued at the end, in many short steps.
A database of Pinecone's reference architecture is taken over: its triggers come off the table in
the transaction that puts refarch's on, and every row is queued once.

  refarch migrate --dry-run            what would be done
  refarch migrate                      do it
  refarch migrate --rebuild            also when the settings ask for another index than the one there:
                                       that one is taken away, and filled anew
  refarch migrate --roles listen=a,embed=b,serve=c,verify=d
                                       give roles of the database the rights that they need, and no more;
                                       edit=c as well if the page may change rows
  refarch migrate --uninstall          what would be taken away again
  refarch migrate --uninstall --yes    take it away; the table and its rows stay

Exit codes: 0 done (or nothing to do), 1 failed, 2 not uninstalled, since --yes was missing.";

/// `refarch migrate`
#[derive(Debug, Args)]
#[command(after_help = MIGRATE_HELP)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Migrate {
    /// Print what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Take the index away if the settings ask for another one: other model, text columns, table
    #[arg(long, conflicts_with = "uninstall")]
    pub rebuild: bool,
    /// Give these roles of the database the rights of listen, embed, serve, verify or edit
    #[arg(long, value_name = "ROLE=NAME", value_delimiter = ',', value_parser = grant, conflicts_with = "uninstall")]
    pub roles: Vec<(String, String)>,
    /// Take everything of refarch out of the database again, but for the table and its rows
    #[arg(long)]
    pub uninstall: bool,
    /// With --uninstall: do it; without, it is only printed what would go
    #[arg(long, requires = "uninstall", conflicts_with = "dry_run")]
    pub yes: bool,
    /// With --uninstall: also while roles are running
    #[arg(long, requires = "uninstall")]
    pub force: bool,
    /// Print what was done as JSON
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
Works on a private database of its own, which is removed afterwards; nothing of yours is touched. Kills,
freezes and restarts the roles, restarts the database, cuts connections, duplicates, delays and reorders
messages, and makes the index fail and lie, while a writer inserts, updates, deletes and truncates. Then
all is quiet, and every row and record is compared.

Exit codes: 0 nothing is missing, stale or orphaned, 1 something is, 2 could not tell.";

/// `refarch chaos`
#[derive(Debug, Args)]
#[command(after_help = CHAOS_HELP)]
pub struct Chaos {
    /// Products in the table at the start
    #[arg(long, value_name = "N", default_value_t = 2_000)]
    pub products: u64,
    /// How long things go wrong
    #[arg(long, value_name = "M", default_value_t = 2.0, value_parser = minutes)]
    pub minutes: f64,
    /// The same seed gives the same schedule of faults
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// The index that is written to
    #[arg(long, value_enum, value_name = "KIND", default_value = "pinecone")]
    pub index: ChaosIndex,
    /// The queue that changes travel on
    #[arg(long, value_enum, value_name = "KIND", default_value = "pgmq")]
    pub queue: ChaosQueue,
    /// What turns text into vectors
    #[arg(long, value_enum, value_name = "KIND", default_value = "minilm")]
    pub embedder: ChaosEmbedder,
    /// Only these kinds of faults, by commas; all unless given
    #[arg(long, value_enum, value_name = "KINDS", value_delimiter = ',')]
    pub faults: Vec<ChaosFault>,
    /// No continuous proof
    // With the proof, nearly every mistake is healed before the comparison. Without it a message that was lost
    // stays lost, so that one can see that the drill notices.
    #[arg(long, hide = true)]
    pub no_proof: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// The indexes that chaos can be tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosIndex {
    /// A double of Pinecone's in this process, which fails, lies and is late
    Pinecone,
    /// pgvector, in the private database
    Pgvector,
}

/// The embedders that chaos can be tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosEmbedder {
    /// The model on this machine
    Minilm,
    /// A double of a server in this process, whose vectors mean nothing, and which can refuse every text
    Double,
}

/// What chaos can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosFault {
    /// Processes are killed
    Kill,
    /// Processes are frozen for a while
    Freeze,
    /// The database crashes or is restarted
    Restart,
    /// Connections to the database are cut
    Cut,
    /// Messages are queued twice
    Duplicate,
    /// Messages are delayed
    Delay,
    /// Messages that are held can be received by others
    Hurry,
    /// The index fails more than usual
    Storm,
    /// The table is truncated
    Truncate,
    /// A column is added to the table and to the metadata
    Metadata,
    /// The embedded column is renamed for a while
    Rename,
    /// The key is widened
    Widen,
    /// The table is swapped for a copy
    Swap,
    /// Triggers are disabled for a while
    Disable,
    /// The database is put back to an earlier state (index outside the database)
    Restore,
    /// A policy shows rows to the application only, for a while
    RowSecurity,
    /// `refarch migrate` runs
    Migrate,
    /// Half of the fleet has other settings for a while
    Configurations,
    /// The queue is purged (sqs)
    Purge,
    /// The embedder refuses every text for a while (embedder double)
    Refuse,
}

/// The queues that chaos can be tried on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ChaosQueue {
    /// pgmq, in the private database
    Pgmq,
    /// A double of SQS in this process, which fails, lies and delivers twice
    Sqs,
}

const VERIFY_HELP: &str = "\
Safe while writes go on: what differs is looked at again until its changes are through.

Exit codes: 0 index and table agree, 1 they differ (also when it was repaired), 2 could not tell.";

/// `refarch verify`
#[derive(Debug, Args)]
#[command(after_help = VERIFY_HELP)]
pub struct Verify {
    /// Embed this many rows anew and compare the vectors
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub sample: usize,
    /// Queue what differs, to be done again; arm capture where it is not
    #[arg(long)]
    pub repair: bool,
    /// Wait up to this long for changes that are under way
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
    /// Bring back the dead letter with this id; may be given several times
    #[arg(long, value_name = "ID")]
    pub id: Vec<String>,
    /// Bring back every dead letter that is there now
    #[arg(long)]
    pub all: bool,
    /// Say what would go back, and change nothing
    #[arg(long, requires = "letters")]
    pub dry_run: bool,
    /// Print one JSON object; for the list, one a line
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
        _ => Err(format!("use ROLE=NAME, with one of {} as the role", parts.join(", "))),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.05..=10_000.0).contains(&minutes) => Ok(minutes),
        _ => Err("use 0.05 to 10000 minutes".into()),
    }
}

fn workers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("use 1 to 1024 embedding threads".into()),
    }
}

impl Cli {
    /// The settings that flags set, each for its key.
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

    /// Whether the command's output is its result, so that only warnings are logged.
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

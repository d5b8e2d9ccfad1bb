//! The flags of `refarch chaos`.

use clap::{Args, ValueEnum};

use super::admin::Admin;
use super::help::CHAOS_HELP;

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
    /// The admin endpoint.
    #[command(flatten)]
    pub admin: Admin,
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

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (0.05..=10_000.0).contains(&minutes) => Ok(minutes),
        _ => Err("use a number of minutes from 0.05 to 10000".into()),
    }
}

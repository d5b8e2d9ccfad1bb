//! Measures refarch's search from outside: a built `refarch`, its settings, its HTTP API, and SQL.
//!
//! Each mode builds its index anew in a folder with a loaded database. Then questions are asked over HTTP by one
//! or more clients, rows are edited into texts that are unlike all others, and more rows are loaded. Recall is
//! counted by score against an exact search of this program among the stored vectors. Run this bench with
//! `scripts/bench search`.

#![forbid(unsafe_code)]

mod binary;
mod corpus;
mod database;
mod latency;
#[path = "../../encoder/src/machine.rs"]
mod machine;
mod measure;
mod mode;
mod peers;
mod questions;
mod report;
mod stray_texts;
mod strays;
mod undo;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use serde_json::json;

use binary::Binary;
use database::Database;
use measure::{Bench, Figures};
use mode::Mode;
use undo::Undo;

/// Measures refarch's search, and compares its index with other engines
#[derive(Parser)]
pub struct Arguments {
    /// Number of products
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(200..))]
    rows: u64,
    /// A folder with a loaded private database, as its .refarch or itself; then --rows is ignored [default: a
    /// folder for each number of rows beside the binary, loaded once]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Numbers of clients that search at the same time
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    clients: Vec<usize>,
    /// Ways to search (the setting index.search)
    #[arg(long, value_enum, value_delimiter = ',', default_value = "exact,lists,graph,auto")]
    modes: Vec<Mode>,
    /// Number of questions in a run
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    queries: u32,
    /// Number of runs; times are medians over the runs
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// For each mode, also search while this many more products are loaded; they are deleted afterwards
    #[arg(long, value_name = "N", default_value_t = 0)]
    while_loading: u64,
    /// The measured binary [default: refarch beside this program]
    #[arg(long, value_name = "PATH")]
    refarch: Option<PathBuf>,
    /// Also measure faiss and usearch on the same vectors
    #[arg(long)]
    peers: bool,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(!arguments.clients.contains(&0), "--clients takes numbers from 1");
    let installed = PathBuf::from(std::env::var("REFARCH_RUNTIME_DIR").unwrap_or_else(|_| ".refarch".into()));
    let binary = open_binary(&arguments, &installed)?;
    let mut modes = Vec::new();
    for &mode in &arguments.modes {
        modes.push((mode, binary.settings(mode).await?));
    }
    load_once(&arguments, &binary).await?;
    let undo = Undo::new(&binary.folder);
    let database = Database::open(&binary).await?;
    if undo.restore(&database).await? {
        eprintln!("an earlier run was interrupted: its changes are undone");
    }
    binary.settle().await?;
    let (rows, _) = database.products().await?;
    ensure!(
        arguments.dir.is_some() || rows as u64 == arguments.rows,
        "{} holds {rows} products and not {}: remove this folder",
        binary.folder.display(),
        arguments.rows
    );
    println!(
        "{}, {} cores; {}; {rows} products, {} questions, {} runs",
        machine::cpu(),
        machine::cores(),
        database.versions().await?,
        arguments.queries,
        arguments.runs
    );
    let mut bench = Bench::new(&arguments, &binary, &database, undo).await?;
    for (mode, settings) in &modes {
        bench.measure(*mode, settings).await?;
    }
    let mut others = Vec::new();
    if arguments.peers {
        let python = installed.join("runtime/search-peers/bin/python");
        others = peers::measure(
            &python,
            &binary.folder,
            &bench.corpus,
            &bench.queries,
            &bench.exact,
            arguments.runs,
        )?;
    }
    let Figures { search, index, stray, page } = &bench.figures;
    report::print("index", INDEX_COLUMNS, index);
    report::print("GET /api/v1/search, the query's embedding included", SEARCH_COLUMNS, search);
    report::print("rows edited into texts unlike all others: how many are found", STRAY_COLUMNS, stray);
    report::print("status and pages", PAGE_COLUMNS, page);
    report::print("other engines, in process, one thread for each query", PEER_COLUMNS, &others);
    if let Some(file) = &arguments.json {
        let report = json!({
            "machine": { "cpu": machine::cpu(), "cores": machine::cores(), "database": database.versions().await? },
            "benches": {
                "search": search, "search_index": index, "search_stray": stray, "search_page": page,
                "search_peers": others,
            },
        });
        std::fs::write(file, report.to_string() + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    database.close().await
}

const INDEX_COLUMNS: &[&str] = &[
    "mode",
    "index",
    "build_s",
    "build_peak_mib",
    "index_mib",
    "vectors_mib",
    "lists",
    "probes",
    "recall_at_10",
    "recall_at_10_least",
    "recall_by_refarch",
];
const SEARCH_COLUMNS: &[&str] = &[
    "mode",
    "clients",
    "texts",
    "loading",
    "queries",
    "p50_ms",
    "p99_ms",
    "searches_per_s",
    "loaded_rows_per_s",
];
const STRAY_COLUMNS: &[&str] = &["mode", "asked_by", "strays", "first", "among_ten", "first_exact"];
const PAGE_COLUMNS: &[&str] = &["path", "requests", "p50_ms", "most_ms", "refused"];
const PEER_COLUMNS: &[&str] = &[
    "engine",
    "version",
    "precision",
    "setting",
    "build_s",
    "index_mib",
    "peak_mib",
    "p50_ms",
    "p99_ms",
    "recall_at_10",
    "recall_at_10_least",
];

fn open_binary(arguments: &Arguments, installed: &Path) -> Result<Binary> {
    let this = std::env::current_exe()?;
    let beside = this.parent().context("this program is in no folder")?;
    let path = arguments.refarch.clone().unwrap_or_else(|| beside.join("refarch"));
    let folder = match &arguments.dir {
        Some(folder) => {
            ensure!(folder.is_dir(), "there is no folder {}", folder.display());
            folder.clone()
        }
        // In the target folder: beside `release`.
        None => beside.with_file_name("bench").join("search").join(arguments.rows.to_string()),
    };
    let path = path.canonicalize().with_context(|| format!("there is no binary {}", path.display()))?;
    Binary::new(path, &folder, installed)
}

/// Fills a new folder with products.
async fn load_once(arguments: &Arguments, binary: &Binary) -> Result<()> {
    if arguments.dir.is_some() {
        ensure!(binary.has_database(), "{} has no private database", binary.folder.display());
        return Ok(());
    }
    let done = binary.folder.join("bench-loaded");
    if done.exists() {
        return Ok(());
    }
    eprintln!("loading {} products into {}", arguments.rows, binary.folder.display());
    let rows = arguments.rows.to_string();
    let args = ["up", "--until-synced", "--products", &rows, "--bind", "127.0.0.1:0"];
    let summary = binary.output(&[], &args).await?;
    std::fs::write(done, &summary)?;
    eprint!("{summary}");
    Ok(())
}

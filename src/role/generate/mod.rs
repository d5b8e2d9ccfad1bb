//! `refarch generate`: fake products for load tests, as CSV or directly into the table.

pub mod fake_products;
pub mod vocabulary;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc as blocking;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::SinkExt as _;
use rayon::prelude::*;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::harness::Process;
use super::progress::Progress;
use crate::backend::Database;
use crate::cli;
use crate::config::Settings;
use fake_products::{FakeProducts, MAX_COUNT, ProductText};

/// Columns of the CSV, in the reference architecture's order.
pub const COLUMNS: [&str; 5] = ["name", "sku", "description", "price", "last_updated"];

/// Products in a block, the unit of work of a thread: about 2 MB of CSV.
const BLOCK: u64 = 8_192;

/// Blocks for each thread in a round. A round is written as a whole; several blocks balance the threads.
const BLOCKS_PER_THREAD: u64 = 4;

/// Finished rounds that may wait for a slow reader.
const ROUNDS_AHEAD: usize = 1;

/// Runs the role.
pub async fn run(args: &cli::Generate, settings: &Settings) -> anyhow::Result<()> {
    if args.count > MAX_COUNT {
        bail!("--count {} is too large: use at most {MAX_COUNT}, so that SKUs stay unique", args.count);
    }
    // A signal ends it at once: what it made so far is not kept.
    let process = Process::with_stop("generate", settings, CancellationToken::new()).await?;
    let progress =
        Progress::new("generating products", args.count).counting(Arc::clone(&process.observed.generated));
    process.exporting(Box::pin(generate(args, settings, progress))).await
}

async fn generate(args: &cli::Generate, settings: &Settings, progress: Progress) -> anyhow::Result<()> {
    if args.load {
        return super::harness::with_database(settings, async |database: &Database| {
            let backends = super::harness::open_backends(database, settings, None).await?;
            let client = backends.postgres.client().await?;
            load(&client, &backends.generation.table.relation, args.count, args.seed, &progress).await?;
            progress.finish();
            Ok(())
        })
        .await;
    }
    let (count, seed, path) = (args.count, args.seed, args.output.clone());
    tokio::task::spawn_blocking(move || {
        write(&path, count, seed, &progress)?;
        progress.finish();
        Ok(())
    })
    .await?
}

/// Streams products into a table with COPY. `table` is the quoted name.
pub async fn load(
    client: &tokio_postgres::Client,
    table: &str,
    count: u64,
    seed: u64,
    progress: &Progress,
) -> anyhow::Result<()> {
    let (blocks, mut generated) = mpsc::channel::<(u64, Vec<u8>)>(2);
    let maker = tokio::task::spawn_blocking(move || {
        generate_blocks(&FakeProducts::new(seed), count, |done, csv| {
            // The channel closes when the COPY fails; the COPY returns that error.
            blocks.blocking_send((done, csv)).map_err(|_| io::ErrorKind::BrokenPipe.into())
        })
    });
    let sql = format!("COPY {table} ({}) FROM STDIN WITH (FORMAT csv)", COLUMNS.join(", "));
    let what = || format!("load products into {table}");
    let sink = client.copy_in(&sql).await.with_context(what)?;
    let mut sink = pin!(sink);
    while let Some((done, csv)) = generated.recv().await {
        sink.send(Bytes::from(csv)).await.with_context(what)?;
        progress.set(done);
    }
    maker.await??;
    sink.finish().await.with_context(what)?;
    Ok(())
}

/// Writes a CSV file, or to standard output for `-`. The file gets its name only after it is complete.
fn write(path: &Path, count: u64, seed: u64, progress: &Progress) -> anyhow::Result<()> {
    let fake_products = FakeProducts::new(seed);
    if path == Path::new("-") {
        return write_to(&mut io::stdout().lock(), &fake_products, count, progress)
            .context("write to standard output");
    }
    let what = || format!("write {}", path.display());
    // A pipe or a device cannot be replaced by a renamed file.
    if path.metadata().is_ok_and(|there| !there.is_file()) {
        if path.is_dir() {
            bail!("cannot write {}: it is a folder; give the name of a file", path.display());
        }
        let mut file = File::options().write(true).open(path).with_context(what)?;
        return write_to(&mut file, &fake_products, count, progress).with_context(what);
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let written = File::create(&partial).and_then(|mut file| {
        write_to(&mut file, &fake_products, count, progress)?;
        std::fs::rename(&partial, path)
    });
    if written.is_err() {
        // The file may not exist.
        let _ = std::fs::remove_file(&partial);
    }
    written.with_context(what)
}

/// Writes the header and `count` products.
fn write_to(
    out: &mut impl Write,
    fake_products: &FakeProducts,
    count: u64,
    progress: &Progress,
) -> io::Result<()> {
    out.write_all(COLUMNS.join(",").as_bytes())?;
    out.write_all(b"\n")?;
    // Other threads make the products while this thread writes.
    let (rounds, generated) = blocking::sync_channel::<(u64, Vec<u8>)>(ROUNDS_AHEAD);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            generate_blocks(fake_products, count, |done, csv| {
                rounds.send((done, csv)).map_err(|_| io::ErrorKind::BrokenPipe.into())
            })
        });
        for (done, csv) in generated {
            out.write_all(&csv)?;
            progress.set(done);
        }
        out.flush()
    })
}

/// Makes products in blocks on all threads of the current rayon pool. Passes the blocks to `consume` in
/// order, each with the number of products so far.
pub fn generate_blocks(
    fake_products: &FakeProducts,
    count: u64,
    mut consume: impl FnMut(u64, Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let round = BLOCKS_PER_THREAD * rayon::current_num_threads() as u64;
    let blocks = count.div_ceil(BLOCK);
    for first in (0..blocks).step_by(round as usize) {
        let generated: Vec<Vec<u8>> = (first..blocks.min(first + round))
            .into_par_iter()
            .map(|block| csv_block(fake_products, block * BLOCK..count.min((block + 1) * BLOCK)))
            .collect::<Result<_, _>>()?;
        for (block, csv) in (first..).zip(generated) {
            consume(count.min((block + 1) * BLOCK), csv)?;
        }
    }
    Ok(())
}

fn csv_block(fake_products: &FakeProducts, numbers: std::ops::Range<u64>) -> io::Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::with_capacity((BLOCK * 280) as usize));
    let mut text = ProductText::default();
    for number in numbers {
        fake_products.product(number, &mut text);
        writer.write_record([&text.name, &text.sku, &text.description, &text.price, &text.last_updated])?;
    }
    writer.into_inner().map_err(|error| io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(threads: usize, seed: u64, count: u64) -> Vec<u8> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut all = Vec::new();
        let fake_products = FakeProducts::new(seed);
        let done = pool.install(|| {
            let mut last = 0;
            generate_blocks(&fake_products, count, |done, csv| {
                all.extend_from_slice(&csv);
                last = done;
                Ok(())
            })
            .unwrap();
            last
        });
        assert_eq!(done, count);
        all
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
        let one = bytes(1, 42, 40_000);
        for threads in [2, 3, 8] {
            assert!(bytes(threads, 42, 40_000) == one, "{threads} threads differ");
        }
        assert!(bytes(2, 43, 40_000) != one);
        assert!(one.starts_with(&bytes(2, 42, 10_000)), "fewer products are the first of more");
    }

    #[test]
    fn written_csv_reads_back_unchanged() {
        let csv = bytes(2, 1, 5_000);
        let mut reader = csv::ReaderBuilder::new().has_headers(false).from_reader(csv.as_slice());
        let fake_products = FakeProducts::new(1);
        let mut text = ProductText::default();
        for (number, record) in (0..).zip(reader.records()) {
            fake_products.product(number, &mut text);
            let record = record.unwrap();
            let expected = [&text.name, &text.sku, &text.description, &text.price, &text.last_updated];
            assert_eq!(record.iter().collect::<Vec<_>>(), expected.map(String::as_str));
        }
    }
}

//! The name of a model. Everything that decides the vectors is part of the name, so that two models never
//! have the same name.
//!
//! Vectors of two models cannot be compared, and the name is part of every content hash. So the name covers
//! every byte of the weights, the tokenizer, and the folder's settings for layers, pooling and text length.
//! The path of the folder is not part of the name.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use crate::encoder::{BertConfig, Description, Pooling};
use crate::pipeline::failure::{Error, FailureKind, Result};

/// Hashes with a fixed name. The model of `scripts/setup` keeps the name that it had when names covered only
/// the weights, so that existing indexes stay valid.
const KNOWN: &[(&str, &str)] =
    &[("6ebea6ed6d2fead70169f2d77453388842aaeb599cdaa6ca020f540eeb196e32", "all-MiniLM-L6-v2")];

/// Weights that had a fixed name when names covered only samples of the weights. That name says nothing about
/// the other files of the folder.
const FORMERLY_KNOWN: &str = "528c6c412808";

/// Number of samples of the weights in a former name, evenly spread, and the size of a sample in bytes.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4_096;

/// Digits of the hash in a name: enough to tell all models of one user apart.
const DIGITS: usize = 16;

/// Several threads hash a file, in blocks of this size in bytes.
const BLOCK: u64 = 4 << 20;

/// Maximum number of threads that hash. More threads would hash faster than a cached file can be read.
const MAX_THREADS: usize = 4;

/// The hash of a file is kept only if the last change is older than this. A later change could have the same
/// timestamp, because file timestamps are coarse.
const SETTLED: Duration = Duration::from_secs(2);

type Hash = [u8; 32];

/// The name of a model: a fixed name, or its shape and a hash of everything that decides the vectors.
pub(super) fn name(weights: &Path, tokenizer: &Path, described: &Description) -> Result<String> {
    let BertConfig { hidden_size, num_hidden_layers, .. } = described.bert;
    let hash = hash(weights, tokenizer, described)?;
    Ok(match KNOWN.iter().find(|(known, _)| *known == hash) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bert-{num_hidden_layers}x{hidden_size}@{}", &hash[..DIGITS]),
    })
}

/// The former name of the folder, which covered only the folder's name and samples of the weights. None if
/// that name does not identify the model.
pub(super) fn former_name(weights: &Path) -> Result<Option<String>> {
    let samples = samples(weights).map_err(|error| unreadable(weights, error))?;
    if samples == FORMERLY_KNOWN {
        return Ok(None);
    }
    let folder =
        weights.parent().and_then(Path::file_name).map_or("model".into(), |name| name.to_string_lossy());
    Ok(Some(format!("{folder}@{samples}")))
}

/// Shortened SHA-256 of the file's length and of samples from the whole file.
fn samples(path: &Path) -> io::Result<String> {
    let mut weights = File::open(path)?;
    let length = weights.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(length.to_le_bytes());
    for sample in 0..SAMPLES {
        weights.seek(SeekFrom::Start(length / SAMPLES * sample))?;
        let mut bytes = Vec::with_capacity(SAMPLE_BYTES as usize);
        (&weights).take(SAMPLE_BYTES).read_to_end(&mut bytes)?;
        digest.update(&bytes);
    }
    let mut start = [0; 8];
    start[2..].copy_from_slice(&digest.finalize()[..6]);
    Ok(format!("{:012x}", u64::from_be_bytes(start)))
}

fn hash(weights: &Path, tokenizer: &Path, described: &Description) -> Result<String> {
    // This names all fields, so that a new field cannot be forgotten. Fields without a name in `shape` have
    // only one supported value.
    let Description { bert, pooling, max_tokens } = described;
    let pooling = match pooling {
        Pooling::Mean => "mean",
        Pooling::Cls => "cls",
    };
    let shape = format!(
        "hidden {} layers {} heads {} inner {} positions {} vocabulary {} epsilon {:08x} pooling {pooling} tokens {max_tokens}",
        bert.hidden_size,
        bert.num_hidden_layers,
        bert.num_attention_heads,
        bert.intermediate_size,
        bert.max_position_embeddings,
        bert.vocab_size,
        bert.layer_norm_eps.to_bits(),
    );
    let mut digest = Sha256::new();
    for file in [weights, tokenizer] {
        let hash = of_file(file).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => Error::caused(FailureKind::Conflict, "read the model", error),
            _ => unreadable(file, error),
        })?;
        digest.update(hash);
    }
    digest.update(shape);
    Ok(digest.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing to a string does not fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

/// Metadata that shows whether a file was replaced or written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    /// Time of the last status change (ctime), which no program can set.
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of the file at a path.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|found| Self::from(&found))
    }

    fn is_settled(&self) -> bool {
        let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else { return false };
        let Ok(seconds) = u64::try_from(self.changed.0) else { return false };
        now.saturating_sub(Duration::from_secs(seconds)) > SETTLED
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(found: &fs::Metadata) -> Self {
        Self {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// A file of the model that cannot be read.
pub(super) fn unreadable(file: &Path, error: io::Error) -> Error {
    let what = format!("read {}", file.display());
    Error::new(FailureKind::MissingResource, what, &error).because(error)
}

/// The hash of a whole file. A process hashes a file only once, unless the file changes.
fn of_file(path: &Path) -> io::Result<Hash> {
    static HASHED: Mutex<Vec<(Stamp, Hash)>> = Mutex::new(Vec::new());
    let file = File::open(path)?;
    let stamp = Stamp::from(&file.metadata()?);
    let hashed = || HASHED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, hash)) = hashed().iter().find(|(of, _)| *of == stamp) {
        return Ok(*hash);
    }
    let hash = of_blocks(&file, stamp.length)?;
    if Stamp::from(&file.metadata()?) != stamp {
        let message = format!("{} changed while it was read", path.display());
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
    }
    if stamp.is_settled() {
        hashed().push((stamp, hash));
    }
    Ok(hash)
}

/// SHA-256 of a file's length and of the SHA-256 of each block of it.
fn of_blocks(file: &File, length: u64) -> io::Result<Hash> {
    let blocks = length.div_ceil(BLOCK);
    let next = AtomicU64::new(0);
    let work = || -> io::Result<Vec<(u64, Hash)>> {
        let mut hashes = Vec::new();
        let mut buffer = vec![0; BLOCK.min(length) as usize];
        loop {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                return Ok(hashes);
            }
            let start = block * BLOCK;
            let bytes = &mut buffer[..BLOCK.min(length - start) as usize];
            file.read_exact_at(bytes, start)?;
            hashes.push((block, Sha256::digest(&*bytes).into()));
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let helpers = MAX_THREADS.min(cores).min(blocks as usize).saturating_sub(1);
    let mut hashes = thread::scope(|scope| {
        let helping: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
        let mut hashes = work()?;
        for helper in helping {
            let panicked = |_| io::Error::other("a thread that hashes the model panicked");
            hashes.extend(helper.join().map_err(panicked)??);
        }
        io::Result::Ok(hashes)
    })?;
    hashes.sort_unstable_by_key(|(block, _)| *block);
    let mut digest = Sha256::new();
    digest.update(length.to_le_bytes());
    for (_, hash) in hashes {
        digest.update(hash);
    }
    Ok(digest.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_file_counts_however_many_threads_hash_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut bytes = vec![1; 2 * BLOCK as usize + 7];
        let mut seen = Vec::new();
        for at in [None, Some(0), Some(BLOCK as usize), Some(2 * BLOCK as usize + 6)] {
            if let Some(at) = at {
                bytes[at] ^= 4;
            }
            fs::write(&path, &bytes).unwrap();
            let hash = of_file(&path).unwrap();
            assert_eq!(hash, of_file(&path).unwrap());
            assert!(!seen.contains(&hash), "{at:?}");
            seen.push(hash);
        }
        fs::write(&path, "").unwrap();
        assert!(!seen.contains(&of_file(&path).unwrap()));
    }
}

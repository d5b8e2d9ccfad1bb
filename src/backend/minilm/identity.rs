//! What a model is called: by all that decides its vectors, so that another model never passes for it.
//!
//! Vectors of two models can't be compared, and the name is part of every content hash. So it covers the weights
//! to the last byte, the tokenizer, and what the folder says about layers, pooling and the length of a text. Where
//! the folder is does not matter.

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

/// Models that are known by name. The one that `scripts/setup` brings is named as it was before names covered
/// more than its weights, so that what is indexed stays.
const KNOWN: &[(&str, &str)] =
    &[("6ebea6ed6d2fead70169f2d77453388842aaeb599cdaa6ca020f540eeb196e32", "all-MiniLM-L6-v2")];

/// Weights that had a name of their own when names covered samples of the weights only. It does not tell what stood
/// beside them.
const FORMERLY_KNOWN: &str = "528c6c412808";

/// Samples of the weights that a former name covers, evenly spread, and the length of one.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4_096;

/// Digits of a hash that stand in a name: enough that no two models of one user are ever alike in them.
const DIGITS: usize = 16;

/// A file is hashed in blocks of this size, by several threads.
const BLOCK: u64 = 4 << 20;

/// Threads that hash: as many as read a file from memory faster than they hash it.
const MAX_THREADS: usize = 4;

/// A file that changed later than this before it was hashed is hashed again the next time: its clock may not have
/// moved on since.
const SETTLED: Duration = Duration::from_secs(2);

type Hash = [u8; 32];

/// A model's name: a known one, or its shape and the hash of all that decides its vectors.
pub(super) fn name(weights: &Path, tokenizer: &Path, described: &Description) -> Result<String> {
    let BertConfig { hidden_size, num_hidden_layers, .. } = described.bert;
    let hash = hash(weights, tokenizer, described)?;
    Ok(match KNOWN.iter().find(|(known, _)| *known == hash) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bert-{num_hidden_layers}x{hidden_size}@{}", &hash[..DIGITS]),
    })
}

/// What the same folder was called when names covered no more than its own name and samples of the weights; none
/// if it cannot be told from others by that.
pub(super) fn former_name(weights: &Path) -> Result<Option<String>> {
    let samples = samples(weights).map_err(|error| unreadable(weights, error))?;
    if samples == FORMERLY_KNOWN {
        return Ok(None);
    }
    let folder =
        weights.parent().and_then(Path::file_name).map_or("model".into(), |name| name.to_string_lossy());
    Ok(Some(format!("{folder}@{samples}")))
}

/// SHA-256, shortened, of the file's length and of samples all over it.
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
    // All fields, so that a new one is not forgotten here. Those without a name below have one value that is known.
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

/// What tells whether a file is the one that it was, and has not been written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    /// No program can set this one.
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

/// The hash of a whole file. A process hashes a file once, as long as nobody writes to it.
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
        let message = format!("{} is being written to", path.display());
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
            let panicked = |_| io::Error::other("a thread that hashes the model has ended");
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

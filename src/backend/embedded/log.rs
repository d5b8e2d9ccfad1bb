//! The server's log: bounded in size, and quoted in error messages.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// A longer log is moved to `server.log.1`. Enough for a day of errors; both files fit in any home.
const MAX_BYTES: u64 = 16 << 20;

/// Last lines of the log in an error message.
const TAIL_LINES: usize = 12;

/// The tail is taken from at most this many bytes at the end of the log.
const TAIL_BYTES: u64 = 16 << 10;

/// Whether the log is longer than `MAX_BYTES`.
pub fn is_long(path: &Path) -> bool {
    size(path) > MAX_BYTES
}

/// Copies a log that is too long to `server.log.1`, and empties it. The server has the log open in append
/// mode and continues at the new end.
pub fn shorten(path: &Path) -> io::Result<()> {
    if !is_long(path) {
        return Ok(());
    }
    std::fs::copy(path, path.with_extension("log.1"))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

/// Size of the log in bytes; 0 if it does not exist.
pub fn size(path: &Path) -> u64 {
    path.symlink_metadata().map_or(0, |m| m.len())
}

/// The last lines of a log, without its first `since` bytes.
pub fn tail(file: io::Result<File>, since: u64) -> String {
    let read = || {
        let mut file = file?;
        let end = file.metadata()?.len();
        // A log shorter than `since` was emptied meanwhile.
        let start = if since > end { 0 } else { since };
        file.seek(SeekFrom::Start(start.max(end.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_what_was_written_since() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.log");
        std::fs::write(&path, "old\nnew\nnewer\n").unwrap();
        assert_eq!(tail(File::open(&path), 4), "new\nnewer");
        assert_eq!(tail(File::open(&path), 1000), "old\nnew\nnewer");
        assert_eq!(tail(File::open(dir.path().join("none")), 0), "");
    }

    #[test]
    fn a_long_log_is_moved_aside_and_an_appender_goes_on() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.log");
        let mut appender = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        appender.write_all(&vec![b'x'; MAX_BYTES as usize]).unwrap();
        shorten(&path).unwrap();
        assert_eq!(size(&path), MAX_BYTES);
        appender.write_all(b"\n").unwrap();
        shorten(&path).unwrap();
        assert_eq!(size(&dir.path().join("server.log.1")), MAX_BYTES + 1);
        appender.write_all(b"more\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "more\n");
    }
}

//! The settings of a private PostgreSQL server.

use std::fmt::Write as _;
use std::path::Path;

use super::memory;

/// Size of `/dev/shm` that parallel index builds may need. In containers it is often only 64 MB.
#[cfg(target_os = "linux")]
const SHM_MIN_BYTES: u64 = 512 << 20;

/// Settings of every private server. The sizes suit a laptop that also embeds, and bulk loads.
const FIXED: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    // Enough for the connection pool of every role, and for a person with psql.
    ("max_connections", "100"),
    ("password_encryption", "scram-sha-256"),
    ("maintenance_work_mem", "256MB"),
    ("work_mem", "16MB"),
    // During a load, the size of the WAL triggers the checkpoints, and each checkpoint is spread over time.
    ("max_wal_size", "2GB"),
    ("min_wal_size", "256MB"),
    ("checkpoint_timeout", "15min"),
    ("checkpoint_completion_target", "0.9"),
    ("random_page_cost", "1.1"),
    ("jit", "off"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("lc_messages", "C"),
    ("log_line_prefix", "%m [%p] "),
    ("log_checkpoints", "off"),
];

/// The text of `postgresql.conf`. The lines of `extra` come last, and later lines win.
pub fn text(port: u16, socket_dir: &Path, extra: &[(String, String)]) -> String {
    let mut text = String::from("# Written by refarch at every start.\n");
    let mut set = |name: &str, value: &str| {
        let _ = writeln!(text, "{name} = {}", quoted(value));
    };
    for (name, value) in FIXED {
        set(name, value);
    }
    set("port", &port.to_string());
    set("unix_socket_directories", &socket_dir.to_string_lossy());
    // Anonymous memory, so that a small `/dev/shm` does not matter; the system gives it page by page as it is used.
    set("shared_memory_type", "mmap");
    set("shared_buffers", &memory::shared_buffers());
    set("dynamic_shared_memory_type", dynamic_shared_memory());
    for (name, value) in extra {
        set(name, value);
    }
    text
}

fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

#[cfg(target_os = "linux")]
fn dynamic_shared_memory() -> &'static str {
    let shm = nix::sys::statvfs::statvfs("/dev/shm");
    let enough = shm.is_ok_and(|shm| shm.blocks() * shm.fragment_size() >= SHM_MIN_BYTES);
    if enough { "posix" } else { "sysv" }
}

#[cfg(not(target_os = "linux"))]
fn dynamic_shared_memory() -> &'static str {
    "posix"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_and_extra_settings_come_last() {
        let extra = [("fsync".to_owned(), "off".to_owned())];
        let text = text(5432, Path::new("/tmp/it's \\ here"), &extra);
        assert!(text.contains(r"unix_socket_directories = '/tmp/it''s \\ here'"), "{text}");
        assert!(text.ends_with("fsync = 'off'\n"), "{text}");
    }
}

//! The memory of this machine, and the share of it that a private server gets for its buffers.

/// Buffers of a server whose machine's memory is not known.
const DEFAULT_MIB: u64 = 256;

/// The least: less slows down loads even of small tables.
const LEAST_MIB: u64 = 128;

/// The most: a million vectors with their index are 1.6 GB.
const MOST_MIB: u64 = 2_048;

/// The server's buffers get this part of the memory.
const SHARE: u64 = 8;

/// The value of `shared_buffers` on this machine.
pub fn shared_buffers() -> String {
    format!("{}MB", shared_buffers_mib(memory()))
}

/// MiB of buffers on a machine with so many bytes of memory. The pages of a search through lists should stay in these
/// buffers: a page of the operating system's cache is copied each time it is read.
fn shared_buffers_mib(memory: Option<u64>) -> u64 {
    memory.map_or(DEFAULT_MIB, |bytes| ((bytes >> 20) / SHARE).clamp(LEAST_MIB, MOST_MIB))
}

/// Bytes of memory that this process may use: the machine's, or less if a control group limits it.
fn memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").as_deref().and_then(total)?;
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limits = limit_files(&groups);
    Some(limits.iter().filter_map(|path| read(path)?.trim().parse().ok()).fold(machine, u64::min))
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The files that may hold the limits of this process's control group and of those above it, by
/// `/proc/self/cgroup`. A group without a limit says `max`. In a container the group is often shown at the root.
fn limit_files(groups: &str) -> Vec<String> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, name) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut group = group.trim_end_matches('/');
        loop {
            files.push(format!("{root}{group}/{name}"));
            let Some((above, _)) = group.rsplit_once('/') else { break };
            group = above;
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffers_are_an_eighth_of_the_memory_within_bounds() {
        let of_gib = |gib: u64| shared_buffers_mib(Some(gib << 30));
        assert_eq!([0, 1, 2, 8, 16, 24, 512].map(of_gib), [128, 128, 256, 1_024, 2_048, 2_048, 2_048]);
        assert_eq!(shared_buffers_mib(Some(u64::MAX)), 2_048);
        assert_eq!(shared_buffers_mib(None), 256);
    }

    #[test]
    fn the_memory_of_the_machine_is_read() {
        assert_eq!(total("MemFree: 1 kB\nMemTotal:       24682496 kB\n"), Some(24_682_496 << 10));
        assert_eq!(total("MemTotal: much\n"), None);
    }

    #[test]
    fn limits_of_all_groups_above_count() {
        assert_eq!(
            limit_files("0::/user.slice/a:b\n"),
            [
                "/sys/fs/cgroup/user.slice/a:b/memory.max",
                "/sys/fs/cgroup/user.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            limit_files("9:cpu,memory:/docker\n1:name=systemd:/docker\n"),
            [
                "/sys/fs/cgroup/memory/docker/memory.limit_in_bytes",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes"
            ]
        );
        assert_eq!(limit_files("0::/\n"), ["/sys/fs/cgroup/memory.max"]);
        assert_eq!(limit_files(""), [""; 0]);
    }
}

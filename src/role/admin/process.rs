//! CPU time, memory and files of this process, as the system counts them.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};

use super::catalogue::{CPU, MAX_FDS, OPEN_FDS, RESIDENT, START, THREADS, VIRTUAL};
use super::exposition::Samples;

/// Adds what the system tells. Elsewhere than on Linux that is CPU time, the limit on files and the start.
pub fn collect(samples: &mut Samples, started: SystemTime) {
    if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
        let times = [usage.user_time(), usage.system_time()];
        let seconds = times.iter().map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6).sum();
        samples.number(&CPU, &[], seconds);
    }
    if let Some(status) = read("/proc/self/status") {
        for (metric, key, unit) in
            [(&RESIDENT, "VmRSS:", 1024), (&VIRTUAL, "VmSize:", 1024), (&THREADS, "Threads:", 1)]
        {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            if let Some(number) = number {
                samples.count(metric, &[], number * unit);
            }
        }
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        // The folder itself is open while it is read.
        samples.count(&OPEN_FDS, &[], (files.count() as u64).saturating_sub(1));
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        samples.count(&MAX_FDS, &[], soft);
    }
    let since_epoch = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    samples.number(&START, &[], since_epoch.as_secs_f64());
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

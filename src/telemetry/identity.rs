//! The names under which a process logs: its worker, and its service.

use std::sync::{PoisonError, RwLock};

/// The name of the process's worker.
static WORKER: RwLock<String> = RwLock::new(String::new());

/// Names the process before it has a worker.
pub(super) fn begin(role: &str) {
    let host = nix::unistd::gethostname()
        .map_or_else(|_| "localhost".into(), |name| name.to_string_lossy().into_owned());
    identify(&format!("{role}-{host}-{}", std::process::id()));
}

/// Gives the process the name of its worker.
pub fn identify(worker: &str) {
    worker.clone_into(&mut WORKER.write().unwrap_or_else(PoisonError::into_inner));
}

/// The name of the process's worker.
#[must_use]
pub fn worker() -> String {
    WORKER.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The name of a worker's service, as the reference architecture calls it: its dashboard asks for it.
#[must_use]
pub fn service_of(worker: &str) -> &'static str {
    match worker.split('-').next() {
        Some("listen") => "pelican",
        Some("embed") => "emu",
        Some("serve") => "frontend",
        _ => "refarch",
    }
}

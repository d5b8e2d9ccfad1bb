//! The options of a private cluster.

use std::path::{Path, PathBuf};

/// The folders of a cluster and of its binaries.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// A PostgreSQL installation: the folder with `bin`, `lib` and `share`.
    pub install: PathBuf,
    /// The cluster's folder.
    pub dir: PathBuf,
    /// Further server settings, used if this process starts the server. They override the defaults.
    pub extra: Vec<(String, String)>,
}

impl ClusterOptions {
    /// The cluster and the binaries under a runtime folder, in the layout of `refarch setup`.
    #[must_use]
    pub fn in_runtime_dir(dir: &Path) -> Self {
        Self { install: dir.join("runtime/postgres"), dir: dir.join("postgres"), extra: Vec::new() }
    }

    /// Path of one of the installation's programs.
    pub(super) fn binary(&self, name: &str) -> PathBuf {
        self.install.join("bin").join(name)
    }
}

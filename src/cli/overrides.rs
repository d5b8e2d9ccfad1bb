//! The settings that flags set.

use super::admin::Admin;
use super::{Cli, Command};
use crate::config::Override;

impl Command {
    /// The flags of the admin endpoint, if the role can have one.
    fn admin(&self) -> Option<&Admin> {
        match self {
            Self::Up(role) => Some(&role.admin),
            Self::Serve(role) => Some(&role.admin),
            Self::Listen(role) => Some(&role.admin),
            Self::Embed(role) => Some(&role.admin),
            Self::Generate(role) => Some(&role.admin),
            Self::Chaos(role) => Some(&role.admin),
            _ => None,
        }
    }
}

impl Cli {
    /// The settings that the flags set.
    #[must_use]
    pub fn overrides(&self) -> Vec<Override> {
        let mut list = Vec::new();
        let mut set = |flag, key, value: Option<String>| {
            list.extend(value.map(|value| Override { flag, key, value }));
        };
        set("--log-format", "log.format", self.global.log_format.map(|format| format.name().to_owned()));
        set("--log-level", "log.level", self.global.log_level.clone());
        let (bind, workers) = match &self.command {
            Command::Up(up) => {
                set("--products", "up.products", up.products.map(|n| n.to_string()));
                set("--processes", "up.processes", up.processes.map(|range| range.least.to_string()));
                set("--processes", "up.max_processes", up.processes.map(|range| range.most.to_string()));
                (up.bind, up.workers)
            }
            Command::Serve(serve) => (serve.bind, None),
            Command::Embed(embed) => (None, embed.workers),
            _ => (None, None),
        };
        set("--bind", "serve.bind", bind.map(|b| b.to_string()));
        let admin = self.command.admin().and_then(|admin| admin.listen);
        set("--admin", "admin.listen", admin.map(|address| address.to_string()));
        set("--workers", "indexer.workers", workers.map(|range| range.least.to_string()));
        set("--workers", "indexer.max_workers", workers.map(|range| range.most.to_string()));
        list
    }
}

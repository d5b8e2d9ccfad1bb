//! `refarch psql`: psql on the database in use.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::config::Host;

use crate::backend::embedded::{Cluster, ClusterOptions, Tcp};
use crate::backend::postgres::tls::ConnectionSettings;
use crate::cli::Psql;
use crate::config::Settings;

/// Variables of libpq that would override our variables or conflict with them.
const CONFLICTING_VARIABLES: &[&str] =
    &["PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGPASSFILE", "PGOPTIONS", "PGTARGETSESSIONATTRS"];

/// Runs psql. If the exit code of psql is not 0, ends this process with the same code.
pub async fn run(psql: Psql, settings: &Settings) -> anyhow::Result<()> {
    let bundled = settings.runtime.dir.join("runtime/postgres/bin/psql");
    let status = if settings.database.url.is_empty() {
        let cluster = Cluster::join(ClusterOptions::in_runtime_dir(&settings.runtime.dir)).await?;
        let status =
            run_child(&find([Some(bundled), on_path()])?, &psql.args, cluster_variables(cluster.tcp())).await;
        cluster.leave().await?;
        status?
    } else {
        let variables = url_variables(&ConnectionSettings::read(&settings.database.url, &settings.database)?);
        // The bundled psql has no TLS, and a remote database may require TLS.
        run_child(&find([on_path(), Some(bundled)])?, &psql.args, variables).await?
    };
    match exit_code(status) {
        0 => Ok(()),
        code => std::process::exit(code),
    }
}

fn find(candidates: [Option<PathBuf>; 2]) -> anyhow::Result<PathBuf> {
    match candidates.into_iter().flatten().find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!("there is no psql: run refarch setup, or install the client programs of PostgreSQL"),
    }
}

fn on_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("psql")).find(|psql| psql.is_file())
}

async fn run_child(
    program: &Path,
    args: &[OsString],
    variables: BTreeMap<&str, String>,
) -> anyhow::Result<ExitStatus> {
    // In psql, Ctrl-C cancels a query. This handler keeps the same Ctrl-C from ending our process.
    let _interrupts = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut command = Command::new(program);
    for name in CONFLICTING_VARIABLES {
        command.env_remove(name);
    }
    let mut child = command
        .args(args)
        .envs(variables)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    loop {
        tokio::select! {
            status = child.wait() => return Ok(status?),
            _ = terminate.recv() => {
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                    kill(Pid::from_raw(pid), Signal::SIGTERM)?;
                }
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    // Shells report a signal in the same way.
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn cluster_variables(tcp: &Tcp) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("PGHOST", tcp.host.clone()),
        ("PGPORT", tcp.port.to_string()),
        ("PGUSER", tcp.user.clone()),
        ("PGPASSWORD", tcp.password.expose().to_owned()),
        ("PGDATABASE", tcp.dbname.clone()),
        // A PGSSLMODE in the environment is meant for another server, and could fail here.
        ("PGSSLMODE", "prefer".to_owned()),
    ])
}

fn url_variables(wanted: &ConnectionSettings) -> BTreeMap<&'static str, String> {
    let config = &wanted.config;
    let hosts: Vec<_> = config
        .get_hosts()
        .iter()
        .map(|host| match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.to_string_lossy().into_owned(),
        })
        .collect();
    let ports: Vec<_> = config.get_ports().iter().map(u16::to_string).collect();
    let password = config.get_password().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let variables = [
        ("PGHOST", Some(hosts.join(","))),
        ("PGPORT", Some(ports.join(","))),
        ("PGUSER", config.get_user().map(str::to_owned)),
        ("PGPASSWORD", password),
        ("PGDATABASE", config.get_dbname().map(str::to_owned)),
        ("PGOPTIONS", config.get_options().map(str::to_owned)),
        ("PGSSLMODE", Some(wanted.mode.name().to_owned())),
        ("PGSSLROOTCERT", wanted.root.as_ref().map(|path| path.display().to_string())),
    ];
    variables
        .into_iter()
        .filter_map(|(name, value)| Some((name, value.filter(|value| !value.is_empty())?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn a_url_becomes_the_environment_variables_of_libpq() {
        let settings = Settings::load(None, &BTreeMap::new(), &[]).unwrap();
        let url = Secret::new("postgres://me:s%40fe@a:1,b:2/shop?sslmode=verify-ca&sslrootcert=/ca.pem");
        let variables = url_variables(&ConnectionSettings::read(&url, &settings.database).unwrap());
        let expected = [
            ("PGDATABASE", "shop"),
            ("PGHOST", "a,b"),
            ("PGPASSWORD", "s@fe"),
            ("PGPORT", "1,2"),
            ("PGSSLMODE", "verify-ca"),
            ("PGSSLROOTCERT", "/ca.pem"),
            ("PGUSER", "me"),
        ];
        assert_eq!(variables, expected.map(|(name, value)| (name, value.to_owned())).into());
    }
}

//! Servers of the distribution's packages: a PostgreSQL, and pgbouncer.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::unistd::{Uid, User};

use crate::common;

const TIMEOUT: Duration = Duration::from_mins(1);

/// The host name at which the servers listen. Every resolver resolves it to this machine.
pub const NAME: &str = "localhost";

/// A program of Debian's server packages. If the program is missing, the test fails: a test that is skipped proves
/// nothing.
fn program(name: &str) -> Command {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|version| version.path().join("bin").join(name)).collect();
    found.push(Path::new("/usr/sbin").join(name));
    let there = found.into_iter().filter(|path| path.is_file()).max();
    let mut command = Command::new(there.unwrap_or_else(|| {
        panic!("{name} is missing: run scripts/test, or install Debian's postgresql and pgbouncer")
    }));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(user) = lower_user() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

/// The user of the servers if the test runs as root. PostgreSQL refuses to run as root.
fn lower_user() -> Option<User> {
    let named = || User::from_name("postgres").unwrap().expect("Debian's package makes the user postgres");
    Uid::effective().is_root().then(named)
}

fn hand_over(path: &Path) {
    if let Some(user) = lower_user() {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
}

/// A PostgreSQL with a database of its own.
pub struct Server {
    pub port: u16,
    child: Child,
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts a server. With a certificate and its key, the server has TLS.
    pub async fn start(certificate: Option<[PathBuf; 2]>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        hand_over(dir.path());
        let data = dir.path().join("data");
        let made = program("initdb")
            .arg("-D")
            .arg(&data)
            .args(["-U", "refarch", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"])
            .status()
            .unwrap();
        assert!(made.success());
        let port = common::free_port();
        let mut command = program("postgres");
        command.arg("-D").arg(&data).args(["-p", &port.to_string(), "-h", NAME, "-c", "fsync=off"]);
        command.arg("-c").arg(format!("unix_socket_directories={}", dir.path().display()));
        if let Some(files) = certificate {
            for (file, setting) in files.iter().zip(["ssl_cert_file", "ssl_key_file"]) {
                let own = dir.path().join(setting);
                std::fs::copy(file, &own).unwrap();
                std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600)).unwrap();
                hand_over(&own);
                command.arg("-c").arg(format!("{setting}={}", own.display()));
            }
            command.args(["-c", "ssl=on"]);
        }
        let server = Self { port, child: command.spawn().unwrap(), dir };
        answers("the server to answer", &server.url("sslmode=disable")).await;
        server
    }

    pub fn url(&self, query: &str) -> String {
        format!("postgres://refarch@{NAME}:{}/postgres?{query}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server stops at once, without a checkpoint, because its data is deleted.
        let data = self.dir.path().join("data");
        let _ = program("pg_ctl").arg("-D").arg(data).args(["-m", "immediate", "stop"]).status();
        let _ = self.child.wait();
    }
}

/// pgbouncer in transaction mode, in front of a server.
pub struct Pooler {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Pooler {
    pub async fn before(server: &Server) -> Self {
        let dir = tempfile::tempdir().unwrap();
        hand_over(dir.path());
        let port = common::free_port();
        let file = dir.path().join("pgbouncer.ini");
        let settings = format!(
            "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n\
             pool_mode = transaction\nunix_socket_dir =\nignore_startup_parameters = extra_float_digits\n",
            server.dir.path().display(),
            server.port
        )
        .replace("* = host", "postgres = user=refarch host");
        std::fs::write(&file, settings).unwrap();
        let child = program("pgbouncer").arg(&file).spawn().unwrap();
        let pooler = Self { child, port, _dir: dir };
        answers("the pooler to answer", &pooler.url()).await;
        pooler
    }

    pub fn url(&self) -> String {
        format!("postgres://refarch@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn answers(what: &str, url: &str) {
    common::eventually(what, TIMEOUT, async || {
        tokio_postgres::connect(url, tokio_postgres::NoTls).await.is_ok()
    })
    .await;
}

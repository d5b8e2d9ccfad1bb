//! Initialises, starts, finds and stops the server, always within a transition.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use super::digest::{hex, short_hash};
use super::layout::ClusterLayout;
use super::{log, postgresql_conf};
use crate::secret::Secret;

/// The superuser and the database of a private cluster.
pub const NAME: &str = "refarch";

/// Maximum time of a start with crash recovery, and of a stop with its checkpoint.
const BOUND: Duration = Duration::from_mins(1);

/// Time between two checks of the server's state.
const POLL: Duration = Duration::from_millis(25);

/// Attempts with another port, if a free port is taken before the server binds it.
const PORT_TRIES: usize = 5;

/// Longest path of a Unix socket in bytes on macOS. Linux allows four more.
const SOCKET_PATH_MAX: usize = 103;

/// The server appends a name of at most this length to the path of its socket folder.
const SOCKET_NAME: &str = "/.s.PGSQL.65535";

/// The address of a running server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Loopback port.
    pub port: u16,
    /// Folder of the Unix socket.
    pub socket_dir: PathBuf,
}

impl Endpoint {
    /// Connection string for tokio-postgres.
    pub fn url(&self, dbname: &str, password: &Secret) -> Secret {
        let dir = self.socket_dir.to_string_lossy().replace('\\', r"\\").replace('\'', r"\'");
        let (port, password) = (self.port, password.expose());
        Secret::new(format!("host='{dir}' port={port} user={NAME} password='{password}' dbname={dbname}"))
    }
}

/// The server's state: the content of the pid file, checked against the running processes.
enum State {
    Stopped,
    Changing,
    Ready(Endpoint),
}

/// Reason for a failed start. The caller retries the first two.
enum StartError {
    PortTaken,
    /// Child processes of a killed server still run.
    Remains,
    Other(anyhow::Error),
}

/// The server of one cluster.
pub struct Server {
    layout: ClusterLayout,
}

impl Server {
    pub fn new(layout: ClusterLayout) -> Self {
        Self { layout }
    }

    /// Makes sure that the server runs, accepts connections and has our database.
    pub async fn ensure_ready(self) -> anyhow::Result<Endpoint> {
        let this = std::sync::Arc::new(self);
        let blocking = this.clone();
        tokio::task::spawn_blocking(move || blocking.initialise()).await??;
        let password = this.layout.password()?;
        let deadline = Instant::now() + BOUND;
        let mut ports_tried = 0;
        loop {
            let problem = match this.state() {
                State::Ready(endpoint) => match ensure_database(&endpoint, &password).await {
                    Ok(()) => return Ok(endpoint),
                    Err(error) if may_pass(&error) => anyhow!(error),
                    Err(error) => {
                        return Err(error).context("the server runs, but refarch cannot use it");
                    }
                },
                State::Changing => anyhow!("the server is still starting or stopping"),
                State::Stopped => {
                    let blocking = this.clone();
                    let fresh_port = ports_tried > 0;
                    match tokio::task::spawn_blocking(move || blocking.start(fresh_port)).await? {
                        Ok(()) => continue,
                        Err(StartError::PortTaken) if ports_tried < PORT_TRIES => {
                            ports_tried += 1;
                            continue;
                        }
                        Err(StartError::PortTaken) => bail!("other programs took every port that was tried"),
                        Err(StartError::Remains) => anyhow!("processes of a killed server still run"),
                        Err(StartError::Other(error)) => return Err(error),
                    }
                }
            };
            if Instant::now() > deadline {
                let tail = log::tail(this.layout.open(&this.layout.log()), 0);
                return Err(problem).with_context(|| {
                    format!("not ready after {} seconds; its log ends:\n{tail}", BOUND.as_secs())
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops the server if it runs. After that, all committed data is on disk.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.stop_by("fast")
    }

    /// Stops the server without a clean shutdown, like a crash.
    pub fn crash(&self) -> anyhow::Result<()> {
        self.stop_by("immediate")
    }

    fn stop_by(&self, mode: &str) -> anyhow::Result<()> {
        if matches!(self.state(), State::Stopped) {
            return Ok(());
        }
        let log_size = log::size(&self.layout.log());
        let mut command = self.layout.program("pg_ctl");
        command.args(["stop", "--silent", "--wait"]).arg(format!("--mode={mode}"));
        command.arg(format!("--timeout={}", BOUND.as_secs())).arg("--pgdata").arg(self.layout.data());
        if let Err(error) = run(&mut command)
            && !matches!(self.state(), State::Stopped)
        {
            let tail = log::tail(self.layout.open(&self.layout.log()), log_size);
            return Err(error).with_context(|| format!("the server does not stop; its log ends:\n{tail}"));
        }
        self.remove_short_socket_dir();
        tracing::debug!("stopped the private PostgreSQL");
        Ok(())
    }

    /// Creates the data directory if it does not exist.
    fn initialise(&self) -> anyhow::Result<()> {
        let (home, data) = (&self.layout.home, self.layout.data());
        for entry in fs::read_dir(home)? {
            let entry = entry?;
            if entry.file_name().as_bytes().starts_with(b"data.new") {
                // A process was killed during initialisation.
                fs::remove_dir_all(entry.path())?;
            }
        }
        if fs::symlink_metadata(&data).is_ok() {
            return Ok(());
        }
        tracing::info!(path = %data.display(), "initialising the private PostgreSQL");
        let password = self.make_password()?;
        let new = home.join(format!("data.new.{}", std::process::id()));
        let mut command = self.layout.program("initdb");
        command.args(["--locale=C", "--encoding=UTF8", "--auth=scram-sha-256", "--no-instructions"]);
        command.arg(format!("--username={NAME}")).arg("--pwfile").arg(password).arg("--pgdata").arg(&new);
        if self.layout.extra.iter().any(|(name, value)| name == "fsync" && value == "off") {
            command.arg("--no-sync");
        }
        run(&mut command).context("cannot initialise its data directory")?;
        Ok(fs::rename(new, data)?)
    }

    fn make_password(&self) -> anyhow::Result<PathBuf> {
        let path = self.layout.password_file();
        let mut bytes = [0; 32];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        self.layout.write(&path, &(hex(&bytes) + "\n"))?;
        self.layout.open(&path)?.sync_all()?;
        Ok(path)
    }

    /// Starts the stopped server, and waits until it accepts connections.
    fn start(&self, fresh_port: bool) -> Result<(), StartError> {
        let began = Instant::now();
        let (log_path, log_size) = self.prepare_start(fresh_port).map_err(StartError::Other)?;
        let mut command = self.layout.program("pg_ctl");
        // pg_ctl starts the server in its own session, so that signals of our terminal do not reach it.
        command.args(["start", "--silent", "--wait"]).arg(format!("--timeout={}", BOUND.as_secs()));
        command.arg("--pgdata").arg(self.layout.data()).arg("--log").arg(&log_path);
        let Err(error) = run(&mut command) else {
            tracing::info!(
                path = %self.layout.home.display(),
                duration_ms = began.elapsed().as_millis() as u64,
                "started the private PostgreSQL"
            );
            return Ok(());
        };
        let tail = log::tail(self.layout.open(&log_path), log_size);
        if tail.contains("could not create any TCP/IP sockets") {
            return Err(StartError::PortTaken);
        }
        if tail.contains("pre-existing shared memory block") {
            return Err(StartError::Remains);
        }
        Err(StartError::Other(error.context(format!("the log of the server ends:\n{tail}"))))
    }

    /// Prepares the start: port, socket folder and settings. Returns the path of the log and its size.
    fn prepare_start(&self, fresh_port: bool) -> anyhow::Result<(PathBuf, u64)> {
        self.check_version()?;
        let (home, data, log_path) = (&self.layout.home, self.layout.data(), self.layout.log());
        let socket_dir = self.socket_dir()?;
        let pid_file = data.join("postmaster.pid");
        if fs::symlink_metadata(&pid_file).is_ok() {
            // The server refuses to start if another process now has this pid, or if the old process is not
            // reaped.
            tracing::info!("the private PostgreSQL was killed; recovering");
            self.layout.as_server("rm -f -- \"$0\"", &pid_file, "")?;
        }
        // A killed server leaves sockets, and lock files with its pid.
        self.layout.as_server("rm -f -- \"$0\"/.s.PGSQL.*", &socket_dir, "")?;
        let port_file = home.join("port");
        let remembered = self.layout.read(&port_file).ok().and_then(|text| text.trim().parse().ok());
        let port = match remembered.filter(|_| !fresh_port).filter(|port| bindable(*port).is_ok()) {
            Some(port) => port,
            None => bindable(0).context("no loopback port is free")?,
        };
        self.layout.write(&port_file, &format!("{port}\n"))?;
        self.layout.write(
            &data.join("postgresql.conf"),
            &postgresql_conf::text(port, &socket_dir, &self.layout.extra),
        )?;
        self.layout.shorten_log()?;
        self.layout.as_server("umask 077 && : >>\"$0\"", &log_path, "")?;
        Ok((log_path.clone(), log::size(&log_path)))
    }

    fn check_version(&self) -> anyhow::Result<()> {
        let data = self.layout.data();
        let path = data.join("PG_VERSION");
        let found = self.layout.read(&path).with_context(|| {
            format!("{} is not a PostgreSQL data directory: cannot read {}", data.display(), path.display())
        })?;
        let printed = run(self.layout.program("postgres").arg("--version"))?;
        // The output is like: postgres (PostgreSQL) 18.4
        let ours = printed.split_whitespace().nth(2).and_then(|v| v.split('.').next()).unwrap_or_default();
        if found.trim() != ours {
            bail!(
                "{} was made by PostgreSQL {}, and this is PostgreSQL {ours}: \
                 move {} away to start with an empty database, or install the old version again",
                data.display(),
                found.trim(),
                self.layout.home.display()
            );
        }
        Ok(())
    }

    /// The folder for the socket: the home if its path is short enough, otherwise a folder under `/tmp`.
    fn socket_dir(&self) -> anyhow::Result<PathBuf> {
        let home = self.layout.home.as_os_str().as_bytes();
        // A client would read a path with a comma as two hosts.
        let fits = home.len() + SOCKET_NAME.len() <= SOCKET_PATH_MAX
            && std::str::from_utf8(home).is_ok_and(|text| !text.contains(',') && !text.contains('"'));
        if fits {
            return Ok(self.layout.home.clone());
        }
        let remembered = self.layout.home.join("socket");
        let known = self.layout.read(&remembered).ok().map(PathBuf::from);
        if let Some(dir) = known.filter(|dir| self.is_private(dir)) {
            return Ok(dir);
        }
        let seed = format!("{}-{:?}", std::process::id(), std::time::SystemTime::now());
        let dir =
            Path::new("/tmp").join(format!("refarch-{}", short_hash(&[home, seed.as_bytes()].concat())));
        self.layout
            .as_server("mkdir -m 700 -- \"$0\"", &dir, "")
            .with_context(|| format!("cannot create {}", dir.display()))?;
        self.layout.write(&remembered, &dir.to_string_lossy())?;
        Ok(dir)
    }

    /// Whether a folder under `/tmp` still exists, belongs to the server's user, and is closed to all others.
    fn is_private(&self, dir: &Path) -> bool {
        let Ok(data) = fs::symlink_metadata(self.layout.data()) else { return false };
        fs::symlink_metadata(dir)
            .is_ok_and(|dir| dir.is_dir() && dir.uid() == data.uid() && dir.mode() & 0o777 == 0o700)
    }

    fn remove_short_socket_dir(&self) {
        let remembered = self.layout.home.join("socket");
        if let Ok(dir) = self.layout.read(&remembered) {
            // `rmdir` removes only an empty folder. The next start creates the folder again.
            let _ = self.layout.as_server("rmdir -- \"$0\"", Path::new(&dir), "");
            let _ = fs::remove_file(remembered);
        }
    }

    fn state(&self) -> State {
        let data = self.layout.data();
        let Ok(text) = self.layout.read(&data.join("postmaster.pid")) else { return State::Stopped };
        // Lines: pid, data directory, start time, port, socket folder, address, shared memory, status
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let pid = lines.first().and_then(|pid| pid.parse::<u32>().ok());
        if !pid.is_some_and(|pid| self.is_server(pid, &data)) {
            return State::Stopped;
        }
        let ready = lines.get(7).is_some_and(|status| *status == "ready");
        match (lines.get(3).and_then(|port| port.parse().ok()), lines.get(4)) {
            (Some(port), Some(dir)) if ready => State::Ready(Endpoint { port, socket_dir: dir.into() }),
            _ => State::Changing,
        }
    }

    /// Whether the process is a PostgreSQL server with this data directory, which is its working directory.
    fn is_server(&self, pid: u32, data: &Path) -> bool {
        if cfg!(target_os = "linux") {
            let link = format!("/proc/{pid}/cwd");
            return match fs::read_link(&link) {
                Ok(cwd) => cwd == data,
                // In a container root may look at its own processes only. The server's user may look at the server.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let found = self.layout.command("readlink").arg("-n").arg(link).output();
                    found.is_ok_and(|found| found.stdout == data.as_os_str().as_bytes())
                }
                Err(_) => false,
            };
        }
        let mut command = Command::new("ps");
        command.args(["-ww", "-o", "command=", "-p", &pid.to_string()]);
        let line = command.output().map(|output| output.stdout).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("postgres") && line.contains(&*data.to_string_lossy())
    }
}

/// The port, if it can be bound now; for 0, a free port.
fn bindable(port: u16) -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr()?.port())
}

/// Whether a failed connect may succeed a moment later.
fn may_pass(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => *code == SqlState::CANNOT_CONNECT_NOW || *code == SqlState::TOO_MANY_CONNECTIONS,
        None => true,
    }
}

async fn ensure_database(endpoint: &Endpoint, password: &Secret) -> Result<(), tokio_postgres::Error> {
    let url = endpoint.url("postgres", password);
    let (client, connection) = tokio_postgres::connect(url.expose(), NoTls).await?;
    let connection = tokio::spawn(connection);
    let found = client.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&NAME]).await?;
    if found.is_none() {
        client.batch_execute(&format!("CREATE DATABASE {NAME}")).await?;
    }
    drop(client);
    let _ = connection.await;
    Ok(())
}

/// Runs a program to its end, and returns its standard output. On failure, its standard error is in the
/// error.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let program = Path::new(command.get_program()).to_owned();
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let output = command.output().with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        let text = [output.stderr, output.stdout].concat();
        bail!("{name} failed ({}): {}", output.status, String::from_utf8_lossy(&text).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

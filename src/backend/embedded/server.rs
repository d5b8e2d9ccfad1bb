//! Initialising, starting, finding and stopping the server. All of it within a transition.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use super::place::{Place, hex, short_hash};
use super::{NAME, conf, log};
use crate::secret::Secret;

/// How long a start may take, crash recovery included, and how long a stop, its checkpoint included.
const BOUND: Duration = Duration::from_mins(1);

/// How often something that takes time is looked at.
const POLL: Duration = Duration::from_millis(25);

/// How often another port is tried when the one found free was taken before the server had it.
const PORT_TRIES: usize = 5;

/// Longest path of a Unix socket: macOS has room for this many bytes, Linux for four more.
const SOCKET_PATH_MAX: usize = 103;

/// What the server appends to its socket folder's path.
const SOCKET_NAME: &str = "/.s.PGSQL.65535";

/// How a running server is reached.
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

/// What the server's pid file says, checked against the processes.
enum State {
    Stopped,
    Changing,
    Ready(Endpoint),
}

/// Why a start failed, where that decides what is tried next.
enum StartError {
    PortTaken,
    /// Children of a killed server have not yet ended.
    Remains,
    Other(anyhow::Error),
}

/// The server of one cluster.
pub struct Server {
    place: Place,
}

impl Server {
    pub fn new(place: Place) -> Self {
        Self { place }
    }

    /// Sees to it that the server runs, takes connections and has our database.
    pub async fn ensure_ready(self) -> anyhow::Result<Endpoint> {
        let this = std::sync::Arc::new(self);
        let blocking = this.clone();
        tokio::task::spawn_blocking(move || blocking.initialise()).await??;
        let password = this.place.password()?;
        let deadline = Instant::now() + BOUND;
        let mut ports_tried = 0;
        loop {
            let problem = match this.state() {
                State::Ready(endpoint) => match ensure_database(&endpoint, &password).await {
                    Ok(()) => return Ok(endpoint),
                    Err(error) if may_pass(&error) => anyhow!(error),
                    Err(error) => {
                        return Err(error).context("its server runs, but can't be used");
                    }
                },
                State::Changing => anyhow!("it is neither up nor down"),
                State::Stopped => {
                    let blocking = this.clone();
                    let fresh_port = ports_tried > 0;
                    match tokio::task::spawn_blocking(move || blocking.start(fresh_port)).await? {
                        Ok(()) => continue,
                        Err(StartError::PortTaken) if ports_tried < PORT_TRIES => {
                            ports_tried += 1;
                            continue;
                        }
                        Err(StartError::PortTaken) => bail!("every port that was free is taken again"),
                        Err(StartError::Remains) => anyhow!("a killed server's processes still run"),
                        Err(StartError::Other(error)) => return Err(error),
                    }
                }
            };
            if Instant::now() > deadline {
                let tail = log::tail(this.place.open(&this.place.log()), 0);
                return Err(problem).with_context(|| {
                    format!("not ready after {} seconds; its log ends:\n{tail}", BOUND.as_secs())
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Stops the server if it runs; what is committed is on the disk when this returns.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.stop_by("fast")
    }

    /// Stops the server as a crash would.
    pub fn crash(&self) -> anyhow::Result<()> {
        self.stop_by("immediate")
    }

    fn stop_by(&self, mode: &str) -> anyhow::Result<()> {
        if matches!(self.state(), State::Stopped) {
            return Ok(());
        }
        let log_size = log::size(&self.place.log());
        let mut command = self.place.program("pg_ctl");
        command.args(["stop", "--silent", "--wait"]).arg(format!("--mode={mode}"));
        command.arg(format!("--timeout={}", BOUND.as_secs())).arg("--pgdata").arg(self.place.data());
        if let Err(error) = run(&mut command)
            && !matches!(self.state(), State::Stopped)
        {
            let tail = log::tail(self.place.open(&self.place.log()), log_size);
            return Err(error).with_context(|| format!("the server does not stop; its log ends:\n{tail}"));
        }
        self.remove_short_socket_dir();
        tracing::debug!("stopped the private PostgreSQL");
        Ok(())
    }

    /// Makes the data directory if there is none.
    fn initialise(&self) -> anyhow::Result<()> {
        let (home, data) = (&self.place.home, self.place.data());
        for entry in fs::read_dir(home)? {
            let entry = entry?;
            if entry.file_name().as_bytes().starts_with(b"data.new") {
                // Somebody was killed while initialising.
                fs::remove_dir_all(entry.path())?;
            }
        }
        if fs::symlink_metadata(&data).is_ok() {
            return Ok(());
        }
        tracing::info!(path = %data.display(), "initialising the private PostgreSQL");
        let password = self.make_password()?;
        let new = home.join(format!("data.new.{}", std::process::id()));
        let mut command = self.place.program("initdb");
        command.args(["--locale=C", "--encoding=UTF8", "--auth=scram-sha-256", "--no-instructions"]);
        command.arg(format!("--username={NAME}")).arg("--pwfile").arg(password).arg("--pgdata").arg(&new);
        if self.place.extra.iter().any(|(name, value)| name == "fsync" && value == "off") {
            command.arg("--no-sync");
        }
        run(&mut command).context("cannot initialise its data directory")?;
        Ok(fs::rename(new, data)?)
    }

    fn make_password(&self) -> anyhow::Result<PathBuf> {
        let path = self.place.password_file();
        let mut bytes = [0; 32];
        std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        self.place.write(&path, &(hex(&bytes) + "\n"))?;
        self.place.open(&path)?.sync_all()?;
        Ok(path)
    }

    /// Starts the stopped server, and waits until it takes connections.
    fn start(&self, fresh_port: bool) -> Result<(), StartError> {
        let began = Instant::now();
        let (log_path, log_size) = self.prepare_start(fresh_port).map_err(StartError::Other)?;
        let mut command = self.place.program("pg_ctl");
        // pg_ctl gives the server a session of its own, away from our terminal's signals.
        command.args(["start", "--silent", "--wait"]).arg(format!("--timeout={}", BOUND.as_secs()));
        command.arg("--pgdata").arg(self.place.data()).arg("--log").arg(&log_path);
        let Err(error) = run(&mut command) else {
            tracing::info!(
                path = %self.place.home.display(),
                duration_ms = began.elapsed().as_millis() as u64,
                "started the private PostgreSQL"
            );
            return Ok(());
        };
        let tail = log::tail(self.place.open(&log_path), log_size);
        if tail.contains("could not create any TCP/IP sockets") {
            return Err(StartError::PortTaken);
        }
        if tail.contains("pre-existing shared memory block") {
            return Err(StartError::Remains);
        }
        Err(StartError::Other(error.context(format!("the server's log ends:\n{tail}"))))
    }

    /// Everything but the start itself. Returns the log and its size.
    fn prepare_start(&self, fresh_port: bool) -> anyhow::Result<(PathBuf, u64)> {
        self.check_version()?;
        let (home, data, log_path) = (&self.place.home, self.place.data(), self.place.log());
        let socket_dir = self.socket_dir()?;
        let pid_file = data.join("postmaster.pid");
        if fs::symlink_metadata(&pid_file).is_ok() {
            // The server would refuse to start if its pid is taken by now, or not yet reaped.
            tracing::info!("the private PostgreSQL was killed; recovering");
            self.place.as_server("rm -f -- \"$0\"", &pid_file, "")?;
        }
        // What a killed server left: sockets, and lock files with its pid.
        self.place.as_server("rm -f -- \"$0\"/.s.PGSQL.*", &socket_dir, "")?;
        let port_file = home.join("port");
        let remembered = self.place.read(&port_file).ok().and_then(|text| text.trim().parse().ok());
        let port = match remembered.filter(|_| !fresh_port).filter(|port| bindable(*port).is_ok()) {
            Some(port) => port,
            None => bindable(0).context("no loopback port is free")?,
        };
        self.place.write(&port_file, &format!("{port}\n"))?;
        self.place.write(&data.join("postgresql.conf"), &conf::text(port, &socket_dir, &self.place.extra))?;
        self.place.shorten_log()?;
        self.place.as_server("umask 077 && : >>\"$0\"", &log_path, "")?;
        Ok((log_path.clone(), log::size(&log_path)))
    }

    fn check_version(&self) -> anyhow::Result<()> {
        let data = self.place.data();
        let path = data.join("PG_VERSION");
        let found = self.place.read(&path).with_context(|| {
            format!("{} is not PostgreSQL's: cannot read {}", data.display(), path.display())
        })?;
        let printed = run(self.place.program("postgres").arg("--version"))?;
        // As in: postgres (PostgreSQL) 18.4
        let ours = printed.split_whitespace().nth(2).and_then(|v| v.split('.').next()).unwrap_or_default();
        if found.trim() != ours {
            bail!(
                "{} was made by PostgreSQL {}, and this is PostgreSQL {ours}: \
                 move {} away to begin anew, or bring that version back",
                data.display(),
                found.trim(),
                self.place.home.display()
            );
        }
        Ok(())
    }

    /// The folder for the socket: the home if the path is short enough, else one under `/tmp`.
    fn socket_dir(&self) -> anyhow::Result<PathBuf> {
        let home = self.place.home.as_os_str().as_bytes();
        // A comma would make two hosts of it.
        let fits = home.len() + SOCKET_NAME.len() <= SOCKET_PATH_MAX
            && std::str::from_utf8(home).is_ok_and(|text| !text.contains(',') && !text.contains('"'));
        if fits {
            return Ok(self.place.home.clone());
        }
        let remembered = self.place.home.join("socket");
        let known = self.place.read(&remembered).ok().map(PathBuf::from);
        if let Some(dir) = known.filter(|dir| self.is_private(dir)) {
            return Ok(dir);
        }
        let seed = format!("{}-{:?}", std::process::id(), std::time::SystemTime::now());
        let dir =
            Path::new("/tmp").join(format!("refarch-{}", short_hash(&[home, seed.as_bytes()].concat())));
        self.place
            .as_server("mkdir -m 700 -- \"$0\"", &dir, "")
            .with_context(|| format!("cannot create {}", dir.display()))?;
        self.place.write(&remembered, &dir.to_string_lossy())?;
        Ok(dir)
    }

    /// Whether a folder under `/tmp` is still there and nobody else's.
    fn is_private(&self, dir: &Path) -> bool {
        let Ok(data) = fs::symlink_metadata(self.place.data()) else { return false };
        fs::symlink_metadata(dir)
            .is_ok_and(|dir| dir.is_dir() && dir.uid() == data.uid() && dir.mode() & 0o777 == 0o700)
    }

    fn remove_short_socket_dir(&self) {
        let remembered = self.place.home.join("socket");
        if let Ok(dir) = self.place.read(&remembered) {
            // Only ever an empty folder; it is made again at the next start.
            let _ = self.place.as_server("rmdir -- \"$0\"", Path::new(&dir), "");
            let _ = fs::remove_file(remembered);
        }
    }

    fn state(&self) -> State {
        let data = self.place.data();
        let Ok(text) = self.place.read(&data.join("postmaster.pid")) else { return State::Stopped };
        // pid, data directory, start time, port, socket folder, address, shared memory, status
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let pid = lines.first().and_then(|pid| pid.parse::<u32>().ok());
        if !pid.is_some_and(|pid| is_server(pid, &data)) {
            return State::Stopped;
        }
        let ready = lines.get(7).is_some_and(|status| *status == "ready");
        match (lines.get(3).and_then(|port| port.parse().ok()), lines.get(4)) {
            (Some(port), Some(dir)) if ready => State::Ready(Endpoint { port, socket_dir: dir.into() }),
            _ => State::Changing,
        }
    }
}

/// Whether that process is a PostgreSQL server on that data directory, its working directory.
fn is_server(pid: u32, data: &Path) -> bool {
    if cfg!(target_os = "linux") {
        return fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
    }
    let mut command = Command::new("ps");
    command.args(["-ww", "-o", "command=", "-p", &pid.to_string()]);
    let line = command.output().map(|output| output.stdout).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    line.contains("postgres") && line.contains(&*data.to_string_lossy())
}

/// The port, or for 0 one that is free, if it can be bound now.
fn bindable(port: u16) -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr()?.port())
}

/// Whether a failure to connect may be over in a moment.
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

/// Runs a program to its end. Its standard error is the error.
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

//! The measured `refarch`, from outside: its commands and its roles.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use refarch::backend::LoadedModel;
use refarch::config::{self, Settings};
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::mode::{Mode, Variable};

/// Variables that would lead the roles to another database, queue or index than the bench folder's.
const CONFLICTING: &[&str] = &["REFARCH_", "DATABASE_URL", "POSTGRES_DB_", "SQS_", "PINECONE_", "OPENAI_"];

/// Time between two looks at whether a role is ready.
const POLL: Duration = Duration::from_millis(500);

/// How long a role may take to start, and to stop: its grace period and more.
const START_LIMIT: Duration = Duration::from_mins(2);
const STOP_LIMIT: Duration = Duration::from_secs(40);

/// A backlog that does not change for this long will not be worked off.
const STUCK: Duration = Duration::from_mins(3);

/// The roles that run while searches are measured. Each is a process of its own.
const ROLES: [&str; 3] = ["serve", "listen", "embed"];

/// An executable, and the folder with the database that it works on.
pub struct Binary {
    pub path: PathBuf,
    /// The working folder. It may hold a `refarch.toml`.
    pub folder: PathBuf,
    /// The setting `runtime.dir`.
    runtime: PathBuf,
}

impl Binary {
    /// Takes the programs and the model from the runtime folder `installed`, if the folder has none.
    pub fn new(path: PathBuf, folder: &Path, installed: &Path) -> Result<Self> {
        ensure!(
            path.is_file(),
            "there is no binary {}: build it, or name another one with --refarch",
            path.display()
        );
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let folder = folder.canonicalize()?;
        // A folder of refarch itself also serves.
        let runtime = if folder.join("postgres").is_dir() { folder.clone() } else { folder.join(".refarch") };
        std::fs::create_dir_all(&runtime)?;
        if !runtime.join("runtime").exists() {
            let installed = installed.join("runtime").canonicalize().context("run scripts/setup first")?;
            std::os::unix::fs::symlink(installed, runtime.join("runtime"))?;
        }
        Ok(Self { path, folder, runtime })
    }

    /// Whether the folder has a database.
    pub fn has_database(&self) -> bool {
        self.runtime.join("postgres").is_dir()
    }

    /// A command without settings of the caller's environment.
    pub fn command(&self, settings: &[Variable]) -> Command {
        let mut command = Command::new(&self.path);
        for (name, _) in std::env::vars_os() {
            if CONFLICTING.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command
            .env("REFARCH_RUNTIME_DIR", &self.runtime)
            .envs(settings.iter().copied())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs a command to its end. Returns its standard output.
    pub async fn output<S: AsRef<OsStr>>(&self, settings: &[Variable], args: &[S]) -> Result<String> {
        let output = self.command(settings).args(args).output().await?;
        let name = args.first().map(|name| name.as_ref().to_string_lossy().into_owned()).unwrap_or_default();
        ensure!(
            output.status.success(),
            "{} {name} failed: {}",
            self.path.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The settings that choose a mode, if this binary can search that way.
    pub async fn settings(&self, mode: Mode) -> Result<Vec<Variable>> {
        let Err(refusal) = self.output(&mode.settings(), &["config"]).await else {
            return Ok(mode.settings());
        };
        if let Some(older) = mode.settings_without_search()
            && self.output(&older, &["config"]).await.is_ok()
        {
            return Ok(older);
        }
        bail!("mode {} is refused by this binary, leave it out of --modes: {refusal}", mode.name());
    }

    /// The model with which this binary embeds in this folder.
    pub async fn model(&self) -> Result<LoadedModel> {
        let text = self.output(&[], &["config"]).await?;
        let section = text.split("\n[").find(|section| section.starts_with("embedder]"));
        let section = section.with_context(|| format!("{} config shows no embedder", self.path.display()))?;
        let file = config::File { path: "refarch config".into(), text: format!("[{section}") };
        let env = BTreeMap::from([("REFARCH_RUNTIME_DIR".into(), self.runtime.display().to_string())]);
        Ok(LoadedModel::load(&Settings::load(Some(&file), &env, &[])?).await?)
    }

    /// Brings an idle folder up to date: its schema, and every row.
    pub async fn settle(&self) -> Result<()> {
        self.output(&[], &["migrate"]).await?;
        self.output(&[], &["listen", "--until-idle"]).await?;
        self.output(&[], &["embed", "--until-idle"]).await?;
        let text = self.output(&[], &["status", "--json"]).await?;
        let status: Value = serde_json::from_str(&text).context("refarch status --json")?;
        ensure!(status["synced"] == true, "the rows of {} are not in sync: {text}", self.folder.display());
        Ok(())
    }

    /// Waits until every row is searchable in its current state, with a pause between two looks. `refarch
    /// status` reads anew each time.
    pub async fn wait_until_synced(&self, pause: Duration) -> Result<()> {
        let (mut last, mut changed) = (Value::Null, Instant::now());
        loop {
            let text = self.output(&[], &["status", "--json"]).await?;
            let status: Value = serde_json::from_str(&text).context("refarch status --json")?;
            if status["synced"] == true {
                return Ok(());
            }
            ensure!(status["dead_letters"] == 0, "there are dead letters: refarch redrive lists them");
            let now = json!([status["pending"], status["queue"], status["in_sync"], status["unsettled"]]);
            if last != now {
                (last, changed) = (now, Instant::now());
            }
            ensure!(changed.elapsed() < STUCK, "nothing has been indexed for {} s: {text}", STUCK.as_secs());
            tokio::time::sleep(pause).await;
        }
    }

    /// Starts all roles. Returns when requests are answered.
    pub async fn start(&self, settings: &[Variable]) -> Result<Roles> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let bind = format!("127.0.0.1:{port}");
        let mut roles = Roles { children: Vec::new(), url: format!("http://{bind}") };
        for role in ROLES {
            let log = self.folder.join(format!("bench-{role}.log"));
            let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
            let child = self
                .command(settings)
                .arg(role)
                .env("REFARCH_SERVE_BIND", &bind)
                .stdout(file.try_clone()?)
                .stderr(file)
                .spawn()?;
            roles.children.push((role, log, child));
        }
        let started = Instant::now();
        let client = reqwest::Client::new();
        loop {
            roles.check()?;
            let answer = client.get(format!("{}/readyz", roles.url)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(roles);
            }
            ensure!(
                started.elapsed() < START_LIMIT,
                "refarch serve is not ready: see {}",
                self.folder.display()
            );
            tokio::time::sleep(POLL).await;
        }
    }
}

/// The running roles.
pub struct Roles {
    children: Vec<(&'static str, PathBuf, Child)>,
    /// Address of the HTTP API.
    pub url: String,
}

impl Roles {
    /// Fails if a role has ended.
    pub fn check(&mut self) -> Result<()> {
        for (role, log, child) in &mut self.children {
            if let Some(status) = child.try_wait()? {
                bail!("refarch {role} ended ({status}): see {}", log.display());
            }
        }
        Ok(())
    }

    /// Stops all roles.
    pub async fn stop(mut self) -> Result<()> {
        for (_, _, child) in &self.children {
            if let Some(pid) = child.id() {
                kill(Pid::from_raw(pid as i32), Signal::SIGTERM)?;
            }
        }
        for (role, log, child) in &mut self.children {
            if tokio::time::timeout(STOP_LIMIT, child.wait()).await.is_err() {
                eprintln!("refarch {role} does not stop and is killed: see {}", log.display());
                child.kill().await?;
            }
        }
        Ok(())
    }
}

//! The processes of the roles: starts, kills, freezes and restarts them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

/// How long a process may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_mins(1);

/// One process.
struct RoleProcess {
    name: String,
    args: Vec<String>,
    child: Option<Child>,
    frozen_until: Option<Instant>,
    /// Settings in which this process differs from the fleet.
    extra_settings: Vec<(String, String)>,
    /// Whether it refused these settings and ended.
    refuses_settings: bool,
}

/// All processes.
pub struct RoleProcesses {
    processes: Vec<RoleProcess>,
    env: Vec<(String, String)>,
    dir: PathBuf,
    /// Processes that ended by themselves. There must be none.
    pub ended: Vec<String>,
    /// Processes that refused settings which differed from those of the fleet.
    pub refused: u64,
}

impl RoleProcesses {
    /// One process for each of these roles, not started yet. Logs go to `dir`.
    #[must_use]
    pub fn new(roles: &[&[&str]], env: Vec<(String, String)>, dir: &Path) -> Self {
        let processes = roles
            .iter()
            .enumerate()
            .map(|(at, args)| RoleProcess {
                name: format!("{}-{at}", args[0]),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                child: None,
                frozen_until: None,
                extra_settings: Vec::new(),
                refuses_settings: false,
            })
            .collect();
        Self { processes, env, dir: dir.to_owned(), ended: Vec::new(), refused: 0 }
    }

    /// Starts processes that do not run, thaws processes whose time is over, and notes processes that ended
    /// by themselves.
    pub fn supervise(&mut self) -> anyhow::Result<()> {
        for process in &mut self.processes {
            if process.frozen_until.is_some_and(|until| until <= Instant::now()) {
                process.thaw();
            }
            if let Some(child) = &mut process.child
                && let Some(status) = child.try_wait()?
            {
                process.child = None;
                if process.extra_settings.is_empty() {
                    self.ended.push(format!("{} ({status})", process.name));
                } else {
                    // It refused settings that differ from the schema's. The other processes go on.
                    self.refused += 1;
                    process.refuses_settings = true;
                }
            }
            if process.child.is_none() && !process.refuses_settings {
                process.start(&self.env, &self.dir)?;
            }
        }
        Ok(())
    }

    /// Kills a process; [`Self::supervise`] starts it again.
    pub async fn kill(&mut self, at: usize) -> anyhow::Result<()> {
        let process = &mut self.processes[at];
        process.frozen_until = None;
        if let Some(mut child) = process.child.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Restarts every second process with these additional settings.
    pub async fn reconfigure_half(&mut self, settings: &[(String, String)]) -> anyhow::Result<()> {
        for at in (1..self.processes.len()).step_by(2) {
            self.kill(at).await?;
            self.processes[at].extra_settings = settings.to_vec();
        }
        self.supervise()
    }

    /// Restarts all processes with the same settings.
    pub async fn reconfigure_all(&mut self, env: Vec<(String, String)>) -> anyhow::Result<()> {
        self.env = env;
        for at in 0..self.processes.len() {
            self.kill(at).await?;
            self.processes[at].extra_settings.clear();
            self.processes[at].refuses_settings = false;
        }
        self.supervise()
    }

    /// Freezes a process; [`Self::supervise`] thaws it.
    pub fn freeze(&mut self, at: usize, long: Duration) {
        let process = &mut self.processes[at];
        process.signal(Signal::SIGSTOP);
        process.frozen_until = Some(Instant::now() + long);
    }

    /// Thaws all processes.
    pub fn thaw_all(&mut self) {
        self.processes.iter_mut().for_each(RoleProcess::thaw);
    }

    /// Sends SIGTERM to all processes, and waits for their end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        self.thaw_all();
        for process in &self.processes {
            process.signal(Signal::SIGTERM);
        }
        for process in &mut self.processes {
            let Some(mut child) = process.child.take() else { continue };
            let ended = tokio::time::timeout(STOP_TIMEOUT, child.wait()).await;
            let status = ended.with_context(|| {
                format!("{} did not end within {STOP_TIMEOUT:?} after SIGTERM", process.name)
            })??;
            if !status.success() {
                self.ended.push(format!("{} ({status})", process.name));
            }
        }
        Ok(())
    }
}

impl RoleProcess {
    fn start(&mut self, env: &[(String, String)], dir: &Path) -> anyhow::Result<()> {
        let path = dir.join(format!("{}.log", self.name));
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let program = std::env::current_exe().context("find this executable")?;
        let child = Command::new(program)
            .args(&self.args)
            .env_clear()
            .envs(env.iter().chain(&self.extra_settings).map(|(name, value)| (name, value)))
            // A folder without refarch.toml, and no signals from this terminal.
            .current_dir(dir)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn();
        self.child = Some(child.with_context(|| format!("cannot start {}", self.name))?);
        Ok(())
    }

    fn thaw(&mut self) {
        if self.frozen_until.take().is_some() {
            self.signal(Signal::SIGCONT);
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            // A process that has just ended cannot receive the signal.
            let _ = kill(Pid::from_raw(pid as i32), signal);
        }
    }
}

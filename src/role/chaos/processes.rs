//! The processes of the roles: starts, kills, freezes and restarts them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::Signal;

use crate::role::process::{self, RoleProcess};

/// How long a process may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_mins(1);

/// A role that is to run, and its process.
struct Member {
    name: String,
    args: Vec<String>,
    process: Option<RoleProcess>,
    frozen_until: Option<Instant>,
    /// Settings in which this process differs from the fleet.
    extra_settings: Vec<(String, String)>,
    /// Whether it refused these settings and ended.
    refuses_settings: bool,
}

/// All processes.
pub struct RoleProcesses {
    processes: Vec<Member>,
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
            .map(|(at, args)| Member {
                name: format!("{}-{at}", args[0]),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                process: None,
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
        for member in &mut self.processes {
            if member.frozen_until.is_some_and(|until| until <= Instant::now()) {
                member.thaw();
            }
            if let Some(process) = &mut member.process
                && let Some(status) = process.try_wait()?
            {
                member.process = None;
                if member.extra_settings.is_empty() {
                    self.ended.push(format!("{} ({status})", member.name));
                } else {
                    // It refused settings that differ from the schema's. The other processes go on.
                    self.refused += 1;
                    member.refuses_settings = true;
                }
            }
            if member.process.is_none() && !member.refuses_settings {
                member.start(&self.env, &self.dir)?;
            }
        }
        Ok(())
    }

    /// Kills a process; [`Self::supervise`] starts it again.
    pub async fn kill(&mut self, at: usize) -> anyhow::Result<()> {
        let member = &mut self.processes[at];
        member.frozen_until = None;
        if let Some(mut process) = member.process.take() {
            process.kill().await?;
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
        let member = &mut self.processes[at];
        member.signal(Signal::SIGSTOP);
        member.frozen_until = Some(Instant::now() + long);
    }

    /// Thaws all processes.
    pub fn thaw_all(&mut self) {
        self.processes.iter_mut().for_each(Member::thaw);
    }

    /// Sends SIGTERM to all processes, and waits for their end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        self.thaw_all();
        for member in &self.processes {
            member.signal(Signal::SIGTERM);
        }
        for member in &mut self.processes {
            let Some(mut process) = member.process.take() else { continue };
            let status = process.wait_within(STOP_TIMEOUT).await?;
            if !status.success() {
                self.ended.push(format!("{} ({status})", member.name));
            }
        }
        Ok(())
    }
}

impl Member {
    fn start(&mut self, env: &[(String, String)], dir: &Path) -> anyhow::Result<()> {
        let path = dir.join(format!("{}.log", self.name));
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let mut command = process::command(&self.name, &self.args)?;
        command
            .env_clear()
            .envs(env.iter().chain(&self.extra_settings).map(|(name, value)| (name, value)))
            // A folder without refarch.toml.
            .current_dir(dir)
            .stderr(log);
        self.process = Some(RoleProcess::start(&self.name, command)?);
        Ok(())
    }

    fn thaw(&mut self) {
        if self.frozen_until.take().is_some() {
            self.signal(Signal::SIGCONT);
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            process.signal(signal);
        }
    }
}

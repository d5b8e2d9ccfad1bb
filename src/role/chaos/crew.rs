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
const ENDS_WITHIN: Duration = Duration::from_mins(1);

/// One process.
struct Hand {
    name: String,
    args: Vec<String>,
    child: Option<Child>,
    frozen_until: Option<Instant>,
    /// Settings in which this process differs from the fleet.
    differs: Vec<(String, String)>,
    /// Whether it refused these settings and ended.
    sits_out: bool,
}

/// All processes.
pub struct Crew {
    hands: Vec<Hand>,
    env: Vec<(String, String)>,
    dir: PathBuf,
    /// Processes that ended by themselves. There must be none.
    pub ended: Vec<String>,
    /// Processes that refused settings which differed from those of the fleet.
    pub refused: u64,
}

impl Crew {
    /// One process for each of these roles, not started yet. Logs go to `dir`.
    #[must_use]
    pub fn new(roles: &[&[&str]], env: Vec<(String, String)>, dir: &Path) -> Self {
        let hands = roles
            .iter()
            .enumerate()
            .map(|(at, args)| Hand {
                name: format!("{}-{at}", args[0]),
                args: args.iter().map(|arg| (*arg).to_owned()).collect(),
                child: None,
                frozen_until: None,
                differs: Vec::new(),
                sits_out: false,
            })
            .collect();
        Self { hands, env, dir: dir.to_owned(), ended: Vec::new(), refused: 0 }
    }

    /// Starts processes that do not run, thaws processes whose time is over, and notes processes that ended
    /// by themselves.
    pub fn tend(&mut self) -> anyhow::Result<()> {
        for hand in &mut self.hands {
            if hand.frozen_until.is_some_and(|until| until <= Instant::now()) {
                hand.thaw();
            }
            if let Some(child) = &mut hand.child
                && let Some(status) = child.try_wait()?
            {
                hand.child = None;
                if hand.differs.is_empty() {
                    self.ended.push(format!("{} ({status})", hand.name));
                } else {
                    // It refused settings that differ from the schema's. The other processes go on.
                    self.refused += 1;
                    hand.sits_out = true;
                }
            }
            if hand.child.is_none() && !hand.sits_out {
                hand.start(&self.env, &self.dir)?;
            }
        }
        Ok(())
    }

    /// Kills a process; [`Self::tend`] starts it again.
    pub async fn kill(&mut self, at: usize) -> anyhow::Result<()> {
        let hand = &mut self.hands[at];
        hand.frozen_until = None;
        if let Some(mut child) = hand.child.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Restarts every second process with these additional settings.
    pub async fn give_half_other_settings(&mut self, settings: &[(String, String)]) -> anyhow::Result<()> {
        for at in (1..self.hands.len()).step_by(2) {
            self.kill(at).await?;
            self.hands[at].differs = settings.to_vec();
        }
        self.tend()
    }

    /// Restarts all processes with the same settings.
    pub async fn give_all_the_same_settings(&mut self, env: Vec<(String, String)>) -> anyhow::Result<()> {
        self.env = env;
        for at in 0..self.hands.len() {
            self.kill(at).await?;
            self.hands[at].differs.clear();
            self.hands[at].sits_out = false;
        }
        self.tend()
    }

    /// Freezes a process; [`Self::tend`] thaws it.
    pub fn freeze(&mut self, at: usize, long: Duration) {
        let hand = &mut self.hands[at];
        hand.signal(Signal::SIGSTOP);
        hand.frozen_until = Some(Instant::now() + long);
    }

    /// Thaws all processes.
    pub fn thaw_all(&mut self) {
        self.hands.iter_mut().for_each(Hand::thaw);
    }

    /// Sends SIGTERM to all processes, and waits for their end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        self.thaw_all();
        for hand in &self.hands {
            hand.signal(Signal::SIGTERM);
        }
        for hand in &mut self.hands {
            let Some(mut child) = hand.child.take() else { continue };
            let ended = tokio::time::timeout(ENDS_WITHIN, child.wait()).await;
            let status = ended.with_context(|| {
                format!("{} did not end within {ENDS_WITHIN:?} after SIGTERM", hand.name)
            })??;
            if !status.success() {
                self.ended.push(format!("{} ({status})", hand.name));
            }
        }
        Ok(())
    }
}

impl Hand {
    fn start(&mut self, env: &[(String, String)], dir: &Path) -> anyhow::Result<()> {
        let path = dir.join(format!("{}.log", self.name));
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}", path.display()))?;
        let program = std::env::current_exe().context("find this executable")?;
        let child = Command::new(program)
            .args(&self.args)
            .env_clear()
            .envs(env.iter().chain(&self.differs).map(|(name, value)| (name, value)))
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

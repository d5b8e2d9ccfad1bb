//! The embed processes of `refarch up --processes`: started and drained as the load asks for, and started
//! again when they end by themselves.
//!
//! The processes end with this one, however it ends: each has a pipe to this process as its standard input,
//! and stops when the pipe is closed.

use std::collections::HashMap;
use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures::future::{self, FutureExt as _};
use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use super::process::{self, RoleProcess};
use super::scaling::{self, Scaled, Seen};
use crate::backend::Backends;
use crate::backend::postgres::event;
use crate::backend::postgres::worker_registry::{EmbedWorker, host_name};
use crate::cli;
use crate::config::Settings;
use crate::pipeline::clock::{BootClock, Clock as _};
use crate::pipeline::metrics::Metrics;
use crate::pipeline::retry::Backoff;

/// A process that runs for so long has started well: if it ends then, it is started again without a long
/// pause.
const STARTED_WELL: Duration = Duration::from_mins(1);

/// A process that drains is killed this long after its grace period.
const KILL_AFTER_GRACE: Duration = Duration::from_secs(5);

/// Time between two checks of a fleet whose number is fixed.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// A process that is to run.
struct Member {
    number: usize,
    process: Option<RoleProcess>,
    /// When it was started, or is to be started again.
    at: Duration,
    backoff: Backoff,
    /// Changes that it held at the last look.
    held: u64,
}

/// A process that was told to end, and when it is killed.
struct Draining {
    number: usize,
    process: RoleProcess,
    kill_at: Duration,
}

/// The embed processes of this process.
struct Fleet<'a> {
    backends: &'a Backends,
    /// The arguments of each process.
    args: Vec<OsString>,
    grace: Duration,
    /// The name under which events are recorded.
    worker: String,
    host: String,
    members: Vec<Member>,
    draining: Vec<Draining>,
    /// What each process has applied, and all together, those that have ended included.
    applied_by: HashMap<String, u64>,
    applied: u64,
}

/// Runs `least` to `most` embed processes until `stop`, and drains them.
pub(super) async fn work(
    backends: &Backends,
    settings: &Settings,
    global: &cli::Global,
    (least, most): (usize, usize),
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let host = host_name();
    let worker = format!("up-{host}-{}", std::process::id());
    let mut fleet = Fleet {
        backends,
        args: arguments(settings, global),
        grace: settings.runtime.grace,
        worker: worker.clone(),
        host,
        members: Vec::new(),
        draining: Vec::new(),
        applied_by: HashMap::new(),
        applied: 0,
    };
    fleet.scale_to(least).await?;
    if most > least {
        let policy = scaling::policy(&settings.scaling, least, most);
        scaling::run_until(&mut fleet, policy, backends, &worker, metrics, stop).await;
    } else {
        while stop.run_until_cancelled(fleet.wait(CHECK_EVERY)).await.is_some() {}
    }
    fleet.drain().await
}

/// The arguments of an embed process: the same settings, and one thread if nothing else is set, because the
/// processes share the cores.
fn arguments(settings: &Settings, global: &cli::Global) -> Vec<OsString> {
    let indexer = &settings.indexer;
    let threads = if indexer.workers == 0 && indexer.max_workers == 0 {
        cli::Range { least: 1, most: 1 }
    } else {
        cli::Range { least: indexer.worker_count(), most: indexer.max_worker_count() }
    };
    let mut args = global.args();
    if settings.admin.listen.is_some() {
        // The address of this process is taken.
        args.extend(["--admin", "127.0.0.1:0"].map(OsString::from));
    }
    args.extend(["embed", "--stop-with-stdin", "--workers"].map(OsString::from));
    args.push(threads.to_string().into());
    args
}

impl Fleet<'_> {
    /// Starts the processes whose time has come, and kills those that drain for too long.
    fn attend(&mut self) {
        let now = BootClock.now();
        for member in &mut self.members {
            if member.process.is_some() || member.at > now {
                continue;
            }
            let name = format!("embed-{}", member.number);
            let started = process::command(&name, &self.args).and_then(|mut command| {
                command.stdin(Stdio::piped());
                RoleProcess::start(&name, command)
            });
            match started {
                Ok(process) => {
                    tracing::info!(process = name, pid = process.pid(), "process started");
                    (member.process, member.at) = (Some(process), now);
                }
                Err(error) => {
                    member.at = now + member.backoff.next(&BootClock);
                    tracing::error!(process = name, error = %format_args!("{error:#}"), "cannot start a process");
                }
            }
        }
        for draining in self.draining.iter_mut().filter(|draining| draining.kill_at <= now) {
            tracing::warn!(process = draining.process.name, "killed: it did not end within its grace period");
            draining.process.signal(Signal::SIGKILL);
            draining.kill_at = Duration::MAX;
        }
    }

    /// When [`Self::attend`] has something to do next.
    fn next_duty(&self) -> Option<Duration> {
        let starts = self.members.iter().filter(|member| member.process.is_none()).map(|member| member.at);
        starts.chain(self.draining.iter().map(|draining| draining.kill_at)).min()
    }

    /// Waits until some process has ended.
    async fn any_ended(&mut self) {
        let members = self.members.iter_mut().filter_map(|member| member.process.as_mut());
        let draining = self.draining.iter_mut().map(|draining| &mut draining.process);
        let waiting: Vec<_> = members.chain(draining).map(|process| process.wait().boxed()).collect();
        if waiting.is_empty() {
            return future::pending().await;
        }
        // How it ended is asked again.
        let _ = future::select_all(waiting).await;
    }

    /// Notes the processes that have ended. Those that were not told to are started again after a pause.
    async fn reap(&mut self) {
        let now = BootClock.now();
        self.draining.retain_mut(|draining| match draining.process.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                tracing::info!(process = draining.process.name, %status, "process drained");
                false
            }
            Err(_) => false,
        });
        let mut texts = Vec::new();
        for member in &mut self.members {
            let Some(process) = &mut member.process else { continue };
            let Ok(Some(status)) = process.try_wait() else { continue };
            if now.saturating_sub(member.at) >= STARTED_WELL {
                member.backoff.reset();
            }
            let pause = member.backoff.next(&BootClock);
            let text = ended(&process.name, status, pause);
            tracing::warn!(process = process.name, %status, retry_in_ms = pause.as_millis() as u64, "process ended");
            (member.process, member.at, member.held) = (None, now + pause, 0);
            texts.push(text);
        }
        for text in texts {
            if let Err(error) = event::record_ended(&self.backends.postgres, &self.worker, &text).await {
                tracing::debug!(%error, "cannot record the end of a process");
            }
        }
    }

    /// Tells one process to end: one that does not run, else one that holds no work, else the newest.
    fn retire(&mut self) {
        let order =
            |member: &Member| (member.process.is_some(), member.held > 0, std::cmp::Reverse(member.number));
        let at = (0..self.members.len()).min_by_key(|at| order(&self.members[*at]));
        let Some(Member { number, process: Some(process), .. }) = at.map(|at| self.members.swap_remove(at))
        else {
            return;
        };
        tracing::info!(process = process.name, "process told to end");
        process.signal(Signal::SIGTERM);
        let kill_at = BootClock.now() + self.grace + KILL_AFTER_GRACE;
        self.draining.push(Draining { number, process, kill_at });
    }

    /// Ends all processes.
    async fn drain(mut self) -> anyhow::Result<()> {
        while !self.members.is_empty() {
            self.retire();
        }
        while !self.draining.is_empty() {
            self.wait(CHECK_EVERY).await;
        }
        Ok(())
    }

    /// The smallest number that no process has.
    fn free_number(&self) -> usize {
        let taken = |number: &usize| {
            self.members.iter().any(|member| member.number == *number)
                || self.draining.iter().any(|draining| draining.number == *number)
        };
        let most = self.members.len() + self.draining.len() + 1;
        (1..=most).find(|number| !taken(number)).unwrap_or(most)
    }
}

fn ended(name: &str, status: ExitStatus, pause: Duration) -> String {
    format!("{name} ended ({status}), and is started again in {:.1} s", pause.as_secs_f64())
}

impl Scaled for Fleet<'_> {
    const WORKERS: &'static str = "processes";

    fn current(&self) -> usize {
        self.members.len()
    }

    fn look(&mut self, embedders: &[EmbedWorker], queued: bool) -> Seen {
        let (mut ready, mut threads, mut others, mut holding) = (0, 0, 0, 0);
        self.members.iter_mut().for_each(|member| member.held = 0);
        for embedder in embedders {
            let runs =
                |process: &RoleProcess| embedder.host == self.host && process.pid() == Some(embedder.pid);
            let drains = self.draining.iter().any(|draining| runs(&draining.process));
            let member = self.members.iter_mut().find(|member| member.process.as_ref().is_some_and(runs));
            if !drains && member.is_none() {
                others += embedder.threads;
                continue;
            }
            let before = self.applied_by.insert(embedder.id.clone(), embedder.applied).unwrap_or_default();
            self.applied += embedder.applied.saturating_sub(before);
            if let Some(member) = member {
                ready += 1;
                threads += embedder.threads;
                holding += usize::from(embedder.held > 0);
                member.held = embedder.held;
            }
        }
        self.applied_by.retain(|id, _| embedders.iter().any(|embedder| embedder.id == *id));
        // All embed processes take from one queue: while it holds anything, none of them is idle for long.
        Seen {
            applied: self.applied,
            ready,
            holding,
            saturated: queued,
            share: scaling::share(threads, others),
        }
    }

    async fn scale_to(&mut self, desired: usize) -> anyhow::Result<()> {
        while self.members.len() < desired {
            let (number, at) = (self.free_number(), Duration::ZERO);
            self.members.push(Member { number, process: None, at, backoff: Backoff::default(), held: 0 });
        }
        while self.members.len() > desired {
            self.retire();
        }
        self.attend();
        Ok(())
    }

    async fn wait(&mut self, pause: Duration) {
        let until = BootClock.now() + pause;
        loop {
            self.attend();
            let now = BootClock.now();
            if now >= until {
                return;
            }
            let next = self.next_duty().map_or(until, |next| next.min(until));
            tokio::select! {
                () = tokio::time::sleep(next.saturating_sub(now)) => {}
                () = self.any_ended() => {
                    self.reap().await;
                    if self.members.is_empty() && self.draining.is_empty() {
                        return;
                    }
                }
            }
        }
    }
}

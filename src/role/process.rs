//! Roles in processes of their own, which this process starts and stops.

use std::ffi::OsStr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStdin, Command};

/// A process of a role.
pub(super) struct RoleProcess {
    /// The name, for logs and for `ps`.
    pub(super) name: String,
    child: Child,
    /// The other end of its standard input, if that is a pipe. Kept here, because [`Child::wait`] would close
    /// it.
    _stdin: Option<ChildStdin>,
}

/// This executable with these arguments, as a process named `refarch-NAME`. It gets no signals from this
/// terminal, and is killed when its [`RoleProcess`] is dropped.
pub(super) fn command(
    name: &str,
    args: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("find this executable")?);
    command
        .arg0(format!("refarch-{name}"))
        .args(args)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    Ok(command)
}

impl RoleProcess {
    /// Starts a process.
    pub(super) fn start(name: &str, mut command: Command) -> anyhow::Result<Self> {
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), _stdin: child.stdin.take(), child })
    }

    /// Its number, while it runs.
    pub(super) fn pid(&self) -> Option<i32> {
        self.child.id().map(|pid| pid as i32)
    }

    /// How it ended, if it did.
    pub(super) fn try_wait(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end. Nothing is lost if the future is dropped.
    pub(super) async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.child.wait().await?)
    }

    /// Waits for its end after SIGTERM, which the caller has sent.
    pub(super) async fn wait_within(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let ended = tokio::time::timeout(timeout, self.child.wait()).await;
        Ok(ended.with_context(|| format!("{} did not end within {timeout:?} after SIGTERM", self.name))??)
    }

    /// Ends it at once.
    pub(super) async fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Sends a signal. A process that has just ended cannot receive it.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

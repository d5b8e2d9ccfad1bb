//! Stop signals: the first one drains the process, the second one forces the exit.

use tokio_util::sync::CancellationToken;

/// Exit code after a second stop signal: 128 + SIGINT, as shells report it.
const FORCED_EXIT: i32 = 130;

/// A token that is cancelled by the first SIGTERM or Ctrl-C. A second one ends the process at once.
pub fn on_signal() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let token = stop.clone();
    tokio::spawn(async move {
        for forced in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if forced {
                tracing::warn!("second stop signal: exiting now; the held messages become visible again");
                std::process::exit(FORCED_EXIT);
            }
            tracing::info!("stopping: finishing the held messages; a second signal forces the exit");
            token.cancel();
        }
    });
    Ok(stop)
}

/// Cancels `stop` when standard input is closed. A process that holds the other end of a pipe, and never
/// writes to it, so takes this process along, however it ends.
pub fn on_closed_stdin(stop: &CancellationToken) {
    let stop = stop.clone();
    // A thread of its own: the end of the runtime would wait for a read that tokio has under way.
    std::thread::spawn(move || {
        // An error is as good as the end: nobody is at the other end.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        if !stop.is_cancelled() {
            tracing::info!("stopping: the process that started this one has ended");
            stop.cancel();
        }
    });
}

/// A token that is cancelled as soon as `grace` has passed since `stop`.
#[must_use]
pub fn after_grace(stop: &CancellationToken, grace: std::time::Duration) -> CancellationToken {
    let abort = CancellationToken::new();
    let (stop, token) = (stop.clone(), abort.clone());
    tokio::spawn(async move {
        stop.cancelled().await;
        tokio::time::sleep(grace).await;
        if !token.is_cancelled() {
            tracing::warn!(grace_s = grace.as_secs(), "grace period is over: releasing the held messages");
            token.cancel();
        }
    });
    abort
}

//! Time as the pipeline sees it.
//!
//! A trait, so that a simulation can run thousands of schedules in a second with its own clock.

use std::time::Duration;

use async_trait::async_trait;

/// A clock that counts while the machine sleeps, and the waiting that goes with it.
#[async_trait]
pub trait Clock: Send + Sync {
    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// A number from 0 to 1, for jitter: chance belongs to a schedule as time does.
    fn chance(&self) -> f64;

    /// Returns when `duration` has passed.
    async fn sleep(&self, duration: Duration);
}

/// The machine's boot-time clock: unlike the monotonic one it goes on during suspend, so that a
/// worker that slept cannot believe its lease to be young.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootClock;

#[async_trait]
impl Clock for BootClock {
    fn now(&self) -> Duration {
        // On Apple's systems the monotonic clock is the one that counts while asleep.
        #[cfg(any(target_os = "linux", target_os = "android"))]
        let id = nix::time::ClockId::CLOCK_BOOTTIME;
        #[cfg(not(any(target_os = "linux", target_os = "android")))]
        let id = nix::time::ClockId::CLOCK_MONOTONIC;
        // Fails for a clock that does not exist only, and this one does.
        nix::time::clock_gettime(id).map(Duration::from).unwrap_or_default()
    }

    fn chance(&self) -> f64 {
        rand::random()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

//! How many workers there should be: target tracking, as a state machine that knows neither threads nor
//! processes.
//!
//! A [`Scaler`] is asked again and again, with the time, the number of workers that were asked for, and what
//! was observed. It answers with a [`Decision`]: the number of workers, and the reason. It reads no clock and
//! no database, so a simulation can drive it through hours in a moment.
//!
//! # The two metrics
//!
//! *Backlog seconds* is how long the workers would need for all changes that are not in the index yet:
//!
//! > (pending + queued + in flight) / (changes a second of one worker * workers)
//!
//! It rises as soon as work waits, whatever the work waits for, and it says how many workers are needed: that
//! many finish the backlog within [`Policy::target`]. *CPU* is what the reference architecture tracks.
//!
//! # The rules
//!
//! - **Out**: to as many workers as finish the backlog within the target. Workers that are starting count, so
//!   a slow start adds no more workers than the backlog asks for. One step multiplies them by
//!   [`Policy::growth`] at most. A worker that adds no throughput is the
//!   last one for [`NO_GAIN_FOR`]. While nothing gets through (an outage), no worker is added.
//! - **In**: to the most workers that were wanted during a whole cooldown. As many stay as do what arrives
//!   with [`UTILIZATION`] of their speed, and as many as hold work now. So a steady load makes no circle of
//!   out and in.
//! - Without an observation the number stays, and the time of the cooldown before scaling in begins anew.

mod decision;
mod gauges;
mod observation;
mod policy;
mod rate;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use rate::RateMeter;

pub use decision::{Decision, Measured, Reason};
pub use gauges::ScalingGauges;
pub use observation::Observation;
pub use policy::{GROWTH, Metric, Policy};

/// The metric must be this much above its target before workers are added, so that noise adds none.
const TOLERANCE: f64 = 1.1;

/// What is left after scaling in does the changes that arrive with at most this part of its speed. Without
/// this reserve, the backlog would grow again.
pub const UTILIZATION: f64 = 0.8;

/// The same for the CPU: what is left may use at most this part of the target. Of the reference
/// architecture's service.
const CPU_RESERVE: f64 = 0.9;

/// Weight of older values of the CPU use: after this time, a third is left.
const CPU_MEMORY: Duration = Duration::from_secs(30);

/// Workers were added in vain if the throughput grew by less than this part of what they should have added.
const MIN_GAIN: f64 = 0.1;

/// If so few workers are added to so many, the noise of the throughput hides whether it grew.
const MIN_TRIAL: f64 = 0.2;

/// After workers were added in vain, it is tried again after this time: somebody else may have used the
/// machine.
pub const NO_GAIN_FOR: Duration = Duration::from_mins(10);

/// Workers that were added, until it is known whether they made anything faster.
#[derive(Clone, Copy, Debug)]
struct Trial {
    from: usize,
    to: usize,
    /// Changes a second of all workers before.
    before: f64,
}

/// Decides about the number of workers. See the [module](self).
#[derive(Debug)]
pub struct Scaler {
    policy: Policy,
    meter: RateMeter,
    /// CPU use of all workers together, averaged, and when it was last seen.
    cpu: Option<(f64, Duration)>,
    last_out: Option<Duration>,
    last_step: Option<Duration>,
    /// Workers that were wanted during the last [`Policy::cooldown_in`].
    wanted: VecDeque<(Duration, usize)>,
    /// Since when there was an observation each time.
    watched_since: Option<Duration>,
    trial: Option<Trial>,
    /// More workers than this made nothing faster; until when that is believed.
    ceiling: Option<(usize, Duration)>,
}

impl Scaler {
    /// A scaler that has seen nothing yet. Bounds that contradict each other are mended: at least one worker,
    /// and no fewer at most than at least. So is a growth that bounds nothing.
    #[must_use]
    pub fn new(mut policy: Policy) -> Self {
        policy.least = policy.least.max(1);
        policy.most = policy.most.max(policy.least);
        policy.growth = if policy.growth.is_finite() { policy.growth.max(1.0) } else { GROWTH };
        Self {
            policy,
            meter: RateMeter::default(),
            cpu: None,
            last_out: None,
            last_step: None,
            wanted: VecDeque::new(),
            watched_since: None,
            trial: None,
            ceiling: None,
        }
    }

    /// The policy in use.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Changes a second of one worker that has enough to do; none before it was measured.
    #[must_use]
    pub fn rate(&self) -> Option<f64> {
        self.meter.rate()
    }

    /// Decides. `now` must not go back; `current` is the number of workers that were asked for, those that
    /// are starting included. Without an observation (the database cannot be asked), nothing is scaled.
    ///
    /// A caller carries out what is decided before it asks again.
    pub fn decide(&mut self, now: Duration, current: usize, observed: Option<&Observation>) -> Decision {
        let bounded = current.clamp(self.policy.least, self.policy.most);
        if bounded != current {
            self.stepped(now, bounded > current);
            return Decision { current, desired: bounded, reason: Reason::Bounds };
        }
        let stay = |reason| Decision { current, desired: current, reason };
        let Some(observed) = observed else {
            self.meter.interrupt();
            self.cpu = None;
            self.wanted.clear();
            self.watched_since = None;
            return stay(Reason::Unknown);
        };
        self.meter.observe(now, observed);
        self.judge_trial(now, observed.ready);
        let since = *self.watched_since.get_or_insert(now);
        let Some((measured, out, least_in)) = self.want(now, current, observed) else {
            self.wanted.push_back((now, current));
            return stay(Reason::Measuring);
        };
        let window = self.policy.cooldown_in;
        self.wanted.retain(|(at, _)| now.saturating_sub(*at) <= window);
        self.wanted.push_back((now, least_in.max(out)));
        if out > current && measured.value > measured.target * TOLERANCE {
            return match self.may_add(now, current, measured) {
                Err(reason) => stay(reason),
                Ok(cap) => {
                    let desired = out.min(cap);
                    self.trial = self.meter.throughput_if_measured().map(|before| Trial {
                        from: current,
                        to: desired,
                        before,
                    });
                    self.stepped(now, true);
                    Decision { current, desired, reason: Reason::Above(measured) }
                }
            };
        }
        let wanted = self.wanted.iter().map(|(_, wanted)| *wanted).max().unwrap_or(current);
        // A change in flight is held by some worker.
        let holding = observed.holding.max(usize::from(observed.in_flight > 0));
        let desired = wanted.max(holding).max(self.policy.least);
        if wanted >= current {
            return stay(Reason::OnTarget(measured));
        }
        let quiet_since = self.last_step.map_or(since, |step| step.max(since));
        if now.saturating_sub(quiet_since) < window {
            return stay(Reason::Cooldown(measured));
        }
        if desired >= current {
            return stay(Reason::Holding(measured));
        }
        self.stepped(now, false);
        Decision { current, desired, reason: Reason::Below(measured) }
    }

    /// The metric, the workers that bring it to its target, and the workers that must stay when scaling in.
    /// None if that cannot be told yet.
    fn want(
        &mut self,
        now: Duration,
        current: usize,
        observed: &Observation,
    ) -> Option<(Measured, usize, usize)> {
        let Policy { metric, target, most, .. } = self.policy;
        let whole = |workers: f64| workers.ceil().min(most as f64) as usize;
        let value = match metric {
            Metric::Cpu => {
                let used = self.average_cpu(now, observed.cpu? * observed.ready as f64);
                let measured = Measured { metric, value: used / observed.ready.max(1) as f64, target };
                return Some((measured, whole(used / target), whole(used / (target * CPU_RESERVE))));
            }
            Metric::Backlog => observed.backlog() as f64,
        };
        let Some(rate) = self.meter.rate() else {
            // Idle since the start: nothing has to be known of their speed.
            let is_idle = !observed.saturated && observed.pending + observed.queued == 0;
            return is_idle.then_some((Measured { metric, value: 0.0, target }, 0, 0));
        };
        let seconds = value / rate;
        let measured = Measured { metric, value: seconds / current as f64, target };
        let arriving = whole(self.meter.throughput() / (rate * UTILIZATION));
        Some((measured, whole(seconds / target), arriving))
    }

    fn average_cpu(&mut self, now: Duration, used: f64) -> f64 {
        let average = match self.cpu {
            None => used,
            Some((average, at)) => {
                let kept = (-now.saturating_sub(at).as_secs_f64() / CPU_MEMORY.as_secs_f64()).exp();
                average * kept + used * (1.0 - kept)
            }
        };
        self.cpu = Some((average, now));
        average
    }

    /// The most workers after a step out, or why there is no such step now.
    fn may_add(&self, now: Duration, current: usize, measured: Measured) -> Result<usize, Reason> {
        let Policy { most, cooldown_out, growth, metric, .. } = self.policy;
        if current >= most {
            return Err(Reason::AtMost(measured));
        }
        if self.last_out.is_some_and(|out| now.saturating_sub(out) < cooldown_out) {
            return Err(Reason::Cooldown(measured));
        }
        if metric == Metric::Backlog && self.meter.is_stalled() {
            return Err(Reason::Stalled);
        }
        let grown = (current as f64 * growth).min(most as f64) as usize;
        let ceiling = self.ceiling.filter(|(_, until)| now < *until).map_or(most, |(ceiling, _)| ceiling);
        if current >= ceiling {
            return Err(Reason::NoGain(measured));
        }
        Ok(grown.max(current + 1).min(ceiling).min(most))
    }

    /// Finds out whether the workers that were added last made anything faster.
    fn judge_trial(&mut self, now: Duration, ready: usize) {
        let Some(Trial { from, to, before }) = self.trial else { return };
        if ready < to {
            return;
        }
        let Some(after) = self.meter.throughput_if_measured() else { return };
        self.trial = None;
        let expected = (to - from) as f64 / from as f64;
        if expected >= MIN_TRIAL && after < before * (1.0 + MIN_GAIN * expected) {
            self.ceiling = Some((from, now + NO_GAIN_FOR));
        } else if self.ceiling.is_some_and(|(ceiling, _)| ceiling < to) {
            self.ceiling = None;
        }
    }

    /// Notes a step.
    fn stepped(&mut self, now: Duration, out: bool) {
        self.last_step = Some(now);
        if out {
            self.last_out = Some(now);
        } else {
            self.trial = None;
        }
    }
}

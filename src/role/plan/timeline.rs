//! What the model saw: amounts over time, and what follows from them.

use super::amounts::Amounts;
use super::scenario::{Scenario, Stage};
use crate::pipeline::scaling::Decision;

/// Edits that are followed through the run, at even distances.
const FOLLOWED: usize = 2_000;

/// A phase that takes a smaller part of the run is a transition, and is not shown.
const SHORT_PHASE: f64 = 0.005;

/// The state at an event, and the rates that hold from it on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub(super) at: f64,
    pub(super) workers: u32,
    pub(super) starting: u32,
    pub(super) amounts: Amounts,
    /// Rows a second that become searchable, and the edits among them that took the live lane.
    pub(super) rate: f64,
    pub(super) live_rate: f64,
    pub(super) limit: Stage,
}

/// A decision that changed the number of workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Decided {
    pub(super) at: f64,
    pub(super) decision: Decision,
}

/// A time in which one stage limits the flow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Phase {
    pub(super) from: f64,
    pub(super) to: f64,
    pub(super) limit: Stage,
    /// Rows a second, on the average of the phase.
    pub(super) rate: f64,
}

/// Freshness of the edits during the load, in seconds; infinite where the load never ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Freshness {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) worst: f64,
    /// The part of the edits that found the live lane full.
    pub(super) spilled: f64,
}

/// A run of the model.
#[derive(Clone, Debug, Default)]
pub(super) struct Timeline {
    pub(super) points: Vec<Point>,
    pub(super) decisions: Vec<Decided>,
    /// When the last row of the load was searchable.
    pub(super) drained: Option<f64>,
    /// Time of all workers together, that of their start included.
    pub(super) worker_seconds: f64,
}

impl Timeline {
    /// How long the run took, or was watched.
    pub(super) fn duration(&self) -> f64 {
        self.points.last().map_or(0.0, |point| point.at)
    }

    /// The most workers at one time.
    pub(super) fn most_workers(&self) -> u32 {
        self.points.iter().map(|point| point.workers).max().unwrap_or_default()
    }

    /// The last point at or before a time.
    pub(super) fn point_at(&self, at: f64) -> Option<&Point> {
        let after = self.points.partition_point(|point| point.at <= at);
        self.points.get(after.saturating_sub(1))
    }

    /// Rows of loads and edits that are searchable at a time.
    pub(super) fn done_at(&self, at: f64) -> f64 {
        let Some(point) = self.point_at(at) else { return 0.0 };
        point.amounts.done_bulk + point.amounts.done_live + point.rate * (at - point.at)
    }

    /// Which stage limited the flow, and when.
    pub(super) fn phases(&self) -> Vec<Phase> {
        let mut phases: Vec<(f64, f64, Stage)> = Vec::new();
        let shortest = self.duration() * SHORT_PHASE;
        let mut runs: Vec<(f64, f64, Stage)> = Vec::new();
        for pair in self.points.windows(2) {
            let (from, to, limit) = (pair[0].at, pair[1].at, pair[0].limit);
            match runs.last_mut() {
                Some((_, end, last)) if *last == limit => *end = to,
                _ => runs.push((from, to, limit)),
            }
        }
        for (from, to, limit) in runs {
            match phases.last_mut() {
                Some((_, end, last)) if *last == limit || to - from < shortest => *end = to,
                _ => phases.push((from, to, limit)),
            }
        }
        let rate = |from: f64, to: f64| (self.done_at(to) - self.done_at(from)) / (to - from).max(1e-9);
        phases.into_iter().map(|(from, to, limit)| Phase { from, to, limit, rate: rate(from, to) }).collect()
    }

    /// Follows edits from their statement to the index; none if there are none.
    pub(super) fn freshness(&self, scenario: &Scenario) -> Option<Freshness> {
        if scenario.edits <= 0.0 || self.duration() <= 0.0 {
            return None;
        }
        let relayed = |p: &Point| p.amounts.relayed_edits;
        let into_live = |p: &Point| p.amounts.relayed_edits - p.amounts.spilled;
        let done_live = |p: &Point| p.amounts.done_live;
        let into_bulk =
            |p: &Point| scenario.records - p.amounts.unwritten - p.amounts.outbox_bulk + p.amounts.spilled;
        let done_bulk = |p: &Point| p.amounts.done_bulk;
        let mut waits: Vec<(f64, f64)> = Vec::new();
        for nth in 0..FOLLOWED {
            let at = self.duration() * (nth as f64 + 0.5) / FOLLOWED as f64;
            let at_queue = self.reached(relayed, scenario.edits * at);
            let Some(point) = self.point_at(at_queue) else { continue };
            let spills = self.share_spilled(at_queue);
            let has_load = point.amounts.queue_bulk + point.amounts.outbox_bulk > 0.0;
            let least = if has_load { scenario.loaded_freshness } else { scenario.idle_freshness };
            let mut follow = |weight: f64, found: f64| {
                if weight > 0.0 {
                    waits.push((least + (found - at).max(0.0), weight));
                }
            };
            follow(1.0 - spills, self.reached(done_live, self.value(into_live, at_queue)));
            follow(spills, self.reached(done_bulk, self.value(into_bulk, at_queue)));
        }
        waits.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all: f64 = waits.iter().map(|(_, weight)| weight).sum();
        let quantile = |part: f64| {
            let mut below = 0.0;
            let found = waits.iter().find(|(_, weight)| {
                below += weight;
                below >= part * all
            });
            found.or(waits.last()).map_or(0.0, |(wait, _)| *wait)
        };
        let last = self.points.last()?.amounts;
        let spilled = if last.relayed_edits > 0.0 { last.spilled / last.relayed_edits } else { 0.0 };
        Some(Freshness { p50: quantile(0.5), p99: quantile(0.99), worst: quantile(1.0), spilled })
    }

    /// The part of the edits that go to the bulk lane at a time.
    fn share_spilled(&self, at: f64) -> f64 {
        let after = self.points.partition_point(|point| point.at <= at).min(self.points.len() - 1);
        let (a, b) = (&self.points[after.saturating_sub(1)].amounts, &self.points[after].amounts);
        let relayed = b.relayed_edits - a.relayed_edits;
        if relayed > 0.0 { ((b.spilled - a.spilled) / relayed).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// A sum at a time, on the straight line between two points.
    fn value(&self, sum: impl Fn(&Point) -> f64, at: f64) -> f64 {
        let after = self.points.partition_point(|point| point.at <= at);
        let Some(b) = self.points.get(after) else { return self.points.last().map_or(0.0, sum) };
        let Some(a) = after.checked_sub(1).map(|before| &self.points[before]) else { return sum(b) };
        let part = if b.at > a.at { (at - a.at) / (b.at - a.at) } else { 0.0 };
        sum(a) + (sum(b) - sum(a)) * part
    }

    /// When a sum that only grows reached a value; after the last point, as the last rate goes on.
    fn reached(&self, sum: impl Fn(&Point) -> f64, value: f64) -> f64 {
        let value = value - 1e-6;
        let after = self.points.partition_point(|point| sum(point) < value);
        let Some(before) = after.checked_sub(1) else { return self.points.first().map_or(0.0, |p| p.at) };
        let pair =
            if after < self.points.len() { (before, after) } else { (before.saturating_sub(1), before) };
        let (a, b) = (&self.points[pair.0], &self.points[pair.1]);
        let (grown, took) = (sum(b) - sum(a), b.at - a.at);
        if after == self.points.len() && self.drained.is_none() && grown <= 0.0 {
            return f64::INFINITY;
        }
        if grown <= 0.0 { b.at } else { a.at + took * (value - sum(a)) / grown }
    }
}

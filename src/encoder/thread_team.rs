//! Shares the work of one pass through the model between threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Spins of a waiting thread before it yields the CPU.
const SPINS: usize = 2_000;

/// The threads of one pass: one thread, or two threads to embed a single text faster.
///
/// Each stage is divided into units. A unit gives the same result on every thread. All threads take part in
/// all stages, in the same order. Each thread takes the next free unit. So no thread waits for a thread that
/// is not running, unless that thread was stopped in the middle of a unit.
pub(super) struct ThreadTeam {
    stages: Vec<Stage>,
}

#[derive(Default)]
#[repr(align(64))]
struct Stage {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl ThreadTeam {
    /// A team for passes with this number of stages.
    pub(super) fn new(stages: usize) -> Self {
        Self { stages: (0..stages).map(|_| Stage::default()).collect() }
    }

    /// Prepares the next pass. No thread may be in a pass.
    pub(super) fn reset(&mut self) {
        for stage in &mut self.stages {
            *stage = Stage::default();
        }
    }

    /// The units of a stage for the calling thread. Each call of `next` marks the previous unit as done.
    #[inline(always)]
    pub(super) fn units(&self, stage: usize, count: usize) -> WorkUnits<'_> {
        WorkUnits { stage: &self.stages[stage], count, holds: false }
    }

    /// Waits until all units of the stage are done by any thread.
    #[inline(always)]
    pub(super) fn wait(&self, stage: usize, count: usize) {
        let mut spins = 0;
        // Acquire: the next stage reads the data that other threads wrote in this stage.
        while self.stages[stage].done.load(Ordering::Acquire) < count {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Units that the calling thread takes one by one.
pub(super) struct WorkUnits<'a> {
    stage: &'a Stage,
    count: usize,
    holds: bool,
}

impl Iterator for WorkUnits<'_> {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.holds {
            // Release: a thread that reads the new count also sees the data of the unit.
            self.stage.done.fetch_add(1, Ordering::Release);
        }
        let unit = self.stage.taken.fetch_add(1, Ordering::Relaxed);
        self.holds = unit < self.count;
        self.holds.then_some(unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_work_runs_once_and_before_the_next_stage() {
        const UNITS: usize = 100;
        let mut team = ThreadTeam::new(3);
        for _ in 0..50 {
            team.reset();
            let done: Vec<AtomicUsize> = (0..3 * UNITS).map(|_| AtomicUsize::new(0)).collect();
            let member = || {
                for stage in 0..3 {
                    for unit in team.units(stage, UNITS) {
                        done[stage * UNITS + unit].fetch_add(1, Ordering::Relaxed);
                    }
                    team.wait(stage, UNITS);
                    let finished = &done[stage * UNITS..][..UNITS];
                    assert!(finished.iter().all(|unit| unit.load(Ordering::Relaxed) == 1), "stage {stage}");
                }
            };
            std::thread::scope(|scope| {
                scope.spawn(member);
                member();
            });
        }
    }
}

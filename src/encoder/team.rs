//! Who shares the work of one pass through the model.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Spins before a waiting thread lets others run.
const SPINS: usize = 2_000;

/// Those who go through one pass together: one thread, or two for the sake of a single text.
///
/// Each stage is cut into units, which are the same whoever does them, and everybody takes part in every
/// stage in the same order, taking the next unit that nobody has. So nobody waits for a thread that does
/// not run, unless it has stopped in the middle of a unit.
pub(super) struct Team {
    stages: Vec<Stage>,
}

#[derive(Default)]
#[repr(align(64))]
struct Stage {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl Team {
    /// For passes of so many stages.
    pub(super) fn new(stages: usize) -> Self {
        Self { stages: (0..stages).map(|_| Stage::default()).collect() }
    }

    /// Before a pass, when nobody is in one.
    pub(super) fn reset(&mut self) {
        for stage in &mut self.stages {
            *stage = Stage::default();
        }
    }

    /// The units of stage `stage` that fall to the caller, one by one as they are done.
    #[inline(always)]
    pub(super) fn units(&self, stage: usize, count: usize) -> Units<'_> {
        Units { stage: &self.stages[stage], count, holds: false }
    }

    /// Waits until all units of the stage are done, whoever does them.
    #[inline(always)]
    pub(super) fn wait(&self, stage: usize, count: usize) {
        let mut spins = 0;
        // Acquire: what others wrote in this stage is read in the next.
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

/// Units that the caller takes one by one.
pub(super) struct Units<'a> {
    stage: &'a Stage,
    count: usize,
    holds: bool,
}

impl Iterator for Units<'_> {
    type Item = usize;

    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.holds {
            // Release: what was written for the unit is there for whoever sees the count.
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
    fn every_unit_is_done_once_and_before_the_next_stage() {
        const UNITS: usize = 100;
        let mut team = Team::new(3);
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

//! Who shares the work of one pass through the model.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Those who go through one pass together. Each stage is cut into units, which are the same whoever does
/// them, and everybody takes part in every stage in the same order.
pub(super) trait Team {
    /// Hands out the units of the next stage.
    type Units<'a>: Iterator<Item = usize>
    where
        Self: 'a;

    /// The units of stage `stage` that fall to the caller.
    fn units(&self, stage: usize, count: usize) -> Self::Units<'_>;

    /// Waits until all units of the stage are done, whoever does them.
    fn wait(&self, stage: usize, count: usize);
}

/// One thread alone.
pub(super) struct Alone;

impl Team for Alone {
    type Units<'a> = Range<usize>;

    #[inline(always)]
    fn units(&self, _: usize, count: usize) -> Range<usize> {
        0..count
    }

    #[inline(always)]
    fn wait(&self, _: usize, _: usize) {}
}

/// Spins before a waiting thread lets others run.
const SPINS: usize = 2_000;

/// Threads that share one pass: each takes the next unit that nobody has. So nobody waits for a thread
/// that does not run, unless it has stopped in the middle of a unit.
pub(super) struct Together {
    stages: Vec<Stage>,
}

#[derive(Default)]
#[repr(align(64))]
struct Stage {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl Together {
    /// For passes of so many stages.
    pub(super) fn new(stages: usize) -> Self {
        Self { stages: (0..stages).map(|_| Stage::default()).collect() }
    }
}

impl Team for Together {
    type Units<'a> = Taken<'a>;

    #[inline(always)]
    fn units(&self, stage: usize, count: usize) -> Taken<'_> {
        Taken { stage: &self.stages[stage], count, holds: false }
    }

    #[inline(always)]
    fn wait(&self, stage: usize, count: usize) {
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
pub(super) struct Taken<'a> {
    stage: &'a Stage,
    count: usize,
    holds: bool,
}

impl Iterator for Taken<'_> {
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

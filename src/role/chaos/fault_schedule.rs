//! The schedule of faults. The seed alone decides it.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::environment::MAX_LATE;
use super::operator::Operation;
use crate::cli::ChaosFault;
use crate::double::pinecone::PineconeFaults;
use crate::double::sqs::SqsFaults;

/// A fault that is injected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// SIGKILL to a process, which is then restarted.
    Kill(usize),
    /// SIGSTOP to a process, and SIGCONT after this time, which is longer than every timeout.
    Freeze(usize, Duration),
    /// The database crashes, or is restarted cleanly.
    RestartDatabase { crash: bool },
    /// Some of the roles' connections are cut.
    CutConnections,
    /// Messages are queued a second time.
    Duplicate,
    /// Visible messages are delayed, which also changes their order.
    Delay,
    /// Messages that a worker holds become visible to others.
    Hurry,
    /// The index fails more than usual for a while.
    Storm(PineconeFaults, Duration),
    /// The table is truncated, and half of its rows are inserted again.
    Truncate,
    /// An operator changes the database or the fleet.
    Operate(Operation),
    /// The queue is purged.
    Purge,
    /// The embedder refuses every text for this time.
    Refuse(Duration),
}

impl Fault {
    /// The kind of this fault, as `--faults` names it.
    fn kind(&self) -> ChaosFault {
        match self {
            Self::Kill(_) => ChaosFault::Kill,
            Self::Freeze(..) => ChaosFault::Freeze,
            Self::RestartDatabase { .. } => ChaosFault::Restart,
            Self::CutConnections => ChaosFault::Cut,
            Self::Duplicate => ChaosFault::Duplicate,
            Self::Delay => ChaosFault::Delay,
            Self::Hurry => ChaosFault::Hurry,
            Self::Storm(..) => ChaosFault::Storm,
            Self::Truncate => ChaosFault::Truncate,
            Self::Operate(Operation::AddMetadata) => ChaosFault::Metadata,
            Self::Operate(Operation::RenameColumn(_)) => ChaosFault::Rename,
            Self::Operate(Operation::WidenKey) => ChaosFault::Widen,
            Self::Operate(Operation::SwapTable) => ChaosFault::Swap,
            Self::Operate(Operation::DisableTriggers(_)) => ChaosFault::Disable,
            Self::Operate(Operation::Restore(_)) => ChaosFault::Restore,
            Self::Operate(Operation::HideRows(_)) => ChaosFault::RowSecurity,
            Self::Operate(Operation::Migrate) => ChaosFault::Migrate,
            Self::Operate(Operation::TwoConfigurations(_)) => ChaosFault::Configurations,
            Self::Purge => ChaosFault::Purge,
            Self::Refuse(_) => ChaosFault::Refuse,
        }
    }
}

/// How long the double holds a response. It is longer than the roles' timeout.
const HANG_FOR: Duration = Duration::from_millis(2_500);

/// Faults of the index outside of storms, as probabilities.
#[must_use]
pub fn baseline_faults() -> PineconeFaults {
    PineconeFaults {
        unavailable: 0.01,
        rate_limited: 0.01,
        hang: 0.003,
        false_error: 0.01,
        late: 0.01,
        drop_connection: 0.005,
        max_late: MAX_LATE,
        hang_for: HANG_FOR,
    }
}

/// Faults of the queue, as probabilities. There are no storms of the queue: a doubtful send is only repeated.
#[must_use]
pub fn baseline_sqs_faults() -> SqsFaults {
    SqsFaults {
        unavailable: 0.02,
        throttled: 0.02,
        false_error: 0.02,
        drop_connection: 0.01,
        entry: 0.03,
        duplicate: 0.02,
        latency: Duration::ZERO,
    }
}

/// Makes a fault of one kind. The number is that of the processes.
type Make = fn(&mut StdRng, usize) -> Fault;

fn seconds(rng: &mut StdRng, from: u64, to: u64) -> Duration {
    Duration::from_millis(rng.random_range(from * 1_000..to * 1_000))
}

/// Faults with their times, in order. `processes` is the number of processes that can be killed and frozen.
/// If `only` names kinds, there are only faults of these kinds, and at least one of each. Otherwise their
/// faults and times are the same as without `only`.
#[must_use]
pub fn generate(
    seed: u64,
    lasting: Duration,
    processes: usize,
    only: &[ChaosFault],
) -> Vec<(Duration, Fault)> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut faults = Vec::new();
    // Mean seconds between two faults of a kind.
    let kinds: [(f64, Make); 17] = [
        (9.0, |rng, processes| Fault::Kill(rng.random_range(0..processes))),
        (15.0, |rng, processes| {
            let long = Duration::from_millis(rng.random_range(7_000..20_000));
            Fault::Freeze(rng.random_range(0..processes), long)
        }),
        (60.0, |rng, _| Fault::RestartDatabase { crash: rng.random() }),
        (13.0, |_, _| Fault::CutConnections),
        (4.0, |_, _| Fault::Duplicate),
        (4.0, |_, _| Fault::Delay),
        (4.0, |_, _| Fault::Hurry),
        (20.0, |rng, _| {
            let long = Duration::from_millis(rng.random_range(2_000..8_000));
            Fault::Storm(storm(rng), long)
        }),
        // Operators' changes last for a while, and run one after the other.
        (60.0, |rng, _| Fault::Operate(Operation::RenameColumn(seconds(rng, 2, 8)))),
        (60.0, |rng, _| Fault::Operate(Operation::DisableTriggers(seconds(rng, 2, 6)))),
        (90.0, |_, _| Fault::Operate(Operation::SwapTable)),
        (90.0, |_, _| Fault::Operate(Operation::Migrate)),
        (120.0, |rng, _| Fault::Operate(Operation::TwoConfigurations(seconds(rng, 5, 15)))),
        (150.0, |rng, _| Fault::Operate(Operation::Restore(seconds(rng, 5, 20)))),
        (90.0, |_, _| Fault::Purge),
        (180.0, |_, _| Fault::Refuse(Duration::from_mins(1))),
        (90.0, |rng, _| Fault::Operate(Operation::HideRows(seconds(rng, 4, 10)))),
    ];
    for (mean, make) in kinds {
        let mut at = 0.0;
        loop {
            // Exponential gaps, so that every moment is equally likely.
            at += -mean * (1.0 - rng.random::<f64>()).ln();
            if at >= lasting.as_secs_f64() {
                break;
            }
            faults.push((Duration::from_secs_f64(at), make(&mut rng, processes)));
        }
    }
    // Once, and early enough that the table is not nearly empty at the end.
    faults.push((lasting.mul_f64(rng.random_range(0.2..0.5)), Fault::Truncate));
    for once in [Operation::AddMetadata, Operation::WidenKey] {
        faults.push((lasting.mul_f64(rng.random_range(0.1..0.6)), Fault::Operate(once)));
    }
    faults.retain(|(_, fault)| only.is_empty() || only.contains(&fault.kind()));
    // A short run must still inject each kind that was asked for: otherwise it proves nothing.
    for (_, make) in kinds {
        let fault = make(&mut rng, processes);
        let kind = fault.kind();
        if only.contains(&kind) && faults.iter().all(|(_, other)| other.kind() != kind) {
            faults.push((lasting.mul_f64(rng.random_range(0.2..0.6)), fault));
        }
    }
    faults.sort_by_key(|(at, _)| *at);
    faults
}

fn storm(rng: &mut StdRng) -> PineconeFaults {
    let baseline = baseline_faults();
    match rng.random_range(0..5) {
        0 => PineconeFaults {
            unavailable: 0.5,
            rate_limited: 0.5,
            hang: 0.0,
            false_error: 0.0,
            late: 0.0,
            drop_connection: 0.0,
            ..baseline
        },
        1 => PineconeFaults { rate_limited: 0.8, ..baseline },
        2 => PineconeFaults { false_error: 0.4, late: 0.3, ..baseline },
        3 => PineconeFaults { hang: 0.4, drop_connection: 0.3, ..baseline },
        _ => PineconeFaults { unavailable: 0.4, late: 0.4, ..baseline },
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_schedule() {
        let long = Duration::from_mins(10);
        let one = generate(1, long, 4, &[]);
        assert_eq!(one, generate(1, long, 4, &[]));
        assert_ne!(one, generate(2, long, 4, &[]));
        assert!(one.is_sorted_by_key(|(at, _)| *at));
        assert!(one.iter().any(|(_, fault)| matches!(fault, Fault::Truncate)));
        assert!(one.iter().any(|(_, fault)| matches!(fault, Fault::RestartDatabase { .. })));
        for kind in ChaosFault::value_variants() {
            let of_kind = generate(1, long, 4, &[*kind]);
            assert!(!of_kind.is_empty(), "{kind:?}");
            assert!(of_kind.iter().all(|fault| one.contains(fault)), "{kind:?}");
        }
    }

    #[test]
    fn every_requested_kind_of_fault_occurs_in_a_short_drill() {
        for kind in ChaosFault::value_variants() {
            let faults = generate(1, Duration::from_secs(5), 4, &[*kind]);
            assert!(!faults.is_empty(), "{kind:?}");
            assert!(faults.iter().all(|(_, fault)| fault.kind() == *kind), "{kind:?}");
        }
    }
}

//! A decision about the number of workers, and the sentence that tells it.

use std::fmt;

use super::Metric;

/// How many workers there should be, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Workers that were asked for until now.
    pub current: usize,
    /// Workers that are asked for from now on.
    pub desired: usize,
    /// Why.
    pub reason: Reason,
}

impl Decision {
    /// Whether it changes anything.
    #[must_use]
    pub fn is_change(&self) -> bool {
        self.desired != self.current
    }
}

/// Why there should be so many workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// The metric is too far above its target.
    Above(Measured),
    /// The metric was below its target for a whole cooldown.
    Below(Measured),
    /// Neither more nor fewer workers are wanted.
    OnTarget(Measured),
    /// Another number is wanted, but the cooldown is not over.
    Cooldown(Measured),
    /// More are wanted than there may be.
    AtMost(Measured),
    /// More are wanted, but the last ones that were added made nothing faster.
    NoGain(Measured),
    /// More are wanted, but nothing gets through at all, so more workers would not help.
    Stalled,
    /// Fewer are wanted, but all hold work.
    Holding(Measured),
    /// Work waits, but how fast a worker is was not measured yet.
    Measuring,
    /// Nothing could be observed.
    Unknown,
    /// There were fewer than the least, or more than the most.
    Bounds,
}

/// A metric beside its target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What was measured.
    pub metric: Metric,
    /// Its value.
    pub value: f64,
    /// What it should be.
    pub target: f64,
}

impl Measured {
    fn compared(&self, f: &mut fmt::Formatter<'_>, sign: &str) -> fmt::Result {
        let (name, unit) = match self.metric {
            Metric::Backlog => ("backlog", "s"),
            Metric::Cpu => ("CPU", "%"),
        };
        write!(f, "{name} {} {unit} {sign} {} {unit}", Short(self.value), Short(self.target))
    }
}

/// A number with as many digits as a reader wants.
struct Short(f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < 9.95 && self.0.fract() != 0.0 {
            return write!(f, "{:.1}", self.0);
        }
        write!(f, "{:.0}", self.0)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Above(measured) => measured.compared(f, ">"),
            Self::Below(measured) => measured.compared(f, "<"),
            Self::OnTarget(measured) => measured.compared(f, "of"),
            Self::Cooldown(measured) => {
                measured.compared(f, "of")?;
                f.write_str(", in a cooldown")
            }
            Self::AtMost(measured) => {
                measured.compared(f, ">")?;
                f.write_str(", but no more workers are allowed")
            }
            Self::NoGain(measured) => {
                measured.compared(f, ">")?;
                f.write_str(", but the last workers that were added made nothing faster")
            }
            Self::Holding(measured) => {
                measured.compared(f, "<")?;
                f.write_str(", but every worker holds work")
            }
            Self::Stalled => f.write_str("work waits, but nothing gets through"),
            Self::Measuring => f.write_str("work waits, and the speed of a worker is being measured"),
            Self::Unknown => f.write_str("the backlog is unknown"),
            Self::Bounds => f.write_str("outside of the bounds"),
        }
    }
}

/// The reason, and the step if there is one: `backlog 14 s > 10 s: 2 -> 5`.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { current, desired, reason } = self;
        if self.is_change() {
            write!(f, "{reason}: {current} -> {desired}")
        } else {
            write!(f, "{reason}: {current}")
        }
    }
}

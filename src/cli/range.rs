//! Numbers of workers on the command line.

use std::fmt;

/// A number of workers, or a range of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Workers at least.
    pub least: usize,
    /// Workers at most.
    pub most: usize,
}

impl Range {
    /// Reads `4` or `1..4`.
    fn parse(text: &str, limit: usize) -> Option<Self> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        let (least, most) = (least.parse().ok()?, most.parse().ok()?);
        (1 <= least && least <= most && most <= limit).then_some(Self { least, most })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.least, self.most)
    }
}

/// The most embedding threads of a process, and the most processes.
const MAX_THREADS: usize = 1024;
const MAX_PROCESSES: usize = 256;

pub(super) fn workers(text: &str) -> Result<Range, String> {
    Range::parse(text, MAX_THREADS)
        .ok_or_else(|| format!("use 1 to {MAX_THREADS} embedding threads, or a range such as 1..4"))
}

pub(super) fn processes(text: &str) -> Result<Range, String> {
    Range::parse(text, MAX_PROCESSES)
        .ok_or_else(|| format!("use 1 to {MAX_PROCESSES} processes, or a range such as 1..4"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_two_ends_or_one() {
        let range = |least, most| Ok(Range { least, most });
        assert_eq!((workers("3"), workers("1..4")), (range(3, 3), range(1, 4)));
        for wrong in ["", "0", "0..3", "4..3", "1..", "..4", "1..2..3", "1..1025", "one"] {
            assert!(workers(wrong).is_err(), "{wrong}");
        }
        assert!(processes("1..257").is_err());
    }
}

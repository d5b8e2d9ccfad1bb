//! The backlog in seconds: how long the fleet needs for what waits.

/// How long a backlog takes, in seconds: its changes over the rate at which they are applied. If nothing is applied, no
/// rate is known. Then it takes as long as its oldest change has waited already, which grows while nothing moves.
#[must_use]
pub fn backlog_seconds(changes: u64, per_second: Option<f64>, oldest_age_s: Option<f64>) -> f64 {
    if changes == 0 {
        return 0.0;
    }
    match per_second {
        Some(rate) if rate > 0.0 => changes as f64 / rate,
        _ => oldest_age_s.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_takes_its_changes_over_the_rate_or_the_age_of_its_oldest_change_without_one() {
        let cases = [
            (0, Some(10.0), Some(99.0), 0.0),
            (100, Some(10.0), None, 10.0),
            // The end of a long load is near, however old its first change is.
            (100, Some(10.0), Some(600.0), 10.0),
            (100, None, Some(60.0), 60.0),
            (100, Some(0.0), None, 0.0),
        ];
        for (changes, rate, age, seconds) in cases {
            let found = backlog_seconds(changes, rate, age);
            assert!((found - seconds).abs() < 1e-9, "{changes} {rate:?} {age:?}: {found}");
        }
    }
}

//! The backlog in seconds: how long the fleet needs for what waits.

/// How long a backlog takes, in seconds: its changes over the rate at which they are applied. It takes at least as long
/// as its oldest change has waited already, and that is all that is known without a rate.
#[must_use]
pub fn backlog_seconds(changes: u64, per_second: Option<f64>, oldest_age_s: Option<f64>) -> f64 {
    if changes == 0 {
        return 0.0;
    }
    let needed = per_second.filter(|rate| *rate > 0.0).map_or(0.0, |rate| changes as f64 / rate);
    needed.max(oldest_age_s.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_takes_its_changes_over_the_rate_or_the_age_of_its_oldest_change() {
        let cases = [
            (0, Some(10.0), Some(99.0), 0.0),
            (100, Some(10.0), None, 10.0),
            (100, Some(10.0), Some(3.0), 10.0),
            // Workers that stopped leave their last rate behind, but the oldest change grows older.
            (100, Some(10.0), Some(60.0), 60.0),
            (100, None, Some(60.0), 60.0),
            (100, Some(0.0), None, 0.0),
        ];
        for (changes, rate, age, seconds) in cases {
            let found = backlog_seconds(changes, rate, age);
            assert!((found - seconds).abs() < 1e-9, "{changes} {rate:?} {age:?}: {found}");
        }
    }
}

//! Times on the command line.

use jiff::{Span, SpanRelativeTo, Timestamp};

/// Reads an age such as `10m` or `2h`, or a time such as `2026-11-27T08:00:00Z`.
pub(super) fn since(text: &str) -> Result<Timestamp, String> {
    let wrong = || "use an age such as 10m, 2h or 3d, or a time such as 2026-11-27T08:00:00Z".to_owned();
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let age: Span = text.parse().map_err(|_| wrong())?;
    let age = age.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
    Timestamp::now().checked_sub(age.abs()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_or_a_time_is_read() {
        let age = |text| Timestamp::now().duration_since(since(text).unwrap()).as_secs();
        assert!((590..660).contains(&age("10m")) && (172_790..172_860).contains(&age("2d")));
        assert_eq!(since("2026-11-27T08:00:00Z").unwrap().to_string(), "2026-11-27T08:00:00Z");
        assert!(since("soon").is_err() && since("10").is_err());
    }
}

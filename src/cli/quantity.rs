//! Numbers as people write them: `1e9`, `100k`, `2h`.

use std::time::Duration;

/// The largest count and rate. Above it, sums of counts would lose single rows.
const MAX_COUNT: f64 = 1e13;

/// The longest duration: ten years.
const MAX_SECONDS: f64 = 10.0 * 365.0 * 86_400.0;

/// A count of one or more, such as `1000000`, `1_000_000`, `100k`, `2.5M` or `1e9`.
pub(super) fn count(text: &str) -> Result<u64, String> {
    match number(text) {
        Some(count) if (1.0..=MAX_COUNT).contains(&count) && count.fract() == 0.0 => Ok(count as u64),
        Some(count) if count > MAX_COUNT => Err(format!("use at most {MAX_COUNT:e}")),
        _ => Err("use a count of one or more, such as 1000000, 1_000_000, 100k, 2.5M or 1e9".into()),
    }
}

/// A rate in something a second, above zero.
pub(super) fn rate(text: &str) -> Result<f64, String> {
    match number(text) {
        Some(rate) if rate > 0.0 && rate <= MAX_COUNT => Ok(rate),
        _ => Err("use a number above 0, such as 830, 0.5, 100k or 1e6".into()),
    }
}

/// A rate in something a second, which may be zero.
pub(super) fn rate_or_none(text: &str) -> Result<f64, String> {
    match number(text) {
        Some(0.0) => Ok(0.0),
        _ => rate(text).map_err(|_| "use a number, such as 0, 20 or 1k".into()),
    }
}

/// A duration with its units, such as `500ms`, `90s`, `30m`, `2h`, `1h30m` or `1d`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "use a duration with its unit, such as 500ms, 90s, 30m, 2h, 1h30m or 1d".to_owned();
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
        let (value, tail) = rest.split_at(unit_at);
        let unit_end = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let value = number(value).ok_or_else(wrong)?;
        seconds += value
            * match unit {
                "ms" => 0.001,
                "s" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3_600.0,
                "d" => 86_400.0,
                _ => return Err(wrong()),
            };
        rest = tail.trim_start();
    }
    if !(0.0..=MAX_SECONDS).contains(&seconds) {
        return Err("use at most 3650d".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A fixed number of workers, or the least and the most, such as `8` or `2..50`.
pub(super) fn workers(text: &str) -> Result<(u32, u32), String> {
    let one = |text: &str| text.trim().parse::<u32>().ok().filter(|n| (1..=1_000_000).contains(n));
    let parsed = match text.split_once("..") {
        Some((least, most)) => one(least).zip(one(most.trim_start_matches('='))),
        None => one(text).map(|fixed| (fixed, fixed)),
    };
    parsed
        .filter(|(least, most)| least <= most)
        .ok_or_else(|| "use a number of workers, or the least and the most, such as 8 or 2..50".into())
}

/// A number of one or more.
pub(super) fn one_or_more(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or_else(|| "use 1 or more".into())
}

/// A number with an optional exponent, suffix and `_` between digits; never infinite, negative or not a number.
fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    let (digits, factor) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 1e3),
        (at, 'M') => (&text[..at], 1e6),
        (at, 'G' | 'B') => (&text[..at], 1e9),
        _ => (text, 1.0),
    };
    let is_plain = |c: char| c.is_ascii_digit() || matches!(c, '.' | '_' | 'e' | 'E' | '+' | '-');
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') || !digits.chars().all(is_plain) {
        return None;
    }
    let number = digits.replace('_', "").parse::<f64>().ok()? * factor;
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_as_people_write_them() {
        for (text, is) in [
            ("1e9", 1_000_000_000),
            ("1_000_000", 1_000_000),
            ("100k", 100_000),
            ("2.5M", 2_500_000),
            ("1B", 1_000_000_000),
            ("7", 7),
        ] {
            assert_eq!(count(text), Ok(is), "{text}");
        }
        for text in ["", "0", "-1", "1.5", "k", "1e", "ten", "1 000", "NaN", "inf", "1e400", "1e14", "_1"] {
            assert!(count(text).is_err(), "{text}");
        }
        assert!(count("1e14").unwrap_err().contains("at most 1e13"));
    }

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [
            ("2h", 7_200.0),
            ("30m", 1_800.0),
            ("1h30m", 5_400.0),
            ("90s", 90.0),
            ("500ms", 0.5),
            ("1d", 86_400.0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for text in ["", "2", "h", "-2h", "2x", "1h30", "1e9d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn workers_are_a_number_or_a_range() {
        assert_eq!(workers("8"), Ok((8, 8)));
        assert_eq!(workers("2..50"), Ok((2, 50)));
        for text in ["0", "5..2", "..3", "2..", "two", "0..4"] {
            assert!(workers(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rates_are_above_zero_and_edits_may_be_none() {
        assert_eq!((rate("830"), rate("1e6"), rate("0.5")), (Ok(830.0), Ok(1e6), Ok(0.5)));
        assert!(rate("0").is_err() && rate("-3").is_err());
        assert_eq!((rate_or_none("0"), rate_or_none("20")), (Ok(0.0), Ok(20.0)));
    }
}

//! Amounts, times and money as people read them.

/// A whole number with commas, such as 1,000,000.
pub(super) fn amount(number: f64) -> String {
    if !number.is_finite() {
        return "no limit".into();
    }
    let digits = format!("{:.0}", number.abs().round());
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if number < 0.0 && text != "0" { format!("-{text}") } else { text }
}

/// A duration in its two largest units, such as 1 h 58 min.
pub(super) fn time(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "never".into();
    }
    if seconds == 0.0 {
        return "0 s".into();
    }
    if seconds < 0.9995 {
        return format!("{:.0} ms", seconds * 1_000.0);
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (large, small) = match whole {
        0..60 => return format!("{whole} s"),
        60..3_600 => ((60, "min"), (1, "s")),
        3_600..86_400 => ((3_600, "h"), (60, "min")),
        _ => ((86_400, "d"), (3_600, "h")),
    };
    // Rounded to the small unit, so that 59 min 59.9 s is 1 h.
    let whole = (whole + small.0 / 2) / small.0 * small.0;
    match (whole / large.0, whole % large.0 / small.0) {
        (count, 0) => format!("{count} {}", large.1),
        (count, rest) => format!("{count} {} {rest} {}", large.1, small.1),
    }
}

/// Dollars and cents.
pub(super) fn dollars(usd: f64) -> String {
    if usd > 0.0 && usd < 0.005 {
        return "< 0.01".into();
    }
    let cents = (usd * 100.0).round();
    format!("{}.{:02.0}", amount((cents / 100.0).floor()), cents % 100.0)
}

/// A number with a suffix, for an axis: 250k, 1.5M.
pub(super) fn short(number: f64) -> String {
    let (value, suffix) = match number.abs() {
        n if n >= 1e9 => (number / 1e9, "G"),
        n if n >= 1e6 => (number / 1e6, "M"),
        n if n >= 1e3 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let rounded = (value * 100.0).round() / 100.0;
    format!("{rounded}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_easy_to_read() {
        assert_eq!([amount(0.4), amount(999.0), amount(1e9)], ["0", "999", "1,000,000,000"]);
        assert_eq!(
            [0.021, 5.0, 64.0, 3_599.9, 7_100.0, 100_000.0].map(time),
            ["21 ms", "5.0 s", "1 min 4 s", "1 h", "1 h 58 min", "1 d 4 h"]
        );
        assert_eq!(time(f64::INFINITY), "never");
        assert_eq!([0.0, 0.001, 12.345, 1_234.5].map(dollars), ["0.00", "< 0.01", "12.35", "1,234.50"]);
        assert_eq!([999.0, 1_500.0, 2.5e6, 1e9].map(short), ["999", "1.5k", "2.5M", "1G"]);
    }
}

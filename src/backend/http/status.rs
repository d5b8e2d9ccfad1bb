//! The meaning of a status that is not a success.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::fmt::rfc2822;
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use crate::pipeline::failure::FailureKind;

/// The kind of failure for a status. Only statuses about the request itself (400, 413, 422) can be the fault
/// of the data.
pub(in crate::backend) fn kind(status: StatusCode) -> FailureKind {
    match status.as_u16() {
        400 | 413 | 422 => FailureKind::RefusedData,
        401 | 403 => FailureKind::RefusedCredentials,
        402 => FailureKind::NoCredit,
        404 => FailureKind::MissingResource,
        // Wrong method, media type or address, a proxy that wants credentials, or headers that are too long.
        405..=407 | 410 | 411 | 414 | 415 | 431 => FailureKind::WrongSetting,
        408 => FailureKind::TimedOut,
        409 => FailureKind::Conflict,
        429 => FailureKind::RateLimited,
        500..=599 => FailureKind::Overloaded,
        _ => FailureKind::UnexpectedAnswer,
    }
}

/// The pause that an answer asks for with `Retry-After`.
pub(in crate::backend) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    pause(headers.get(RETRY_AFTER)?.to_str().ok()?, SystemTime::now())
}

/// Reads `Retry-After`: a number of seconds, or a date.
fn pause(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let then = rfc2822::parse(value).ok()?.timestamp();
    let now = Timestamp::try_from(now).ok()?;
    Some(Duration::try_from(then.duration_since(now)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Class;

    #[test]
    fn every_status_has_one_kind_and_only_a_refused_request_is_the_datas_fault() {
        let kind = |status: u16| kind(StatusCode::from_u16(status).unwrap());
        for status in 100..=999 {
            let class = match status {
                400 | 413 | 422 => Class::Permanent,
                401 | 403..=407 | 410 | 411 | 414 | 415 | 431 => Class::Fatal,
                _ => Class::Retryable,
            };
            assert_eq!(kind(status).class(), class, "{status}");
            let is_doubtful = matches!(status, 408 | 500..=599);
            assert_eq!(kind(status).is_doubtful(), is_doubtful, "{status}");
        }
    }

    #[test]
    fn a_pause_is_asked_for_in_seconds_or_by_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_445_412_400);
        let seconds = |value: &str| pause(value, now).map(|pause| pause.as_secs());
        assert_eq!([seconds("7"), seconds(" 0 "), seconds("1.5")], [Some(7), Some(0), Some(1)]);
        assert_eq!(seconds("Wed, 21 Oct 2015 07:28:00 GMT"), Some(80));
        assert_eq!(seconds("Wed, 21 Oct 2015 07:26:00 GMT"), Some(0), "it has passed");
        for nonsense in ["", "-1", "soon", "NaN", "1e300"] {
            assert_eq!(seconds(nonsense), None, "{nonsense}");
        }
    }
}

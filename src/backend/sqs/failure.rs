//! Errors of SQS, sorted into what is done about them.

use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use crate::pipeline::failure::{Class, Error};

/// Codes that say that these credentials may not do this, and what to do about it.
const REFUSED: &[(&str, &str)] = &[
    ("ExpiredToken", "the session has expired: get new credentials"),
    ("RequestExpired", "the request was signed too long ago: is this machine's clock right?"),
    ("SignatureDoesNotMatch", "is the secret access key right, and this machine's clock?"),
    ("InvalidClientTokenId", "there is no such access key: are the credentials right?"),
    ("UnrecognizedClient", "there is no such access key: are the credentials right?"),
    ("InvalidAccessKeyId", "there is no such access key: are the credentials right?"),
    ("InvalidSecurity", "are the credentials right?"),
    ("MissingAuthenticationToken", "are there credentials?"),
    ("IncompleteSignature", "are the credentials right?"),
    ("AccessDenied", "the role's policy must allow it: see the README"),
    ("OptInRequired", "the account is not signed up for the service"),
];

/// What a code means; SQS has an older and a newer name for many, such as `AccessDenied` and
/// `AccessDeniedException`, or `AWS.SimpleQueueService.NonExistentQueue` and `QueueDoesNotExist`.
fn class_of(code: &str, status: Option<u16>) -> (Class, Option<&'static str>) {
    let code = code.rsplit(['.', '#']).next().unwrap_or(code);
    let code = code.strip_suffix("Exception").unwrap_or(code);
    if let Some((_, fix)) = REFUSED.iter().find(|(refused, _)| *refused == code) {
        return (Class::Fatal, Some(fix));
    }
    match code {
        "QueueDoesNotExist" | "NonExistentQueue" => {
            (Class::Fatal, Some("there is no such queue: are account, region and name in its URL right?"))
        }
        "InvalidAddress" => (Class::Fatal, Some("is the region in the queue's URL right?")),
        "InvalidMessageContents"
        | "BatchRequestTooLong"
        | "InvalidParameterValue"
        | "InvalidAttributeName"
        | "ReceiptHandleIsInvalid"
        | "UnsupportedOperation" => (Class::Permanent, None),
        // Rate limits, too much in flight, and their own trouble.
        _ if status.is_some_and(|status| status >= 500 || status == 429) => (Class::Retryable, None),
        "OverLimit"
        | "RequestThrottled"
        | "Throttling"
        | "ThrottlingException"
        | "KmsThrottled"
        | "QueueDeletedRecently"
        | "PurgeQueueInProgress" => (Class::Retryable, None),
        _ if status.is_some_and(|status| (400..500).contains(&status)) => (Class::Fatal, None),
        _ => (Class::Retryable, None),
    }
}

/// Classes what a call came to.
pub(super) fn failure<E>(what: &str, url: &str, error: &SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let what = format!("{what} {url}");
    let status = error.raw_response().map(|response| response.status().as_u16());
    match error {
        SdkError::ServiceError(service) => {
            let code = service.err().code().unwrap_or("no code");
            let said = service.err().message().unwrap_or_default();
            let (class, fix) = class_of(code, status);
            let fix = fix.map(|fix| format!("; {fix}")).unwrap_or_default();
            Error::new(class, what, format!("{code}: {said}{fix}"))
        }
        SdkError::ConstructionFailure(_) => Error::fatal(what, DisplayErrorContext(error)),
        SdkError::TimeoutError(_) => Error::retryable(what, "no answer in time"),
        _ => {
            let text = DisplayErrorContext(error).to_string();
            // The chain of providers was gone through, and none had any.
            if text.contains("CredentialsNotLoaded")
                || text.contains("no providers in chain provided credentials")
            {
                return Error::fatal(
                    what,
                    "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, \
                     or run where a role gives them",
                );
            }
            Error::retryable(what, plain(error))
        }
    }
}

/// An error with what lies under it, without the SDK's own types.
fn plain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        let text = cause.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = cause.source();
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_means_the_same_by_either_of_its_names() {
        for code in [
            "QueueDoesNotExist",
            "AWS.SimpleQueueService.NonExistentQueue",
            "com.amazonaws.sqs#QueueDoesNotExist",
        ] {
            assert_eq!(class_of(code, Some(400)).0, Class::Fatal, "{code}");
        }
        for code in ["AccessDenied", "AccessDeniedException", "ExpiredTokenException", "InvalidClientTokenId"]
        {
            let (class, fix) = class_of(code, Some(403));
            assert!(class == Class::Fatal && fix.is_some(), "{code}");
        }
        for (code, status) in
            [("RequestThrottled", 400), ("OverLimit", 403), ("InternalError", 500), ("", 503)]
        {
            assert_eq!(class_of(code, Some(status)).0, Class::Retryable, "{code}");
        }
        assert_eq!(class_of("InvalidMessageContents", Some(400)).0, Class::Permanent);
        assert_eq!(class_of("SomethingNew", Some(400)).0, Class::Fatal);
    }
}

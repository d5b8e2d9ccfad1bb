//! Classifies the errors of SQS.

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};

use crate::pipeline::failure::{Error, FailureKind, causes, chain};

/// Error codes that mean refused credentials, with the remedy for each.
const REFUSED: &[(&str, &str)] = &[
    ("ExpiredToken", "the session has expired: get new credentials"),
    ("RequestExpired", "the request was signed too long ago: is this machine's clock right?"),
    ("SignatureDoesNotMatch", "is the secret access key right, and this machine's clock?"),
    ("InvalidClientTokenId", "this access key does not exist: are the credentials right?"),
    ("UnrecognizedClient", "this access key does not exist: are the credentials right?"),
    ("InvalidAccessKeyId", "this access key does not exist: are the credentials right?"),
    ("InvalidSecurity", "are the credentials right?"),
    (
        "MissingAuthenticationToken",
        "the request has no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    ("IncompleteSignature", "are the credentials right?"),
    ("AccessDenied", "the role's policy must allow it: see the README"),
    ("OptInRequired", "the account is not signed up for the service"),
];

/// The kind of an error code, and its remedy. SQS has an older and a newer name for many codes, such as
/// `AccessDenied` and `AccessDeniedException`, or `AWS.SimpleQueueService.NonExistentQueue` and
/// `QueueDoesNotExist`.
fn kind_of(code: &str, status: Option<u16>) -> (FailureKind, Option<&'static str>) {
    let code = code.rsplit(['.', '#']).next().unwrap_or(code);
    let code = code.strip_suffix("Exception").unwrap_or(code);
    if let Some((_, fix)) = REFUSED.iter().find(|(refused, _)| *refused == code) {
        return (FailureKind::RefusedCredentials, Some(fix));
    }
    match code {
        "QueueDoesNotExist" | "NonExistentQueue" => {
            let fix = "there is no such queue: are the account, the region and the name in its URL right?";
            (FailureKind::MissingResource, Some(fix))
        }
        "InvalidAddress" => (FailureKind::WrongSetting, Some("is the region in the queue's URL right?")),
        "InvalidMessageContents"
        | "BatchRequestTooLong"
        | "InvalidParameterValue"
        | "InvalidAttributeName"
        | "ReceiptHandleIsInvalid" => (FailureKind::RefusedData, None),
        "UnsupportedOperation" => (FailureKind::Unsupported, None),
        // Rate limits, too many messages in flight, and failures inside SQS.
        _ if status.is_some_and(|status| status >= 500) => (FailureKind::Overloaded, None),
        _ if status == Some(429) => (FailureKind::RateLimited, None),
        "OverLimit" | "RequestThrottled" | "Throttling" | "ThrottlingException" | "KmsThrottled" => {
            (FailureKind::RateLimited, None)
        }
        "QueueDeletedRecently" | "PurgeQueueInProgress" => (FailureKind::Conflict, None),
        _ if status.is_some_and(|status| (400..500).contains(&status)) => (FailureKind::WrongSetting, None),
        _ => (FailureKind::UnexpectedAnswer, None),
    }
}

/// Turns an SDK error into an [`Error`] with its kind and remedy.
pub(super) fn failure<E>(what: &str, url: &str, error: SdkError<E, HttpResponse>) -> Error
where
    E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
{
    let what = format!("{what} {url}");
    let status = error.raw_response().map(|response| response.status().as_u16());
    match &error {
        SdkError::ServiceError(service) => {
            let code = service.err().code().unwrap_or("no code");
            let said = service.err().message().unwrap_or_default();
            let (kind, fix) = kind_of(code, status);
            Error::new(kind, what, format_args!("{code}: {said}")).with_remedy(fix).because(error)
        }
        SdkError::ConstructionFailure(_) => {
            Error::new(FailureKind::WrongSetting, what, DisplayErrorContext(&error)).because(error)
        }
        SdkError::TimeoutError(_) => {
            Error::new(FailureKind::TimedOut, what, "no answer in time").because(error)
        }
        _ if has_no_credentials(&error) => {
            let said = "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, \
                        or run on a machine whose IAM role provides credentials";
            Error::new(FailureKind::RefusedCredentials, what, said).because(error)
        }
        _ => Error::new(FailureKind::ConnectionLost, what, chain(&error)).because(error),
    }
}

/// Whether no provider of the SDK's chain had credentials.
fn has_no_credentials(error: &(dyn std::error::Error + 'static)) -> bool {
    causes(error).any(|cause| {
        matches!(cause.downcast_ref::<CredentialsError>(), Some(CredentialsError::CredentialsNotLoaded(_)))
    })
}

/// A queue's answer that lacks what it must hold.
pub(super) fn lacking(what: &str, field: &str) -> Error {
    Error::new(FailureKind::UnexpectedAnswer, what, format!("the answer has no {field}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::failure::Class;

    #[test]
    fn a_code_means_the_same_by_either_of_its_names() {
        for code in [
            "QueueDoesNotExist",
            "AWS.SimpleQueueService.NonExistentQueue",
            "com.amazonaws.sqs#QueueDoesNotExist",
        ] {
            assert_eq!(kind_of(code, Some(400)).0.class(), Class::Fatal, "{code}");
        }
        for code in ["AccessDenied", "AccessDeniedException", "ExpiredTokenException", "InvalidClientTokenId"]
        {
            let (kind, fix) = kind_of(code, Some(403));
            assert!(kind.class() == Class::Fatal && fix.is_some(), "{code}");
        }
        for (code, status) in
            [("RequestThrottled", 400), ("OverLimit", 403), ("InternalError", 500), ("", 503)]
        {
            assert_eq!(kind_of(code, Some(status)).0.class(), Class::Retryable, "{code}");
        }
        assert_eq!(kind_of("InvalidMessageContents", Some(400)).0.class(), Class::Permanent);
        assert_eq!(kind_of("SomethingNew", Some(400)).0.class(), Class::Fatal);
    }
}

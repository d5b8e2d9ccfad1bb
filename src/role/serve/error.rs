//! Error responses of the API.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::caller_trust;
use crate::pipeline::failure::{Class, Error};

/// An error response. The body is `{"error": {"code", "message"}}`.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    /// A further key of the body, beside `error`.
    extra: Option<(&'static str, Value)>,
    /// `Retry-After`, in seconds.
    after: Option<u64>,
}

/// An id that a client can report. It leads to the log line with the reason.
fn request_id() -> String {
    format!("{:08x}", rand::random::<u32>())
}

impl ApiError {
    /// An error with its status, a code for machines and a message for people.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), extra: None, after: None }
    }

    /// 400: the request is wrong. The message says what would be right.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// 404
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// Adds a key beside `error`.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: Value) -> Self {
        self.extra = Some((key, value));
        self
    }

    /// Sets `Retry-After`.
    #[must_use]
    pub fn after(mut self, seconds: u64) -> Self {
        self.after = Some(seconds);
        self
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        // Error texts of a backend may name its hosts, tables and texts.
        if error.class() == Class::Permanent && caller_trust::is_trusted() {
            return Self::bad_request(error.to_string());
        }
        let request_id = request_id();
        match error.class() {
            Class::Permanent => {
                tracing::warn!(request_id, %error, "a backend refused the request");
                Self::bad_request(format!(
                    "a backend refused this; the log has more under request {request_id}"
                ))
            }
            Class::Retryable => {
                tracing::warn!(request_id, %error, "request failed");
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "unavailable",
                    format!(
                        "a backend does not answer; try again; the log has more under request {request_id}"
                    ),
                )
            }
            Class::Fatal => {
                tracing::error!(request_id, %error, "request failed");
                Self::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    format!("internal error; the log has more under request {request_id}"),
                )
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = json!({ "error": { "code": self.code, "message": self.message } });
        if let Some((key, value)) = self.extra {
            body[key] = value;
        }
        let mut response = (self.status, Json(body)).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        let after = self.after.or((self.status == StatusCode::SERVICE_UNAVAILABLE).then_some(1));
        if let Some(seconds) = after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

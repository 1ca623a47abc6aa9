//! The envelope of every response, and the service codes that it may carry.

use axum::Extension;
use axum::body::Body;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{Html, IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;

use super::Reset;

/// Outcome of a handler. Only `render` adds the envelope, and with it the request id.
#[derive(Clone, Debug)]
pub(super) enum Reply {
    Success(Value),
    Refusal(Refusal),
    BrokenGateway,
    Reset,
}

/// Error response with a service code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) code: u16,
    pub(super) message: String,
}

#[derive(Serialize)]
struct Envelope {
    code: u16,
    message: String,
    request_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Value>,
}

/// Service code, HTTP status and message.
///
/// Codes and statuses are from Kling's page "General Information" (read 2026-11-22). Messages are from real
/// responses if one is known, else they shorten the explanation on that page.
const CODES: &[(u16, u16, &str)] = &[
    (1000, 401, "Authentication failed"),
    (1001, 401, "Authorization is empty"),
    (1002, 401, "Authorization is invalid"),
    (1003, 401, "Authorization is not yet valid"),
    (1004, 401, "Authorization has expired"),
    (1100, 429, "Account exception"),
    (1101, 429, "Account in arrears"),
    (1102, 429, "Account balance not enough"),
    (1103, 403, "Unauthorized access to requested resource"),
    (1200, 400, "Invalid request parameters"),
    (1201, 400, "Invalid parameters"),
    (1202, 404, "The requested method is invalid"),
    (1203, 404, "The requested resource does not exist"),
    (1300, 400, "Trigger strategy of the platform"),
    (1301, 400, "Trigger the platform's content security policy"),
    (1302, 429, "The API request is too fast"),
    (1303, 429, "parallel task over resource pack limit"),
    (1304, 429, "Trigger the platform's IP whitelisting policy"),
    (5000, 500, "Server internal error"),
    (5001, 503, "Server temporarily unavailable"),
    (5002, 504, "Server internal timeout"),
];

const BROKEN_GATEWAY: &str = "<html>\n<head><title>502 Bad Gateway</title></head>\n\
    <body><center><h1>502 Bad Gateway</h1></center></body>\n</html>\n";

// === impl Reply ===

impl Reply {
    /// Writes the response, with `request_id` if it has an envelope.
    ///
    /// # Errors
    ///
    /// [`Reset`] if the connection is to be dropped instead.
    pub(super) fn render(self, request_id: String) -> Result<Response<Body>, Reset> {
        let (status, code, message, data) = match self {
            Self::Success(data) => (StatusCode::OK, 0, "SUCCEED".to_owned(), Some(data)),
            Self::Refusal(refusal) => (refusal.status, refusal.code, refusal.message, None),
            // A gateway that cannot reach the API sends a page, not an envelope.
            Self::BrokenGateway => {
                return Ok((StatusCode::BAD_GATEWAY, Html(BROKEN_GATEWAY)).into_response());
            }
            Self::Reset => return Err(Reset),
        };
        let envelope = Envelope {
            code,
            message,
            request_id,
            data,
        };
        // No member can fail to serialize.
        let mut body = serde_json::to_vec(&envelope).unwrap_or_default();
        body.push(b'\n');
        let media_type = HeaderValue::from_static("application/json");
        Ok((status, [(CONTENT_TYPE, media_type)], body).into_response())
    }
}

/// Puts the reply into the extensions, for `render`.
impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        Extension(self).into_response()
    }
}

// === impl Refusal ===

impl Refusal {
    /// Returns the documented refusal; with 400 for a code that is not in the table.
    pub(super) fn documented(code: u16) -> Self {
        let row = CODES.iter().find(|row| row.0 == code);
        let &(_, status, message) = row.unwrap_or(&(code, 400, "Undocumented code"));
        Self {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST),
            code,
            message: message.to_owned(),
        }
    }

    /// Returns the documented refusal with a more specific message.
    pub(super) fn new(code: u16, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            ..Self::documented(code)
        }
    }

    /// Returns the refusal of a parameter with an illegal value: 400/1201.
    pub(super) fn parameter(message: impl Into<String>) -> Self {
        Self::new(1201, message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        Reply::Refusal(self).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_sorted_and_each_has_its_own_status() {
        assert!(CODES.is_sorted_by(|a, b| a.0 < b.0));
        for &(code, status, _) in CODES {
            assert_eq!(Refusal::documented(code).status.as_u16(), status, "{code}");
        }
    }
}

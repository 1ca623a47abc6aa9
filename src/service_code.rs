//! Every code an error can carry, as rows: Kling's service codes and the proxy's own.
//!
//! Rows below 9000 are the vendor's table, word for word ("General Information", error codes, read
//! 2026-11-22); rows from 9000 on are made by the proxy.

use std::time::Duration;

use http::StatusCode;

use crate::effect::Effect;

/// What is known of one code.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The number in the body's `code`.
    pub code: u16,
    /// The documented HTTP status.
    pub status: StatusCode,
    /// A stable name: `error.type` in bodies and logs, and a metric label.
    pub kind: &'static str,
    /// Whether the same request may be sent again.
    pub retry: Retry,
    /// What the code means in general.
    pub definition: &'static str,
    /// What the code means here.
    pub explanation: &'static str,
    /// What to do about it.
    pub solution: &'static str,
}

/// Whether a request that failed with a code may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It would fail again.
    Never,
    /// Only a read: a create may have made its task already.
    Reads,
    /// Any request: it was refused before it had an effect.
    Any,
}

/// How long a client should wait where upstream did not say: the vendor advises a back-off from 1 s.
const SHORT_WAIT: Duration = Duration::from_secs(1);
/// As [`SHORT_WAIT`], for what ends when a task or a restart ends: a task takes 9 s and up.
const LONG_WAIT: Duration = Duration::from_secs(5);

const OK: StatusCode = StatusCode::OK;
const BAD_REQUEST: StatusCode = StatusCode::BAD_REQUEST;
const UNAUTHORIZED: StatusCode = StatusCode::UNAUTHORIZED;
const FORBIDDEN: StatusCode = StatusCode::FORBIDDEN;
const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;
const TOO_MANY: StatusCode = StatusCode::TOO_MANY_REQUESTS;
const INTERNAL: StatusCode = StatusCode::INTERNAL_SERVER_ERROR;
const BAD_GATEWAY: StatusCode = StatusCode::BAD_GATEWAY;
const UNAVAILABLE: StatusCode = StatusCode::SERVICE_UNAVAILABLE;
const TIMEOUT: StatusCode = StatusCode::GATEWAY_TIMEOUT;

/// All rows, sorted by code.
#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    row(0, OK, "ok", Retry::Never,
        "Request successful", "-", "-"),
    row(1000, UNAUTHORIZED, "authentication_failed", Retry::Never,
        "Authentication failed", "Authentication failed",
        "Check if the Authorization is correct"),
    row(1001, UNAUTHORIZED, "authorization_missing", Retry::Never,
        "Authentication failed", "Authorization is empty",
        "Fill in the correct Authorization in the Request Header"),
    row(1002, UNAUTHORIZED, "authorization_invalid", Retry::Never,
        "Authentication failed", "Authorization is invalid",
        "Fill in the correct Authorization in the Request Header"),
    row(1003, UNAUTHORIZED, "authorization_not_yet_valid", Retry::Any,
        "Authentication failed", "Authorization is not yet valid",
        "Check the start effective time of the token, wait for it to take effect or reissue"),
    row(1004, UNAUTHORIZED, "authorization_expired", Retry::Any,
        "Authentication failed", "Authorization has expired",
        "Check the validity period of the token and reissue it"),
    row(1100, TOO_MANY, "account_exception", Retry::Never,
        "Account exception", "Account exception",
        "Verifying account configuration information"),
    row(1101, TOO_MANY, "account_in_arrears", Retry::Never,
        "Account exception", "Account in arrears (postpaid scenario)",
        "Recharge the account to ensure sufficient balance"),
    row(1102, TOO_MANY, "resource_pack_depleted", Retry::Never,
        "Account exception", "Resource pack depleted or expired (prepaid scenario)",
        "Purchase additional resource packages, or activate the post-payment service (if available)"),
    row(1103, FORBIDDEN, "access_denied", Retry::Never,
        "Account exception", "Unauthorized access to requested resource, such as API/model",
        "Verifying account permissions"),
    row(1200, BAD_REQUEST, "invalid_parameters", Retry::Never,
        "Invalid request parameters", "Invalid request parameters",
        "Check whether the request parameters are correct"),
    row(1201, BAD_REQUEST, "invalid_parameter_value", Retry::Never,
        "Invalid request parameters", "Invalid parameters, such as incorrect key or illegal value",
        "Refer to the specific information in the message field of the returned body and modify the request parameters"),
    row(1202, NOT_FOUND, "invalid_method", Retry::Never,
        "Invalid request parameters", "The requested method is invalid",
        "Review the API documentation and use the correct request method"),
    row(1203, NOT_FOUND, "resource_not_found", Retry::Never,
        "Invalid request parameters", "The requested resource does not exist, such as the model",
        "Refer to the specific information in the message field of the returned body and modify the request parameters"),
    row(1300, BAD_REQUEST, "platform_policy", Retry::Never,
        "Trigger strategy", "Trigger strategy of the platform",
        "Check if any platform policies have been triggered"),
    row(1301, BAD_REQUEST, "content_policy", Retry::Never,
        "Trigger strategy", "Trigger the content security policy of the platform",
        "Check the input content, modify it, and resend the request"),
    row(1302, TOO_MANY, "rate_limited", Retry::Any,
        "Trigger strategy", "The API request is too fast, exceeding the platform’s rate limit",
        "Reduce the request frequency, try again later, or contact customer service to increase the limit"),
    row(1303, TOO_MANY, "concurrency_limited", Retry::Any,
        "Trigger strategy", "Concurrency or QPS exceeds the prepaid resource package limit",
        "Reduce the request frequency, try again later, or contact customer service to increase the limit"),
    row(1304, TOO_MANY, "ip_not_allowed", Retry::Never,
        "Trigger strategy", "Trigger the platform’s IP whitelisting policy",
        "Contact customer service"),
    row(5000, INTERNAL, "internal_error", Retry::Reads,
        "Internal error", "Server internal error",
        "Try again later, or contact customer service"),
    row(5001, UNAVAILABLE, "unavailable", Retry::Reads,
        "Internal error", "Server temporarily unavailable, usually due to maintenance",
        "Try again later, or contact customer service"),
    row(5002, TIMEOUT, "internal_timeout", Retry::Reads,
        "Internal error", "Server internal timeout, usually due to a backlog",
        "Try again later, or contact customer service"),
    row(9000, BAD_REQUEST, "bad_request", Retry::Never,
        "Refused by the proxy", "The request is malformed or its target is not a path",
        "Send an origin-form target such as `/v1/videos/text2video`"),
    row(9001, StatusCode::MISDIRECTED_REQUEST, "host_not_allowed", Retry::Never,
        "Refused by the proxy", "The Host header names a host that this proxy does not answer for",
        "Call the proxy by an allowed name, or add the name to `access.allowed_hosts`"),
    row(9002, FORBIDDEN, "origin_not_allowed", Retry::Never,
        "Refused by the proxy", "The request comes from a web page that may not use this proxy",
        "Call the proxy from a program instead, or add the page's origin to `access.allowed_origins`"),
    row(9003, UNAUTHORIZED, "client_token_invalid", Retry::Never,
        "Refused by the proxy", "The client token is missing or unknown",
        "Send a token of `access.client_tokens_file` in `kling-proxy-token` or as `Authorization: Bearer`"),
    row(9004, FORBIDDEN, "path_not_allowed", Retry::Never,
        "Refused by the proxy", "The path is not among those that this proxy forwards",
        "Add a prefix of it to `access.allowed_paths`"),
    row(9005, StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", Retry::Never,
        "Refused by the proxy", "The method is not among those that this proxy forwards",
        "Use GET or POST, as the Kling API does, or see `access.allowed_methods`"),
    row(9006, StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", Retry::Never,
        "Refused by the proxy", "The request body is larger than the proxy allows",
        "Send less, or raise `limits.request_body`"),
    row(9007, NOT_FOUND, "not_found", Retry::Never,
        "Refused by the proxy", "Paths below `/_proxy` are reserved by the proxy and there is nothing at this one",
        "Health and metrics are on the admin listener, `admin.address`"),
    row(9008, StatusCode::REQUEST_TIMEOUT, "client_too_slow", Retry::Never,
        "Refused by the proxy", "The request body stalled for longer than the proxy waits, or came too slowly",
        "Send the body without long pauses, or raise `upstream.idle_timeout`"),
    row(9101, BAD_GATEWAY, "upstream_unreachable", Retry::Any,
        "Upstream failure", "No connection to upstream could be made, so nothing was sent",
        "Check the network, name resolution, `upstream.url`, and `upstream.proxy` where it is set"),
    row(9102, TIMEOUT, "upstream_timeout", Retry::Reads,
        "Upstream failure", "Upstream did not answer in time; the request may have been carried out",
        "Try a read again later; look a create up first. The limit is `upstream.response_timeout`"),
    row(9103, BAD_GATEWAY, "upstream_bad_response", Retry::Reads,
        "Upstream failure", "Upstream answered with an error that is not in Kling's form",
        "See `error.upstream_status` and `error.excerpt`; often a gateway in between"),
    row(9104, BAD_GATEWAY, "upstream_disconnected", Retry::Reads,
        "Upstream failure", "The connection was lost before an answer; the request may have been carried out",
        "Try a read again; look a create up first"),
    row(9201, UNAVAILABLE, "credentials_unavailable", Retry::Never,
        "No credential", "The proxy has no usable credential, so nothing was sent",
        "Set KLING_ACCESS_KEY and KLING_SECRET_KEY, or KLING_API_KEY, for the proxy"),
    row(9301, UNAVAILABLE, "overloaded", Retry::Any,
        "Refused by the proxy", "Too many requests are in flight, of all clients or of one while others want some",
        "Send fewer at once, or raise `limits.in_flight`"),
    row(9302, UNAVAILABLE, "draining", Retry::Any,
        "Refused by the proxy", "The proxy is shutting down",
        "Try again when it has been started again"),
];

/// Stands for every code that Kling has added since: never a reason to fail otherwise.
pub static UNKNOWN: Row = row(
    0,
    BAD_GATEWAY,
    "unknown_service_code",
    Retry::Reads,
    "Unknown service code",
    "Kling sent a code that its table does not list",
    "See the message, and Kling's documentation",
);

/// Looks up what a code that Kling sent means. Those of the proxy's own mean nothing from there.
pub fn sent_by_kling(code: i64) -> &'static Row {
    let known = find(code).filter(|row| row.code < Row::FIRST_OF_PROXY);
    known.unwrap_or(&UNKNOWN)
}

/// Looks a code up.
pub fn find(code: i64) -> Option<&'static Row> {
    let code = u16::try_from(code).ok()?;
    let index = TABLE.binary_search_by_key(&code, |row| row.code).ok()?;
    TABLE.get(index)
}

#[rustfmt::skip]
const fn row(
    code: u16, status: StatusCode, kind: &'static str, retry: Retry,
    definition: &'static str, explanation: &'static str, solution: &'static str,
) -> Row {
    Row { code, status, kind, retry, definition, explanation, solution }
}

// === impl Row ===

impl Row {
    /// The first code of the proxy's own.
    const FIRST_OF_PROXY: u16 = 9000;

    /// Who sends the code: `upstream` or `proxy`.
    pub fn source(&self) -> &'static str {
        if self.code < Self::FIRST_OF_PROXY {
            "upstream"
        } else {
            "proxy"
        }
    }

    /// What `Retry-After` says where upstream sent none.
    pub fn wait(&self) -> Duration {
        match self.code {
            1302 | 9301 => SHORT_WAIT,
            _ => LONG_WAIT,
        }
    }
}

// === impl Retry ===

impl Retry {
    /// Whether a request with this effect may be sent again.
    pub fn allows(self, effect: Effect) -> bool {
        match self {
            Self::Never => false,
            Self::Reads => effect == Effect::Read,
            Self::Any => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_without_duplicates() {
        assert!(TABLE.is_sorted_by(|a, b| a.code < b.code));
    }

    #[test]
    fn kinds_are_unique() {
        let mut kinds: Vec<_> = TABLE.iter().map(|row| row.kind).collect();
        kinds.sort_unstable();
        assert!(kinds.is_sorted_by(|a, b| a < b), "{kinds:?}");
    }

    #[test]
    fn every_code_is_found_and_no_other() {
        for row in TABLE {
            assert_eq!(find(row.code.into()), Some(row));
        }
        for code in [-1, 1, 999, 1005, 9009, 65_536 + 1303, i64::MAX] {
            assert_eq!(find(code), None, "{code}");
        }
    }

    #[test]
    fn upstream_cannot_speak_with_a_code_of_the_proxy() {
        for (code, kind) in [
            (1303, "concurrency_limited"),
            (1999, "unknown_service_code"),
            (9101, "unknown_service_code"),
        ] {
            assert_eq!(sent_by_kling(code).kind, kind, "{code}");
        }
    }
}

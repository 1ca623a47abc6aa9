//! The table of service codes, Kling's and the proxy's own, with every fact that depends on a code.
//!
//! To add a code, add a row. The texts of rows below 9000 are quotations of the vendor ("General
//! Information", error codes, read 2026-11-22). Rows from 9000 on belong to the proxy;
//! [`Error`](crate::error::Error) refers to them by the constants below the table.

use std::time::Duration;

use http::StatusCode;

use crate::kling::idempotency::Effect;

/// A service code, and every fact that depends on it.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// The number in the body's `code`.
    pub code: u16,
    /// The subject of the code.
    pub class: Class,
    /// The HTTP status in the documentation.
    pub status: StatusCode,
    /// The status under `errors.status = "actionable"`: not 429 if sending again cannot help.
    pub actionable_status: StatusCode,
    /// Stable name of the code: `error.type` in bodies and logs, and a metric label.
    pub kind: &'static str,
    /// The rule for sending the same request again, for clients and for the proxy.
    pub resend: Resend,
    /// The `Retry-After` of a status in [`WITH_RETRY_AFTER`], if upstream sent none. Whole seconds.
    pub retry_after: Duration,
    /// The vendor's heading for a group of codes, or the proxy's own.
    pub definition: &'static str,
    /// Meaning of the code, for the user.
    pub explanation: &'static str,
    /// Advice to the user about this code.
    pub solution: &'static str,
    /// Further advice of the proxy, in `error.hint`.
    pub hint: Option<&'static str>,
    /// Advice in a few words, for the log of a person: at most 40 characters. `None` if the message of the
    /// error says more.
    pub advice: Option<&'static str>,
    /// Phrases in Kling's messages that give more detail than the code.
    pub phrases: &'static [Phrase],
    /// True to close the client's connection after the response, because the start of the next request
    /// cannot be found.
    pub closes_connection: bool,
}

/// The subject of a code: the credential, the clock, the account, the request, or a part that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The request succeeded; not an error.
    Success,
    /// Kling refused the credential of the request.
    Credential,
    /// The request arrived without a credential.
    CredentialMissing,
    /// The token was refused because the clocks differ.
    TokenTime,
    /// The credential is known, but its account may not use this function.
    Account,
    /// The parameters of the request are wrong.
    Parameters,
    /// The content or a policy of the platform forbids it.
    Policy,
    /// The account exceeds its rate or its slots.
    Limit,
    /// The account does not admit the address of this machine.
    Address,
    /// Kling had an internal error.
    Internal,
    /// Kling sent a code that is not in the table.
    Unknown,
    /// The proxy does not forward the request.
    Request,
    /// The proxy has no usable response from upstream.
    UpstreamFailure,
    /// The proxy has no credential to send.
    CredentialUnavailable,
    /// The proxy accepts no more requests for now.
    Capacity,
    /// The proxy cannot do what a request about tasks asks for.
    Tasks,
}

/// The rule for sending a failed request again. It may differ for a client and for the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resend {
    /// Nobody sends it again: it would fail again.
    Never,
    /// Client and proxy send a read again. A create may have made its task already.
    Reads,
    /// Client and proxy send any request again: nothing of it was sent.
    Unsent,
    /// Client and proxy send any request again, later: it was refused before a task existed.
    Refused,
    /// As [`Refused`](Self::Refused), but the proxy sends it again only once, with a token by the
    /// corrected clock.
    NewToken,
    /// The client sends any request again, later: it had no effect. The proxy does not: it refused the
    /// request itself, or would be refused again.
    ByClient,
}

/// Part of a Kling message that asks for the other kind of credential.
#[derive(Debug, PartialEq, Eq)]
pub struct Phrase {
    /// Text to look for in the message.
    pub text: &'static str,
    /// Kind of credential that the message asks for.
    pub needs: Needs,
}

/// Kind of credential that a message asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    ApiKey,
    KeyPair,
}

/// Service code of a successful request.
pub const SUCCESS: i64 = 0;

/// Service code of a request that came too soon after others.
pub const RATE_LIMITED: i64 = 1302;

/// Statuses whose answers carry `Retry-After`, if the request may be sent again.
pub const WITH_RETRY_AFTER: [StatusCode; 2] = [
    StatusCode::TOO_MANY_REQUESTS,
    StatusCode::SERVICE_UNAVAILABLE,
];

/// The usual `Retry-After`, for waits that end with a task or a restart. A task takes at least 9 s.
const LONG_WAIT: Duration = Duration::from_secs(5);
/// `Retry-After` of a rate limit: the vendor advises a back-off from 1 s.
const SHORT_WAIT: Duration = Duration::from_secs(1);

const WRONG_CREDENTIAL: &str = "the proxy's credential was refused, not what the client sent: \
                                check the keys of the proxy, and that `upstream.url` is the region \
                                that issued them";
const WRONG_CLOCK: &str =
    "this machine's clock and upstream's differ: correct this machine's clock";

const NO_KEY_PAIRS: Phrase = Phrase {
    text: "does not support AK/SK",
    needs: Needs::ApiKey,
};
const NO_API_KEY: Phrase = Phrase {
    text: "3 parts",
    needs: Needs::KeyPair,
};

/// All rows, sorted by code. `row` sets the other columns to their usual values; the methods after it
/// change them.
#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    row(0, Class::Success, StatusCode::OK, "ok", Resend::Never,
        ["Request successful", "-", "-"]),
    row(1000, Class::Credential, StatusCode::UNAUTHORIZED, "authentication_failed", Resend::Never,
        ["Authentication failed", "Authentication failed",
         "Check if the Authorization is correct"])
        .hint(WRONG_CREDENTIAL).phrases(&[NO_API_KEY])
        .advice("check the proxy's keys and region"),
    row(1001, Class::CredentialMissing, StatusCode::UNAUTHORIZED, "authorization_missing", Resend::Never,
        ["Authentication failed", "Authorization is empty",
         "Fill in the correct Authorization in the Request Header"])
        .hint(WRONG_CREDENTIAL)
        .advice("check the proxy's keys and region"),
    row(1002, Class::Credential, StatusCode::UNAUTHORIZED, "authorization_invalid", Resend::Never,
        ["Authentication failed", "Authorization is invalid",
         "Fill in the correct Authorization in the Request Header"])
        .hint(WRONG_CREDENTIAL).phrases(&[NO_KEY_PAIRS, NO_API_KEY])
        .advice("check the proxy's keys and region"),
    row(1003, Class::TokenTime, StatusCode::UNAUTHORIZED, "authorization_not_yet_valid", Resend::NewToken,
        ["Authentication failed", "Authorization is not yet valid",
         "Check the start effective time of the token, wait for it to take effect or reissue"])
        .hint(WRONG_CLOCK)
        .advice("correct this machine's clock"),
    row(1004, Class::TokenTime, StatusCode::UNAUTHORIZED, "authorization_expired", Resend::NewToken,
        ["Authentication failed", "Authorization has expired",
         "Check the validity period of the token and reissue it"])
        .hint(WRONG_CLOCK)
        .advice("correct this machine's clock"),
    row(1100, Class::Account, StatusCode::TOO_MANY_REQUESTS, "account_exception", Resend::Never,
        ["Account exception", "Account exception",
         "Verifying account configuration information"])
        .actionable(StatusCode::PAYMENT_REQUIRED)
        .advice("check the account in Kling's console"),
    row(1101, Class::Account, StatusCode::TOO_MANY_REQUESTS, "account_in_arrears", Resend::Never,
        ["Account exception", "Account in arrears (postpaid scenario)",
         "Recharge the account to ensure sufficient balance"])
        .actionable(StatusCode::PAYMENT_REQUIRED)
        .advice("top up the account"),
    row(1102, Class::Account, StatusCode::TOO_MANY_REQUESTS, "resource_pack_depleted", Resend::Never,
        ["Account exception", "Resource pack depleted or expired (prepaid scenario)",
         "Purchase additional resource packages, or activate the post-payment service (if available)"])
        .actionable(StatusCode::PAYMENT_REQUIRED)
        .advice("buy a resource pack"),
    row(1103, Class::Account, StatusCode::FORBIDDEN, "access_denied", Resend::Never,
        ["Account exception", "Unauthorized access to requested resource, such as API/model",
         "Verifying account permissions"])
        .advice("check what the account may use"),
    row(1200, Class::Parameters, StatusCode::BAD_REQUEST, "invalid_parameters", Resend::Never,
        ["Invalid request parameters", "Invalid request parameters",
         "Check whether the request parameters are correct"]),
    row(1201, Class::Parameters, StatusCode::BAD_REQUEST, "invalid_parameter_value", Resend::Never,
        ["Invalid request parameters", "Invalid parameters, such as incorrect key or illegal value",
         "Refer to the specific information in the message field of the returned body and modify the request parameters"]),
    row(1202, Class::Parameters, StatusCode::NOT_FOUND, "invalid_method", Resend::Never,
        ["Invalid request parameters", "The requested method is invalid",
         "Review the API documentation and use the correct request method"]),
    row(1203, Class::Parameters, StatusCode::NOT_FOUND, "resource_not_found", Resend::Never,
        ["Invalid request parameters", "The requested resource does not exist, such as the model",
         "Refer to the specific information in the message field of the returned body and modify the request parameters"]),
    row(1300, Class::Policy, StatusCode::BAD_REQUEST, "platform_policy", Resend::Never,
        ["Trigger strategy", "Trigger strategy of the platform",
         "Check if any platform policies have been triggered"]),
    row(1301, Class::Policy, StatusCode::BAD_REQUEST, "content_policy", Resend::Never,
        ["Trigger strategy", "Trigger the content security policy of the platform",
         "Check the input content, modify it, and resend the request"])
        .advice("change the prompt or the image"),
    row(1302, Class::Limit, StatusCode::TOO_MANY_REQUESTS, "rate_limited", Resend::Refused,
        ["Trigger strategy", "The API request is too fast, exceeding the platform’s rate limit",
         "Reduce the request frequency, try again later, or contact customer service to increase the limit"])
        .retry_after(SHORT_WAIT)
        .advice("send fewer requests"),
    row(1303, Class::Limit, StatusCode::TOO_MANY_REQUESTS, "concurrency_limited", Resend::Refused,
        ["Trigger strategy", "Concurrency or QPS exceeds the prepaid resource package limit",
         "Reduce the request frequency, try again later, or contact customer service to increase the limit"])
        .hint("all keys of an account share its slots, and a task holds a slot until it ends: \
               wait for running tasks, then send this again")
        .advice("wait for running tasks"),
    row(1304, Class::Address, StatusCode::TOO_MANY_REQUESTS, "ip_not_allowed", Resend::Never,
        ["Trigger strategy", "Trigger the platform’s IP whitelisting policy",
         "Contact customer service"])
        .hint("the account accepts only listed IP addresses: add the public address of this machine")
        .actionable(StatusCode::FORBIDDEN)
        .advice("let the account admit this machine"),
    row(5000, Class::Internal, StatusCode::INTERNAL_SERVER_ERROR, "internal_error", Resend::Reads,
        ["Internal error", "Server internal error",
         "Try again later, or contact customer service"]),
    row(5001, Class::Internal, StatusCode::SERVICE_UNAVAILABLE, "unavailable", Resend::Reads,
        ["Internal error", "Server temporarily unavailable, usually due to maintenance",
         "Try again later, or contact customer service"]),
    row(5002, Class::Internal, StatusCode::GATEWAY_TIMEOUT, "internal_timeout", Resend::Reads,
        ["Internal error", "Server internal timeout, usually due to a backlog",
         "Try again later, or contact customer service"]),
    row(9000, Class::Request, StatusCode::BAD_REQUEST, "bad_request", Resend::Never,
        ["Refused by the proxy", "The request is malformed or its target is not a path",
         "Send an origin-form target such as `/v1/videos/text2video`"])
        .closes_connection(),
    row(9001, Class::Request, StatusCode::MISDIRECTED_REQUEST, "host_not_allowed", Resend::Never,
        ["Refused by the proxy", "The Host header names a host that this proxy does not answer for",
         "Call the proxy by an allowed name, or add the name to `access.allowed_hosts`"]),
    row(9002, Class::Request, StatusCode::FORBIDDEN, "origin_not_allowed", Resend::Never,
        ["Refused by the proxy", "The request comes from a web page that may not use this proxy",
         "Call the proxy from a program instead, or add the page's origin to `access.allowed_origins`"]),
    row(9003, Class::Request, StatusCode::UNAUTHORIZED, "client_token_invalid", Resend::Never,
        ["Refused by the proxy", "The client token is missing or unknown",
         "Send a token of `access.client_tokens_file` in `kling-proxy-token` or as `Authorization: Bearer`"]),
    row(9004, Class::Request, StatusCode::FORBIDDEN, "path_not_allowed", Resend::Never,
        ["Refused by the proxy", "The path is not among those that this proxy forwards",
         "Add a prefix of it to `access.allowed_paths`"]),
    row(9005, Class::Request, StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", Resend::Never,
        ["Refused by the proxy", "The method is not among those that this proxy forwards",
         "Use GET or POST, as the Kling API does, or see `access.allowed_methods`"]),
    row(9006, Class::Request, StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", Resend::Never,
        ["Refused by the proxy", "The request body is larger than the proxy allows",
         "Send less, or raise `limits.request_body`"]),
    row(9007, Class::Request, StatusCode::NOT_FOUND, "not_found", Resend::Never,
        ["Refused by the proxy", "Paths below `/_proxy` are reserved by the proxy, and nothing is served at this path",
         "Health and metrics are on the admin listener, `admin.address`"]),
    row(9008, Class::Request, StatusCode::REQUEST_TIMEOUT, "client_too_slow", Resend::Never,
        ["Refused by the proxy", "The request body stalled for longer than the proxy waits, or came too slowly",
         "Send the body without long pauses, or raise `upstream.idle_timeout`"]),
    row(9101, Class::UpstreamFailure, StatusCode::BAD_GATEWAY, "upstream_unreachable", Resend::Unsent,
        ["Upstream failure", "No connection to upstream could be made, so nothing was sent",
         "Check the network, name resolution, `upstream.url`, and `upstream.proxy` if it is set"]),
    row(9102, Class::UpstreamFailure, StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", Resend::Reads,
        ["Upstream failure", "Upstream did not answer in time; the request may have been carried out",
         "Try a read again later; look a create up first. The limit is `upstream.response_timeout`"]),
    row(9103, Class::UpstreamFailure, StatusCode::BAD_GATEWAY, "upstream_bad_response", Resend::Reads,
        ["Upstream failure", "Upstream answered with an error that is not in Kling's form",
         "See `error.upstream_status` and `error.excerpt`; often a gateway in between"]),
    row(9104, Class::UpstreamFailure, StatusCode::BAD_GATEWAY, "upstream_disconnected", Resend::Reads,
        ["Upstream failure", "The connection was lost before an answer; the request may have been carried out",
         "Try a read again; look a create up first"]),
    row(9201, Class::CredentialUnavailable, StatusCode::SERVICE_UNAVAILABLE, "credentials_unavailable", Resend::Never,
        ["No credential", "The proxy has no usable credential, so nothing was sent",
         "Set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY, for the proxy"]),
    row(9301, Class::Capacity, StatusCode::SERVICE_UNAVAILABLE, "overloaded", Resend::ByClient,
        ["Refused by the proxy", "Too many requests are in flight, of all clients, or of one client while others need some",
         "Send fewer at once, or raise `limits.in_flight`"])
        .retry_after(SHORT_WAIT),
    row(9302, Class::Capacity, StatusCode::SERVICE_UNAVAILABLE, "draining", Resend::ByClient,
        ["Refused by the proxy", "The proxy is shutting down",
         "Try again after the proxy has restarted"]),
    row(9404, Class::Tasks, StatusCode::CONFLICT, "task_not_cancelable", Resend::Never,
        ["Refused by the proxy", "The create was sent already, and Kling cannot cancel a task",
         "Wait for the end of the task, or ignore it"]),
    row(9502, Class::Tasks, StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", Resend::ByClient,
        ["Refused by the proxy", "The store of tasks does not answer",
         "Try again later; `kling_proxy_state_up` and the log tell of the store, `state.url` is its place"])
        .retry_after(SHORT_WAIT),
];

/// Row for each code that Kling sends and the table does not have, for example because Kling added it
/// later. The status of the response decides if the request may be sent again.
#[rustfmt::skip]
pub static UNKNOWN: Row =
    row(0, Class::Unknown, StatusCode::BAD_GATEWAY, "unknown_service_code", Resend::Never,
        ["Unknown service code", "Kling sent a code that its table does not list",
         "See the message, and Kling's documentation"]);

/// Row of the proxy for a malformed request.
pub const BAD_REQUEST: &Row = own(9000);
/// Row of the proxy for a request to a foreign host.
pub const HOST_NOT_ALLOWED: &Row = own(9001);
/// Row of the proxy for a web page.
pub const ORIGIN_NOT_ALLOWED: &Row = own(9002);
/// Row of the proxy for a client without a valid token.
pub const CLIENT_TOKEN_INVALID: &Row = own(9003);
/// Row of the proxy for a path outside of the allow-list.
pub const PATH_NOT_ALLOWED: &Row = own(9004);
/// Row of the proxy for a method outside of the allow-list.
pub const METHOD_NOT_ALLOWED: &Row = own(9005);
/// Row of the proxy for a body over the limit.
pub const BODY_TOO_LARGE: &Row = own(9006);
/// Row of the proxy for an unknown path of its own.
pub const NOT_FOUND: &Row = own(9007);
/// Row of the proxy for a body that stalls.
pub const CLIENT_TOO_SLOW: &Row = own(9008);
/// Row of the proxy for a failure to connect to upstream.
pub const UPSTREAM_UNREACHABLE: &Row = own(9101);
/// Row of the proxy for an upstream that does not respond in time.
pub const UPSTREAM_TIMEOUT: &Row = own(9102);
/// Row of the proxy for a response of upstream that is not in Kling's form.
pub const UPSTREAM_BAD_RESPONSE: &Row = own(9103);
/// Row of the proxy for a lost connection to upstream.
pub const UPSTREAM_DISCONNECTED: &Row = own(9104);
/// Row of the proxy for requests that have no credential to be sent with.
pub const CREDENTIALS_UNAVAILABLE: &Row = own(9201);
/// Row of the proxy for too many requests in flight.
pub const OVERLOADED: &Row = own(9301);
/// Row of the proxy for requests during its shutdown.
pub const DRAINING: &Row = own(9302);

/// Row of the proxy for a task that cannot be cancelled.
pub const TASK_NOT_CANCELABLE: &Row = own(9404);
/// Row of the proxy for requests that need the store while it fails.
pub const STORE_UNAVAILABLE: &Row = own(9502);

/// Finds the row of a code that Kling sent. A code from the proxy's own range counts as unknown.
pub fn sent_by_kling(code: i64) -> &'static Row {
    let known = find(code).filter(|row| row.code < Row::FIRST_OF_PROXY);
    known.unwrap_or(&UNKNOWN)
}

/// Finds the row of a code, of Kling or of the proxy.
pub fn find(code: i64) -> Option<&'static Row> {
    let code = u16::try_from(code).ok()?;
    let index = TABLE.binary_search_by_key(&code, |row| row.code).ok()?;
    TABLE.get(index)
}

/// Finds a row of the proxy's own. A constant without a row does not compile.
const fn own(code: u16) -> &'static Row {
    let mut index = 0;
    while TABLE[index].code != code {
        index += 1;
    }
    &TABLE[index]
}

/// Makes a row whose other columns have the usual values.
const fn row(
    code: u16,
    class: Class,
    status: StatusCode,
    kind: &'static str,
    resend: Resend,
    [definition, explanation, solution]: [&'static str; 3],
) -> Row {
    Row {
        code,
        class,
        status,
        actionable_status: status,
        kind,
        resend,
        retry_after: LONG_WAIT,
        definition,
        explanation,
        solution,
        hint: None,
        advice: None,
        phrases: &[],
        closes_connection: false,
    }
}

// === impl Row ===

impl Row {
    /// First code of the proxy's own range.
    const FIRST_OF_PROXY: u16 = 9000;

    /// Returns the sender of the code: `upstream` or `proxy`.
    pub fn source(&self) -> &'static str {
        if self.code < Self::FIRST_OF_PROXY {
            "upstream"
        } else {
            "proxy"
        }
    }

    /// Returns the other kind of credential that a message under this code asks for.
    pub fn needs(&self, message: &str) -> Option<Needs> {
        let phrase = self.phrases.iter().find(|p| message.contains(p.text));
        phrase.map(|phrase| phrase.needs)
    }

    const fn actionable(self, actionable_status: StatusCode) -> Self {
        Self {
            actionable_status,
            ..self
        }
    }

    const fn retry_after(self, retry_after: Duration) -> Self {
        Self {
            retry_after,
            ..self
        }
    }

    const fn hint(self, hint: &'static str) -> Self {
        Self {
            hint: Some(hint),
            ..self
        }
    }

    const fn advice(self, advice: &'static str) -> Self {
        Self {
            advice: Some(advice),
            ..self
        }
    }

    const fn phrases(self, phrases: &'static [Phrase]) -> Self {
        Self { phrases, ..self }
    }

    const fn closes_connection(self) -> Self {
        Self {
            closes_connection: true,
            ..self
        }
    }
}

// === impl Class ===

impl Class {
    /// Returns true if the credential itself was refused, or did not arrive.
    pub fn refuses_credential(self) -> bool {
        matches!(self, Self::Credential | Self::CredentialMissing)
    }

    /// Returns true if the credential or the time of its token was refused. Such an answer does not show
    /// if Kling knows the account.
    pub fn refuses_token(self) -> bool {
        self.refuses_credential() || self == Self::TokenTime
    }

    /// Returns true if the metrics count errors of this class as attempts: upstream was asked, or could
    /// not be reached.
    pub fn counts_as_attempt(self) -> bool {
        match self {
            Self::Success | Self::CredentialUnavailable | Self::Tasks => false,
            _ => !self.counts_as_refusal(),
        }
    }

    /// Returns true if the metrics count errors of this class as refusals: upstream is not asked.
    pub fn counts_as_refusal(self) -> bool {
        matches!(self, Self::Request | Self::Capacity)
    }

    /// Returns a stable name, and a description of what errors of this class mean for the credential,
    /// the clock, the account or the request.
    pub fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::Success => ("success", "no error"),
            Self::Credential => ("credential", "Kling does not take the credential"),
            Self::CredentialMissing => ("credential_missing", "no credential arrived at Kling"),
            Self::TokenTime => (
                "token_time",
                "the clocks of this machine and of Kling differ",
            ),
            Self::Account => (
                "account",
                "Kling accepts the credential, but refuses the request because of its account",
            ),
            Self::Parameters => ("parameters", "the request is wrong"),
            Self::Policy => ("policy", "a policy of Kling forbids the request"),
            Self::Limit => ("limit", "the account has reached a limit"),
            Self::Address => (
                "address",
                "the account does not admit this machine's address",
            ),
            Self::Internal => ("internal", "Kling failed"),
            Self::Unknown => ("unknown", "the table does not have the code"),
            Self::Request => ("request", "the proxy does not forward the request"),
            Self::UpstreamFailure => ("upstream_failure", "there is no usable answer of Kling"),
            Self::CredentialUnavailable => {
                ("credential_unavailable", "the proxy has no credential")
            }
            Self::Capacity => ("capacity", "the proxy takes no more requests for now"),
            Self::Tasks => (
                "tasks",
                "the proxy cannot do what a request about tasks asks for",
            ),
        }
    }
}

// === impl Resend ===

impl Resend {
    /// Returns true if a client may send a request with this effect again.
    pub fn allows(self, effect: Effect) -> bool {
        match self {
            Self::Never => false,
            Self::Reads => effect == Effect::Read,
            Self::Unsent | Self::Refused | Self::NewToken | Self::ByClient => true,
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

    /// A log line has 110 columns.
    #[test]
    fn advice_is_short() {
        for row in TABLE {
            assert!(
                row.advice.is_none_or(|text| text.len() <= 40),
                "{}",
                row.code
            );
        }
    }

    #[test]
    fn names_are_those_of_their_rows() {
        for (row, kind) in [
            (BAD_REQUEST, "bad_request"),
            (HOST_NOT_ALLOWED, "host_not_allowed"),
            (ORIGIN_NOT_ALLOWED, "origin_not_allowed"),
            (CLIENT_TOKEN_INVALID, "client_token_invalid"),
            (PATH_NOT_ALLOWED, "path_not_allowed"),
            (METHOD_NOT_ALLOWED, "method_not_allowed"),
            (BODY_TOO_LARGE, "body_too_large"),
            (NOT_FOUND, "not_found"),
            (CLIENT_TOO_SLOW, "client_too_slow"),
            (UPSTREAM_UNREACHABLE, "upstream_unreachable"),
            (UPSTREAM_TIMEOUT, "upstream_timeout"),
            (UPSTREAM_BAD_RESPONSE, "upstream_bad_response"),
            (UPSTREAM_DISCONNECTED, "upstream_disconnected"),
            (CREDENTIALS_UNAVAILABLE, "credentials_unavailable"),
            (OVERLOADED, "overloaded"),
            (DRAINING, "draining"),
        ] {
            assert_eq!(row.kind, kind);
        }
    }

    /// Checks the groups of classes that the metrics, the tokens and `check` use.
    #[test]
    fn every_code_belongs_to_its_class() {
        let codes = |belongs: fn(Class) -> bool| -> Vec<u16> {
            let rows = TABLE.iter().filter(|row| belongs(row.class));
            rows.map(|row| row.code).collect()
        };
        assert_eq!(codes(Class::refuses_credential), [1000, 1001, 1002]);
        assert_eq!(codes(Class::refuses_token), [1000, 1001, 1002, 1003, 1004]);
        let refusals = (9000..=9008).chain(9301..=9302);
        assert_eq!(
            codes(Class::counts_as_refusal),
            refusals.collect::<Vec<_>>()
        );
        let elsewhere = codes(|class| !class.counts_as_refusal() && !class.counts_as_attempt());
        assert_eq!(elsewhere, [0, 9201, 9404, 9502]);
        assert!(UNKNOWN.class.counts_as_attempt() && !UNKNOWN.class.refuses_token());
    }

    #[test]
    fn a_message_tells_the_credential_that_it_needs() {
        let no_pairs = "Authentication error. The current API does not support AK/SK; please go to";
        let no_key = "The token was expected to have 3 parts, but got 0";
        for (code, message, needs) in [
            (1000, no_key, Some(Needs::KeyPair)),
            (1000, no_pairs, None),
            (1001, no_key, None),
            (1002, no_key, Some(Needs::KeyPair)),
            (1002, no_pairs, Some(Needs::ApiKey)),
            (1002, "signature is invalid", None),
            (1003, no_pairs, None),
        ] {
            assert_eq!(
                sent_by_kling(code).needs(message),
                needs,
                "{code} {message}"
            );
        }
    }

    #[test]
    fn a_create_is_never_freer_to_be_sent_again_than_a_read() {
        for row in TABLE {
            let allows = |effect| row.resend.allows(effect);
            assert!(
                allows(Effect::Read) || !allows(Effect::Create),
                "{}",
                row.code
            );
        }
    }

    #[test]
    fn waits_are_whole_seconds() {
        for row in TABLE {
            let wait = row.retry_after;
            assert!(!wait.is_zero() && wait.subsec_nanos() == 0, "{}", row.code);
        }
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

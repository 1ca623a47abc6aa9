//! All ways in which a request can fail.

use std::fmt::{self, Write};
use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::response;
use sync_wrapper::SyncWrapper;

use crate::auth::token::MintError;
use crate::kling::envelope::Envelope;
use crate::kling::idempotency::Effect;
use crate::kling::service_code::{self, Class, Resend, Row};
use crate::tasks::ledger::Unavailable;

/// Any error of another crate, as the cause of a failure.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Reason for which a request failed, with one variant for each case that its sender would treat
/// differently.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is malformed, or its target is not a path on this proxy.
    #[error("{0}")]
    BadRequest(&'static str),
    /// `Host` is missing, doubled or not one of ours. The text is the message; it shows the host that was
    /// sent, bounded and printable.
    #[error("{0}")]
    HostNotAllowed(String),
    /// A web page sent the request. The text is the message; it shows the origin that was sent, bounded
    /// and printable.
    #[error("{0}")]
    OriginNotAllowed(String),
    /// No client token, or an unknown one: deliberately the same for both.
    #[error("a valid client token is required{}", .0.advice())]
    ClientTokenInvalid(TokenSource),
    /// A path that is not in the allow-list.
    #[error("this path is not in `access.allowed_paths`")]
    PathNotAllowed,
    /// The method is never forwarded, or is not in the allow-list.
    #[error("this method is not forwarded")]
    MethodNotAllowed,
    /// The request body exceeds `limits.request_body`.
    #[error("the request body is over `limits.request_body`, {limit} bytes")]
    BodyTooLarge {
        /// Value of `limits.request_body`, in bytes.
        limit: u64,
        /// True if a part of the body was already sent upstream, because its size was not declared.
        begun: bool,
    },
    /// The client's connection ended in the middle of the body, or its chunks are malformed.
    #[error("the request body was cut off or is malformed")]
    BodyCutOff,
    /// The path is reserved for the proxy, and nothing is served there. The text is the message.
    #[error("{0}")]
    NotFound(&'static str),
    /// The create was sent, so the proxy cannot cancel it.
    #[error("the create was sent already")]
    TaskNotCancelable,
    /// The store of tasks fails, and the request needs it.
    #[error(transparent)]
    StoreUnavailable(#[from] Unavailable),
    /// The request body made no progress for this time, or came too slowly.
    #[error("the request body stalled for {0:?}")]
    ClientTooSlow(Duration),
    /// Name resolution, TCP or TLS failed, so that no byte of the request was sent.
    #[error("cannot connect to upstream")]
    Unreachable(#[source] BoxError),
    /// The egress proxy refused to connect to upstream, and would do so again. No byte of the request
    /// was sent.
    #[error("cannot connect to upstream: the egress proxy answered {0}")]
    EgressRefused(StatusCode),
    /// Upstream did not answer in time, or stopped reading the request.
    #[error("no answer from upstream within {limit:?}")]
    UpstreamTimeout {
        /// Time limit that upstream exceeded.
        limit: Duration,
        /// For a create that was sent: the response, which may still come.
        late: Option<LateAnswer>,
    },
    /// Upstream sent an error whose body is not an envelope.
    #[error("upstream answered {} without a service code", .answer.head.status)]
    BadResponse {
        /// The answer as it came.
        answer: Box<Answer>,
        /// Beginning of its body, if it is text.
        excerpt: Option<String>,
        /// True if the whole body is known to hold no envelope.
        is_bare: bool,
    },
    /// Upstream sent something that is not HTTP.
    #[error("upstream's answer is not HTTP")]
    NotHttp(#[source] BoxError),
    /// The connection was lost after the request was sent and before the head of a response arrived.
    #[error("upstream closed the connection before it answered")]
    Disconnected(#[source] BoxError),
    /// The proxy was shut down while a create was in flight.
    #[error("the proxy was shut down before upstream answered")]
    ShutDown,
    /// No token could be minted.
    #[error("no credential can be sent")]
    Credentials(#[source] MintError),
    /// Too many requests are in flight; the number is `limits.in_flight`.
    #[error("over `limits.in_flight`, {0} requests")]
    Overloaded(u64),
    /// Too many requests wait for events; the number is `state.waiting`.
    #[error("over `state.waiting`, {0} requests that wait")]
    TooManyWaiting(u64),
    /// The proxy is shutting down and starts no new request.
    #[error("the proxy is shutting down")]
    Draining,
    /// Kling refused the request with a service code.
    #[error("service code {}: {}", .envelope.code, .envelope.message.as_deref().unwrap_or("no message"))]
    Service {
        /// The answer as it came.
        answer: Box<Answer>,
        /// Envelope that was read from its body.
        envelope: Envelope,
    },
}

/// The place where clients find their token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSource {
    /// `access.client_tokens_file`.
    File,
    /// A variable that `run` has set for its command.
    Run,
}

/// An answer of upstream that is an error.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers, without hop-by-hop ones.
    pub head: response::Parts,
    /// The body, unchanged since it arrived.
    pub body: SyncWrapper<Body>,
}

/// A response that may still arrive although its client has received a timeout error.
pub struct LateAnswer(SyncWrapper<PendingAnswer>);

type PendingAnswer = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

/// Fields of an error that the log shows.
#[derive(Debug)]
pub struct FailureRecord {
    /// The number in the body's `code`.
    pub code: i64,
    /// Stable name of the error, from [`Error::kind`].
    pub kind: &'static str,
    /// The error and its causes in one line, from [`chain`].
    pub cause: String,
    /// Kling's id of the request, which Kling's support asks for.
    pub upstream_request_id: Option<String>,
}

// === impl Error ===

impl Error {
    /// Makes the error for an upstream that did not respond within this time.
    pub fn upstream_timeout(limit: Duration) -> Self {
        let late = None;
        Self::UpstreamTimeout { limit, late }
    }

    /// Makes the error for a request whose body failed with `failure`.
    pub fn of_body(failure: BoxError) -> Self {
        match failure.downcast::<Self>() {
            Ok(error) => *error,
            Err(_) => Self::BodyCutOff,
        }
    }

    /// Takes the response that may still arrive.
    pub fn take_late(&mut self) -> Option<LateAnswer> {
        match self {
            Self::UpstreamTimeout { late, .. } => late.take(),
            _ => None,
        }
    }

    /// Returns the number in the body's `code`.
    pub fn code(&self) -> i64 {
        match self {
            // All unknown codes share one row, so the row cannot give the code.
            Self::Service { envelope, .. } => envelope.code,
            _ => self.row().code.into(),
        }
    }

    /// Returns the row of the error's code.
    pub fn row(&self) -> &'static Row {
        match self {
            Self::BadRequest(_) | Self::BodyCutOff => service_code::BAD_REQUEST,
            Self::HostNotAllowed(_) => service_code::HOST_NOT_ALLOWED,
            Self::OriginNotAllowed(_) => service_code::ORIGIN_NOT_ALLOWED,
            Self::ClientTokenInvalid(_) => service_code::CLIENT_TOKEN_INVALID,
            Self::PathNotAllowed => service_code::PATH_NOT_ALLOWED,
            Self::MethodNotAllowed => service_code::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => service_code::BODY_TOO_LARGE,
            Self::NotFound(_) => service_code::NOT_FOUND,
            Self::TaskNotCancelable => service_code::TASK_NOT_CANCELABLE,
            Self::StoreUnavailable(_) => service_code::STORE_UNAVAILABLE,
            Self::ClientTooSlow(_) => service_code::CLIENT_TOO_SLOW,
            Self::Unreachable(_) | Self::EgressRefused(_) => service_code::UPSTREAM_UNREACHABLE,
            Self::UpstreamTimeout { .. } => service_code::UPSTREAM_TIMEOUT,
            Self::BadResponse { .. } | Self::NotHttp(_) => service_code::UPSTREAM_BAD_RESPONSE,
            Self::Disconnected(_) | Self::ShutDown => service_code::UPSTREAM_DISCONNECTED,
            Self::Credentials(_) => service_code::CREDENTIALS_UNAVAILABLE,
            Self::Overloaded(_) | Self::TooManyWaiting(_) => service_code::OVERLOADED,
            Self::Draining => service_code::DRAINING,
            Self::Service { envelope, .. } => service_code::sent_by_kling(envelope.code),
        }
    }

    /// Returns a stable name of low cardinality: `error.type` in bodies and logs.
    pub fn kind(&self) -> &'static str {
        self.row().kind
    }

    /// Returns the documented status, or upstream's own if none is documented for its response.
    pub fn status(&self) -> StatusCode {
        self.bare_status().unwrap_or(self.row().status)
    }

    /// Returns the status for clients that retry every 429 (`errors.status = "actionable"`).
    pub fn actionable_status(&self) -> StatusCode {
        self.bare_status().unwrap_or(self.row().actionable_status)
    }

    /// Returns upstream's status if nothing else shows the meaning of its response, and 502 if that
    /// status is no error.
    fn bare_status(&self) -> Option<StatusCode> {
        let answer = match self {
            Self::BadResponse { answer, .. } => answer,
            Self::Service { answer, .. } if self.row().class == Class::Unknown => answer,
            _ => return None,
        };
        let status = answer.head.status;
        let is_error = status.is_client_error() || status.is_server_error();
        Some(if is_error {
            status
        } else {
            StatusCode::BAD_GATEWAY
        })
    }

    /// Returns the response of upstream, if there is one.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Service { answer, .. } | Self::BadResponse { answer, .. } => Some(answer),
            _ => None,
        }
    }

    /// Returns the same as [`answer`](Self::answer), by value.
    pub fn into_answer(self) -> Option<Answer> {
        match self {
            Self::Service { answer, .. } | Self::BadResponse { answer, .. } => Some(*answer),
            _ => None,
        }
    }

    /// Returns true if a client may send the same request again, unchanged, given its effect.
    pub fn retryable(&self, effect: Effect) -> bool {
        match self.bare_status() {
            // A status alone does not prove that a create had no effect.
            Some(status) => effect == Effect::Read && status.is_server_error(),
            None => self.row().resend.allows(effect),
        }
    }

    /// Returns true if a create that failed with this error cannot have made a task, so that it may be
    /// sent again.
    pub fn proves_no_task(&self) -> bool {
        match self.resend() {
            Resend::Unsent | Resend::Refused | Resend::NewToken | Resend::ByClient => true,
            Resend::Never | Resend::Reads => false,
        }
    }

    /// Returns true if a create that ended with this error made no task: Kling refused it, or could not read
    /// it. Compared to [`proves_no_task`](Self::proves_no_task), it may well be refused again.
    pub fn refuses_create(&self) -> bool {
        match self {
            Self::Service { .. } => !matches!(self.row().class, Class::Internal | Class::Unknown),
            Self::BadResponse {
                answer, is_bare, ..
            } => *is_bare && answer.head.status.is_client_error(),
            // Half a body makes no task.
            Self::BodyTooLarge { .. } | Self::BodyCutOff | Self::ClientTooSlow(_) => true,
            _ => self.proves_no_task(),
        }
    }

    /// Returns true if Kling may have made the task of a create that ended with this error, and only the answer
    /// was lost.
    pub fn may_hide_a_task(&self) -> bool {
        !self.refuses_create() && !matches!(self, Self::Credentials(_))
    }

    /// Returns the message of the error: Kling's, or the proxy's own with its causes.
    pub fn message(&self) -> String {
        match self {
            Self::Service { envelope, .. } => {
                let message = envelope.message.as_deref();
                message.unwrap_or(self.row().explanation).to_owned()
            }
            _ => chain(self),
        }
    }

    /// Returns the rule for sending the same request again that the proxy itself follows.
    ///
    /// It allows less than [`retryable`](Self::retryable), which is advice for clients: some variants
    /// give more detail than the row that they share with others.
    pub fn resend(&self) -> Resend {
        match self {
            // The egress proxy would refuse it again.
            Self::EgressRefused(_) => Resend::ByClient,
            Self::NotHttp(_) => Resend::Never,
            Self::BadResponse { answer, .. } => match answer.head.status {
                StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT => self.row().resend,
                _ => Resend::Never,
            },
            _ => self.row().resend,
        }
    }
}

// === impl TokenSource ===

impl TokenSource {
    /// Names the token, where the message should.
    fn advice(self) -> &'static str {
        match self {
            Self::File => "",
            Self::Run => ": send `$KLING_API_KEY`, which `run` has set",
        }
    }
}

// === impl LateAnswer ===

impl LateAnswer {
    /// Makes a late response from the future of the exchange.
    pub fn new(exchange: impl Future<Output = Result<Response, Error>> + Send + 'static) -> Self {
        Self(SyncWrapper::new(Box::pin(exchange)))
    }

    /// Waits for the response to arrive.
    ///
    /// # Errors
    ///
    /// The error that upstream sent, or that of a connection that was lost after all.
    pub async fn wait(self) -> Result<Response, Error> {
        self.0.into_inner().await
    }
}

impl fmt::Debug for LateAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LateAnswer").finish_non_exhaustive()
    }
}

// === impl Answer ===

impl Answer {
    /// Wraps a response in a box. Errors with a response are rare, so results should not be large for
    /// them.
    pub fn boxed(answer: Response) -> Box<Self> {
        let (head, body) = answer.into_parts();
        let body = SyncWrapper::new(body);
        Box::new(Self { head, body })
    }
}

// === impl FailureRecord ===

impl From<&Error> for FailureRecord {
    fn from(error: &Error) -> Self {
        let upstream_request_id = match error {
            Error::Service { envelope, .. } => envelope.request_id.clone(),
            _ => None,
        };
        Self {
            code: error.code(),
            kind: error.kind(),
            cause: chain(error),
            upstream_request_id,
        }
    }
}

/// Initial capacity of a line, in bytes; most lines are shorter.
const USUAL: usize = 128;

/// Formats an error and its causes in one line. A cause is left out if the text of its effect already
/// ends with it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = String::with_capacity(USUAL);
    // Writing to a string cannot fail.
    let _ = write!(line, "{error}");
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kling::envelope;

    fn response(status: u16) -> Response {
        let mut answer = Response::new(Body::empty());
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        answer
    }

    fn bare(status: u16) -> Error {
        Error::BadResponse {
            answer: Answer::boxed(response(status)),
            excerpt: None,
            is_bare: true,
        }
    }

    fn service(status: u16, code: i64) -> Error {
        Error::Service {
            answer: Answer::boxed(response(status)),
            envelope: envelope::read(format!("{{\"code\":{code}}}").as_bytes()).unwrap(),
        }
    }

    fn cause() -> BoxError {
        "cause".into()
    }

    #[test]
    fn each_error_says_what_may_be_sent_again() {
        use Resend::{ByClient, Never, NewToken, Reads, Refused, Unsent};
        let timeout = || Error::UpstreamTimeout {
            limit: Duration::ZERO,
            late: None,
        };
        // The proxy's own rule; if a client may send a read and a create again; if there is no task.
        for (error, resend, read, create, no_task) in [
            (Error::BadRequest("why"), Never, false, false, false),
            (Error::Unreachable(cause()), Unsent, true, true, true),
            (
                Error::EgressRefused(StatusCode::FORBIDDEN),
                ByClient,
                true,
                true,
                true,
            ),
            (timeout(), Reads, true, false, false),
            (Error::Disconnected(cause()), Reads, true, false, false),
            (Error::ShutDown, Reads, true, false, false),
            (Error::NotHttp(cause()), Never, true, false, false),
            (Error::Overloaded(1), ByClient, true, true, true),
            (Error::Draining, ByClient, true, true, true),
            (bare(400), Never, false, false, false),
            (bare(404), Never, false, false, false),
            (bare(429), Never, false, false, false),
            (bare(500), Never, true, false, false),
            (bare(502), Reads, true, false, false),
            (bare(503), Reads, true, false, false),
            (bare(504), Reads, true, false, false),
            (service(200, 5000), Reads, true, false, false),
            (service(503, 5001), Reads, true, false, false),
            (service(200, 1303), Refused, true, true, true),
            (service(429, 1302), Refused, true, true, true),
            (service(401, 1004), NewToken, true, true, true),
            (service(429, 1102), Never, false, false, false),
            (service(400, 1201), Never, false, false, false),
            // A code that Kling added: the status alone speaks.
            (service(500, 4242), Never, true, false, false),
            (service(400, 4242), Never, false, false, false),
            (service(200, 4242), Never, true, false, false),
        ] {
            let found = (
                error.resend(),
                error.retryable(Effect::Read),
                error.retryable(Effect::Create),
                error.proves_no_task(),
            );
            assert_eq!(found, (resend, read, create, no_task), "{error:?}");
        }
    }

    #[test]
    fn status_is_upstreams_only_if_nothing_else_is_known() {
        for (error, status, actionable) in [
            (bare(404), 404, 404),
            (bare(503), 503, 503),
            (bare(200), 502, 502),
            (service(200, 4242), 502, 502),
            (service(418, 4242), 418, 418),
            (service(500, 4242), 500, 500),
            (service(200, 1303), 429, 429),
            (service(500, 1102), 429, 402),
            (Error::Unreachable(cause()), 502, 502),
        ] {
            let found = (error.status().as_u16(), error.actionable_status().as_u16());
            assert_eq!(found, (status, actionable), "{error:?}");
        }
    }
}

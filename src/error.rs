//! Every way a request can fail.

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

/// A cause from another crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a request failed: a variant for each thing that its sender would treat differently.
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
    /// A method that is never forwarded, or not in the allow-list.
    #[error("this method is not forwarded")]
    MethodNotAllowed,
    /// The request body exceeds `limits.request_body`.
    #[error("the request body is over `limits.request_body`, {limit} bytes")]
    BodyTooLarge {
        /// The bound, in bytes.
        limit: u64,
        /// Whether upstream was sent some of it: of a body that did not declare its size.
        begun: bool,
    },
    /// The client's connection ended inside of the body, or its chunks are malformed.
    #[error("the request body was cut off or is malformed")]
    BodyCutOff,
    /// Nothing is at this reserved path.
    #[error("nothing is at this reserved path")]
    NotFound,
    /// The request body stalled.
    #[error("the request body stalled for {0:?}")]
    ClientTooSlow(Duration),
    /// Name resolution, TCP or TLS failed: not a byte of the request was sent.
    #[error("cannot connect to upstream")]
    Unreachable(#[source] BoxError),
    /// The egress proxy does not lead to upstream, and would say the same again: not a byte of the request
    /// was sent.
    #[error("cannot connect to upstream: the egress proxy answered {0}")]
    EgressRefused(StatusCode),
    /// Upstream did not answer in time, or stopped reading the request.
    #[error("no answer from upstream within {limit:?}")]
    UpstreamTimeout {
        /// How long upstream had.
        limit: Duration,
        /// The answer to a create that was sent: it may still come.
        late: Option<LateAnswer>,
    },
    /// Upstream answered with an error that is no envelope.
    #[error("upstream answered {} without a service code", .answer.head.status)]
    BadResponse {
        /// The answer as it came.
        answer: Box<Answer>,
        /// How its body begins, where it is text.
        excerpt: Option<String>,
    },
    /// What upstream sent is not HTTP.
    #[error("upstream's answer is not HTTP")]
    NotHttp(#[source] BoxError),
    /// The connection was lost after the request was sent, before the head of an answer.
    #[error("upstream closed the connection before it answered")]
    Disconnected(#[source] BoxError),
    /// The proxy was shut down while a create was in flight.
    #[error("the proxy was shut down before upstream answered")]
    ShutDown,
    /// There is no token.
    #[error("no credential can be sent")]
    Credentials(#[source] MintError),
    /// Over `limits.in_flight`.
    #[error("over `limits.in_flight`, {0} requests")]
    Overloaded(u64),
    /// The proxy is shutting down.
    #[error("the proxy is shutting down")]
    Draining,
    /// Kling refused the request with a service code.
    #[error("service code {}: {}", .envelope.code, .envelope.message.as_deref().unwrap_or("no message"))]
    Service {
        /// The answer as it came.
        answer: Box<Answer>,
        /// What its body says.
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
    /// The body as it came.
    pub body: SyncWrapper<Body>,
}

/// An answer that may come although its client was told that none did.
pub struct LateAnswer(SyncWrapper<PendingAnswer>);

/// Waits for an answer.
type PendingAnswer = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

/// What the log tells of an error.
#[derive(Debug)]
pub struct FailureRecord {
    /// The code of the body.
    pub code: i64,
    /// [`Error::kind`].
    pub kind: &'static str,
    /// The error and its causes.
    pub cause: String,
    /// Kling's name for the request, which its support asks for.
    pub upstream_request_id: Option<String>,
}

// === impl Error ===

impl Error {
    /// No answer within this time.
    pub fn upstream_timeout(limit: Duration) -> Self {
        let late = None;
        Self::UpstreamTimeout { limit, late }
    }

    /// What is wrong with a request whose body fails like this.
    pub fn of_body(failure: BoxError) -> Self {
        match failure.downcast::<Self>() {
            Ok(error) => *error,
            Err(_) => Self::BodyCutOff,
        }
    }

    /// Takes the answer that may still come.
    pub fn take_late(&mut self) -> Option<LateAnswer> {
        match self {
            Self::UpstreamTimeout { late, .. } => late.take(),
            _ => None,
        }
    }

    /// Returns the number in the body's `code`.
    pub fn code(&self) -> i64 {
        match self {
            // An unknown code has a row that stands for all of them.
            Self::Service { envelope, .. } => envelope.code,
            _ => self.row().code.into(),
        }
    }

    /// Returns the row of the code.
    pub fn row(&self) -> &'static Row {
        match self {
            Self::BadRequest(_) | Self::BodyCutOff => service_code::BAD_REQUEST,
            Self::HostNotAllowed(_) => service_code::HOST_NOT_ALLOWED,
            Self::OriginNotAllowed(_) => service_code::ORIGIN_NOT_ALLOWED,
            Self::ClientTokenInvalid(_) => service_code::CLIENT_TOKEN_INVALID,
            Self::PathNotAllowed => service_code::PATH_NOT_ALLOWED,
            Self::MethodNotAllowed => service_code::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge { .. } => service_code::BODY_TOO_LARGE,
            Self::NotFound => service_code::NOT_FOUND,
            Self::ClientTooSlow(_) => service_code::CLIENT_TOO_SLOW,
            Self::Unreachable(_) | Self::EgressRefused(_) => service_code::UPSTREAM_UNREACHABLE,
            Self::UpstreamTimeout { .. } => service_code::UPSTREAM_TIMEOUT,
            Self::BadResponse { .. } | Self::NotHttp(_) => service_code::UPSTREAM_BAD_RESPONSE,
            Self::Disconnected(_) | Self::ShutDown => service_code::UPSTREAM_DISCONNECTED,
            Self::Credentials(_) => service_code::CREDENTIALS_UNAVAILABLE,
            Self::Overloaded(_) => service_code::OVERLOADED,
            Self::Draining => service_code::DRAINING,
            Self::Service { envelope, .. } => service_code::sent_by_kling(envelope.code),
        }
    }

    /// A stable name of low cardinality: `error.type` in bodies and logs.
    pub fn kind(&self) -> &'static str {
        self.row().kind
    }

    /// The documented status; upstream's own where none is documented for what it sent.
    pub fn status(&self) -> StatusCode {
        self.bare_status().unwrap_or(self.row().status)
    }

    /// The status for clients that send every 429 again (`errors.status = "actionable"`).
    pub fn actionable_status(&self) -> StatusCode {
        self.bare_status().unwrap_or(self.row().actionable_status)
    }

    /// Upstream's status, where nothing else tells what its answer means.
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

    /// What upstream answered, where it did.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Service { answer, .. } | Self::BadResponse { answer, .. } => Some(answer),
            _ => None,
        }
    }

    /// [`answer`](Self::answer), by value.
    pub fn into_answer(self) -> Option<Answer> {
        match self {
            Self::Service { answer, .. } | Self::BadResponse { answer, .. } => Some(*answer),
            _ => None,
        }
    }

    /// Whether the same request, with this effect, may be sent again as it is.
    pub fn retryable(&self, effect: Effect) -> bool {
        match self.bare_status() {
            // A status alone cannot speak for a create.
            Some(status) => effect == Effect::Read && status.is_server_error(),
            None => self.row().resend.allows(effect),
        }
    }

    /// Returns true if no task can have come of a create that failed so, and it may be sent again.
    pub fn proves_no_task(&self) -> bool {
        match self.resend() {
            Resend::Unsent | Resend::Refused | Resend::NewToken | Resend::ByClient => true,
            Resend::Never | Resend::Reads => false,
        }
    }

    /// Returns the rule for sending the same request again that the proxy itself follows.
    ///
    /// Narrower than [`retryable`](Self::retryable), which advises clients: some variants say more than
    /// the row that they share with others.
    pub fn resend(&self) -> Resend {
        match self {
            // The egress proxy would refuse again.
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
    /// An answer that `exchange` will have.
    pub fn new(exchange: impl Future<Output = Result<Response, Error>> + Send + 'static) -> Self {
        Self(SyncWrapper::new(Box::pin(exchange)))
    }

    /// Waits for the answer.
    ///
    /// # Errors
    ///
    /// That upstream answered with, or that of a connection that was lost after all.
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
    /// Takes an answer as it came; rare enough not to lie in every result.
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

/// Most such lines are shorter, in bytes.
const USUAL: usize = 128;

/// An error and its causes in one line. A cause that its effect already quotes is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = String::with_capacity(USUAL);
    // To write to a string cannot fail.
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

//! Every way a request can fail.

use std::fmt::{self, Write};
use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::response;
use sync_wrapper::SyncWrapper;

use crate::effect::Effect;
use crate::envelope::Envelope;
use crate::service_code::{self, Row};
use crate::token::MintError;

/// A cause from another crate.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a request failed: a variant for each thing that its sender would treat differently.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is malformed, or its target is not a path on this proxy.
    #[error("{0}")]
    BadRequest(&'static str),
    /// `Host` is missing, doubled or not one of ours; the text is what was sent, cut to a bound.
    #[error("host `{0}` is not in `access.allowed_hosts`")]
    HostNotAllowed(String),
    /// A web page sent the request.
    #[error("requests of web pages are refused, unless `access.allowed_origins` has their origin")]
    OriginNotAllowed,
    /// No client token, or an unknown one: deliberately the same for both.
    #[error("a valid client token is required")]
    ClientTokenInvalid,
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

/// An answer of upstream that is an error.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers, without hop-by-hop ones.
    pub head: response::Parts,
    /// The body as it came.
    pub body: SyncWrapper<Body>,
}

/// An answer that may come although its client was told that none did.
pub struct LateAnswer(SyncWrapper<Exchange>);

/// Waits for an answer.
type Exchange = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

/// What the log tells of an error.
#[derive(Debug)]
pub struct Failure {
    /// The code of the body.
    pub code: i64,
    /// [`Error::kind`].
    pub kind: &'static str,
    /// The error and its causes.
    pub cause: String,
    /// Kling's name for the request, which its support asks for.
    pub upstream_request_id: Option<String>,
}

/// What the proxy may do about a failed attempt: the table of resending in docs/errors.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resend {
    /// Nothing: it would fail again, or a second one would cost.
    Never,
    /// Send a read again. A create may have worked.
    Reads,
    /// Send anything again: nothing was sent.
    Unsent,
    /// Send anything again, later: it was refused before a task existed.
    Refused,
    /// Send anything again, once, with a token minted by the corrected clock.
    NewToken,
}

// === impl Error ===

impl Error {
    /// The code of a request that is not well formed.
    pub const MALFORMED: i64 = 9000;

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

    /// The number in the body's `code`.
    pub fn code(&self) -> i64 {
        match self {
            Self::BadRequest(_) | Self::BodyCutOff => Self::MALFORMED,
            Self::HostNotAllowed(_) => 9001,
            Self::OriginNotAllowed => 9002,
            Self::ClientTokenInvalid => 9003,
            Self::PathNotAllowed => 9004,
            Self::MethodNotAllowed => 9005,
            Self::BodyTooLarge { .. } => 9006,
            Self::NotFound => 9007,
            Self::ClientTooSlow(_) => 9008,
            Self::Unreachable(_) | Self::EgressRefused(_) => 9101,
            Self::UpstreamTimeout { .. } => 9102,
            Self::BadResponse { .. } | Self::NotHttp(_) => 9103,
            Self::Disconnected(_) | Self::ShutDown => 9104,
            Self::Credentials(_) => 9201,
            Self::Overloaded(_) => 9301,
            Self::Draining => 9302,
            Self::Service { envelope, .. } => envelope.code,
        }
    }

    /// What is known of the code.
    pub fn row(&self) -> &'static Row {
        match self {
            Self::Service { envelope, .. } => service_code::sent_by_kling(envelope.code),
            _ => service_code::find(self.code()).unwrap_or(&service_code::UNKNOWN),
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

    /// Upstream's status, where nothing else tells what its answer means.
    fn bare_status(&self) -> Option<StatusCode> {
        let answer = match self {
            Self::BadResponse { answer, .. } => answer,
            Self::Service { answer, .. } if *self.row() == service_code::UNKNOWN => answer,
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
            None => self.row().retry.allows(effect),
        }
    }

    /// Returns true if no task can have come of a create that failed so, and it may be sent again.
    pub fn proves_no_task(&self) -> bool {
        if let Self::EgressRefused(_) = self {
            return true;
        }
        match self.resend() {
            Resend::Unsent | Resend::Refused | Resend::NewToken => true,
            Resend::Never | Resend::Reads => false,
        }
    }

    /// Whether the proxy itself may send the same request again.
    ///
    /// Narrower than [`retryable`](Self::retryable), which advises clients.
    pub fn resend(&self) -> Resend {
        match self {
            Self::Unreachable(_) => Resend::Unsent,
            Self::UpstreamTimeout { .. } | Self::Disconnected(_) | Self::ShutDown => Resend::Reads,
            Self::BadResponse { answer, .. } => match answer.head.status {
                StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT => Resend::Reads,
                _ => Resend::Never,
            },
            Self::Service { envelope, .. } => match envelope.code {
                1003 | 1004 => Resend::NewToken,
                1302 | 1303 => Resend::Refused,
                5000..=5002 => Resend::Reads,
                _ => Resend::Never,
            },
            Self::BadRequest(_)
            | Self::HostNotAllowed(_)
            | Self::OriginNotAllowed
            | Self::ClientTokenInvalid
            | Self::PathNotAllowed
            | Self::MethodNotAllowed
            | Self::BodyTooLarge { .. }
            | Self::BodyCutOff
            | Self::NotFound
            | Self::ClientTooSlow(_)
            | Self::EgressRefused(_)
            | Self::NotHttp(_)
            | Self::Credentials(_)
            | Self::Overloaded(_)
            | Self::Draining => Resend::Never,
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

// === impl Failure ===

impl From<&Error> for Failure {
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

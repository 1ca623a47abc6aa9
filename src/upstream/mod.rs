//! The client for Kling. It sends a request over a kept or a new connection, and returns a response whose
//! body passes unchanged, or a typed error.
//!
//! Each thread has an [`Upstream`] of its own, so that connections are neither shared nor woken across
//! threads. The one exception is the warm connection, which is ready for all threads.
//!
//! hyper's connections are used directly, without a pooling client. Such a connection hands a request back
//! if, and only if, nothing of it was sent. This decides if a create request may be sent again.

mod answer;
mod clock;
mod clock_reading;
mod connect;
mod dial;
mod download;
mod egress;
mod empty_frames;
mod flush;
mod http2;
mod incoming;
mod origin;
mod pool;
mod request_class;
mod send_error;
mod tcp;
mod text;
mod timeouts;
mod trust;
mod upload;
mod warm;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures_util::FutureExt;
use http::header::{HOST, USER_AGENT};
use http::{HeaderValue, Method, Version};
use tokio::time::{Instant, sleep};
use tower::Service;

pub use self::clock::UpstreamClock;
pub use self::clock_reading::{ClockReading, shifted};
pub use self::dial::{Dial, Dialing, Network, NoHttp1, Transport, Versions};
pub use self::egress::{EgressProxy, NoEgressProxy, TunnelError};
pub use self::origin::Origin;
pub use self::text::Decoder;
pub use self::timeouts::Timeouts;
pub use self::trust::{TlsError, client_config, client_config_with, trust_roots};

use self::answer::Verdict;
use self::connect::{Connection, Connector, Sent};
use self::download::{Download, Lease};
use self::incoming::Incoming;
use self::pool::Pool;
use self::request_class::RequestClass;
use self::send_error::SendError;
use self::upload::{Progress, Upload};
use self::warm::WarmConnection;
use crate::clock::{Clock, Correction};
use crate::error::{Answer, BoxError, Error, LateAnswer, chain};
use crate::kling::service_code::Class;
use crate::request::headers::NAME;
use crate::request::replayable::{Attempt, AttemptedCreate};
use crate::telemetry::metrics::Metrics;

/// Delay of the warm-up request. A client's request that comes at once goes first, because two handshakes at
/// a time would slow it down.
const HEAD_START: Duration = Duration::from_millis(100);

/// Sends requests to the one upstream.
#[derive(Clone)]
pub struct Upstream(Arc<UpstreamInner>);

/// State that all requests of one [`Upstream`] share.
#[derive(Clone)]
struct UpstreamInner {
    pool: Arc<Pool>,
    warm: Arc<WarmConnection>,
    timeouts: Timeouts,
    /// Clock that learns from responses. `None` without TLS, because such responses are not authenticated.
    learner: Option<Arc<UpstreamClock>>,
    metrics: Arc<Metrics>,
}

/// One attempt to send a request, while it runs.
struct Exchange {
    inner: Arc<UpstreamInner>,
    class: RequestClass,
    progress: Arc<Progress>,
    /// The create that is sent; `None` for a read. Boxed, so that a read does not reserve room for it.
    create: Option<Box<AttemptedCreate>>,
}

/// Outcome of a request on one connection: a response; or, if nothing of the request was sent, the request
/// itself and the cause.
type Sending = Result<http::Response<Download>, (Box<Request>, BoxError)>;

// === impl Upstream ===

impl Upstream {
    /// Creates the instance that keeps the warm connection for all threads. It starts without a connection.
    /// `dial` must lead to `origin`.
    pub fn new(
        origin: &Origin,
        dial: Arc<dyn Dial>,
        timeouts: Timeouts,
        clock: Arc<dyn Clock>,
        upstream_clock: Arc<UpstreamClock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let connector = Connector::new(dial, origin);
        let warm = WarmConnection::new(Pool::new(connector, timeouts.connect, clock).warm());
        Self(Arc::new(UpstreamInner {
            pool: Arc::clone(warm.pool()),
            warm: Arc::new(warm),
            timeouts,
            learner: origin.is_secure().then_some(upstream_clock),
            metrics,
        }))
    }

    /// Creates an instance for another thread, with connections of its own.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        Self(Arc::new(UpstreamInner {
            pool: Arc::new(self.0.pool.for_thread()),
            ..UpstreamInner::clone(&self.0)
        }))
    }

    /// Sends a `HEAD` request without a credential, to learn upstream's clock, and to be connected when the
    /// first request comes. Logs the outcome.
    ///
    /// A client's request that comes meanwhile does not wait for this. If its token is wrong because
    /// upstream's clock is not known yet, it is sent again.
    pub async fn warm_up(&self) {
        sleep(HEAD_START).await;
        let mut request = Request::new(Body::empty());
        *request.method_mut() = Method::HEAD;
        let headers = request.headers_mut();
        headers.insert(HOST, self.0.pool.host());
        headers.insert(USER_AGENT, HeaderValue::from_static(NAME));
        let attempt = Attempt {
            request,
            create: None,
            minted_by: None,
        };
        match Arc::clone(&self.0).forward(attempt).await {
            Err(error) if error.answer().is_none() => {
                tracing::info!(error = chain(&error), "upstream does not answer yet");
            }
            // Any response, also an error, shows that upstream is there.
            Ok(_) | Err(_) => tracing::debug!("connected to upstream"),
        }
    }

    /// Keeps a connection ready until no request has come for `warm`, and again after the next request.
    pub async fn keep_warm(&self, warm: Duration) {
        self.0.warm.keep(warm).await;
    }
}

// === impl UpstreamInner ===

impl UpstreamInner {
    /// Sends a request and judges its response.
    ///
    /// Usually a connection is ready, and a read is sent before this function returns. So the returned future
    /// need not hold the request. Its size matters: the first-level cache of a core should hold the futures
    /// of 32 requests at a time.
    fn forward(
        self: Arc<Self>,
        attempt: Attempt,
    ) -> impl Future<Output = Result<Response, Error>> + use<> {
        let Attempt {
            request,
            create,
            minted_by,
        } = attempt;
        let now = Instant::now();
        self.warm.note(now);
        let (class, in_flight) = self.pool.in_flight().begin(request.body());
        let (request, progress) = Upload::record(request, now, in_flight);
        let kept = match create {
            None => self.pool.checkout(class),
            Some(_) => None,
        };
        let first = match kept {
            Some(mut connection) => {
                let sent = connection.send(request, &progress);
                Ok((connection, sent))
            }
            None => Err(Box::new(request)),
        };
        let exchange = Exchange {
            inner: self,
            class,
            progress,
            create: create.map(Box::new),
        };
        async move {
            let outcome = match exchange.answer(first).await {
                Ok(mut answer) => {
                    let verdict = answer::judge(&mut answer).await;
                    let is_done = matches!(verdict, Verdict::Done);
                    let outcome = pass(answer, verdict);
                    exchange.learn(&outcome, is_done, minted_by);
                    outcome
                }
                // If the client's body failed, that is the cause. Upstream's error only follows from it.
                Err(error) => Err(exchange.progress.take_fault().unwrap_or(error)),
            };
            if let (Some(create), Err(error)) = (&exchange.create, &outcome)
                && error.proves_no_task()
            {
                create.not_created();
            }
            outcome
        }
    }

    /// Returns a kept connection, and the pool that it goes back to: this thread's pool, or else the warm
    /// one.
    async fn checkout(&self, class: RequestClass) -> Option<(Connection, &Arc<Pool>)> {
        if let Some(connection) = self.pool.checkout(class) {
            return Some((connection, &self.pool));
        }
        let connection = Box::pin(self.warm.pool().checkout_shared(class)).await?;
        self.pool.note_miss(class);
        Some((connection, self.warm.pool()))
    }
}

// === impl Exchange ===

impl Exchange {
    /// Returns the response on the first connection, if there was one, else on the next.
    async fn answer(
        &self,
        first: Result<(Connection, Sent), Box<Request>>,
    ) -> Result<http::Response<Download>, Error> {
        let request = match first {
            Ok((connection, sent)) => {
                match self.wait(sent, (connection, &self.inner.pool)).await? {
                    Ok(answer) => return Ok(answer),
                    Err((unsent, _)) => unsent,
                }
            }
            Err(request) => request,
        };
        Box::pin(self.send(request)).await
    }

    /// Sends on kept connections as long as they hand the request back unsent, and then on a new one.
    async fn send(&self, mut request: Box<Request>) -> Result<http::Response<Download>, Error> {
        loop {
            let checkout = self.inner.checkout(self.class).await;
            let kept = checkout.is_some();
            let (mut connection, home) = if let Some(checkout) = checkout {
                checkout
            } else {
                let connected = self.inner.pool.connect(self.class).await;
                (connected.map_err(unreachable)?, &self.inner.pool)
            };
            // An attempt over HTTP/2 removes this header, and the next connection may be one of HTTP/1.1.
            request.headers_mut().insert(HOST, self.inner.pool.host());
            if let Some(create) = &self.create {
                let begun = create.begin_sending().await;
                begun.map_err(|left| Error::Unreachable(left.into()))?;
            }
            self.progress.restart();
            let sent = connection.send(*request, &self.progress);
            match self.wait(sent, (connection, home)).await? {
                Ok(answer) => return Ok(answer),
                Err((unsent, _)) if kept => request = unsent,
                Err((_, error)) => return Err(Error::Unreachable(error)),
            }
        }
    }

    /// Lets the clock learn from a response. `minted_by` is the clock correction by which the token of the
    /// request was minted, if it had such a token.
    fn learn(
        &self,
        answer: &Result<Response, Error>,
        is_done: bool,
        minted_by: Option<Correction>,
    ) {
        let Some(clock) = &self.inner.learner else {
            return;
        };
        let asked = self.progress.since();
        match answer {
            Ok(answer) => {
                if is_done && let Some(correction) = minted_by {
                    clock.accepted(correction);
                }
                clock.learn(answer.headers(), asked);
            }
            Err(error) => {
                let Some(answer) = error.answer() else { return };
                let headers = &answer.head.headers;
                match minted_by {
                    Some(correction) if error.row().class == Class::TokenTime => {
                        clock.refused(correction, headers, asked);
                    }
                    _ => clock.learn(headers, asked),
                }
            }
        }
    }

    /// Waits for the response to a request that was sent on a connection. The connection then goes back to
    /// `home`, the pool that it came from.
    async fn wait(
        &self,
        mut sent: Sent,
        (connection, home): (Connection, &Arc<Pool>),
    ) -> Result<Sending, Error> {
        let answered = match self
            .progress
            .supervise(&mut sent, self.inner.timeouts)
            .await
        {
            Ok(answered) => answered,
            Err(error) => return Err(self.give_up(error, sent, connection, home)),
        };
        match answered {
            Ok(answer) => Ok(Ok(self.lease(answer, connection, home))),
            Err(SendError::Unsent(unsent, error)) => {
                if let Some(create) = &self.create {
                    create.not_created();
                }
                Ok(Err((unsent, error)))
            }
            Err(error) => Err(error.into_error()),
        }
    }

    /// Ends an exchange that took too long. Nothing more of the request is sent. If all of a create was sent,
    /// its response may still come.
    fn give_up(&self, error: Error, sent: Sent, connection: Connection, home: &Arc<Pool>) -> Error {
        let Error::UpstreamTimeout { limit, .. } = error else {
            self.progress.abandon();
            return error;
        };
        connection.retire();
        let was_sent = self.progress.is_done() && connection.is_flushed();
        if self.create.is_none() || !was_sent {
            self.progress.abandon();
            return error;
        }
        let lease = Lease::new(Arc::clone(home), connection, Arc::clone(&self.progress));
        let idle = self.inner.timeouts.idle;
        let late = LateAnswer::new(async move {
            let answer = sent.await.map_err(SendError::into_error)?;
            let mut answer = answer.map(|body| Download::new(body, lease, idle));
            let verdict = answer::judge(&mut answer).await;
            pass(answer, verdict)
        });
        Error::UpstreamTimeout {
            limit,
            late: Some(late),
        }
    }

    fn lease(
        &self,
        answer: http::Response<Incoming>,
        connection: Connection,
        home: &Arc<Pool>,
    ) -> http::Response<Download> {
        let lease = Lease::new(Arc::clone(home), connection, Arc::clone(&self.progress));
        let idle = self.inner.timeouts.idle;
        answer.map(|body| Download::new(body, lease, idle))
    }
}

impl Service<Attempt> for Upstream {
    type Response = Response;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, attempt: Attempt) -> Self::Future {
        let [inner, counting] = [(); 2].map(|()| Arc::clone(&self.0));
        let count = move |outcome: &Result<_, Error>| {
            let error = outcome.as_ref().err().map(Error::kind);
            counting.metrics.attempted(error);
        };
        Box::pin(inner.forward(attempt).inspect(count))
    }
}

/// Turns a judged response into the outcome of the request.
fn pass(mut answer: http::Response<Download>, verdict: Verdict) -> Result<Response, Error> {
    if answer.status().is_informational() {
        return Err(Error::NotHttp("upstream switched protocols unasked".into()));
    }
    // The HTTP version that upstream speaks does not concern the client.
    *answer.version_mut() = Version::HTTP_11;
    let answer = answer.map(Body::new);
    match verdict {
        Verdict::Done | Verdict::Success => Ok(answer),
        Verdict::Service(envelope) => Err(Error::Service {
            answer: Answer::boxed(answer),
            envelope,
        }),
        Verdict::Bare { excerpt, is_bare } => Err(Error::BadResponse {
            answer: Answer::boxed(answer),
            excerpt,
            is_bare,
        }),
        Verdict::Broken(failure) => Err(download::broken(failure)),
    }
}

/// Returns the error of a request for which no connection could be made.
fn unreachable(cause: BoxError) -> Error {
    match egress::final_status(&cause) {
        Some(status) => Error::EgressRefused(status),
        None => Error::Unreachable(cause),
    }
}

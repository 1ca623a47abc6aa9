//! The inner to Kling: sends a request over a kept or new connection, and answers with a response
//! that passes as it came, or with a typed error.
//!
//! One [`Upstream`] belongs to one thread, so that connections are neither shared nor woken across
//! threads; but for one connection, which is ready for all. hyper's connections are used directly
//! rather than through a pooling client: those hand a request back when, and only when, nothing of
//! it was sent, which is what decides whether a create may be sent again.

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
pub use self::origin::{NAME, Origin};
pub use self::text::Decoder;
pub use self::timeouts::Timeouts;
pub use self::trust::{TlsError, client_config, trust_roots};

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
use crate::request::replayable::{Attempt, AttemptedCreate};
use crate::telemetry::metrics::Metrics;

/// A request that comes at once goes first: two handshakes at a time would slow it down.
const HEAD_START: Duration = Duration::from_millis(100);

/// Sends requests to the one upstream.
#[derive(Clone)]
pub struct Upstream(Arc<UpstreamInner>);

/// What sends them.
#[derive(Clone)]
struct UpstreamInner {
    pool: Arc<Pool>,
    warm: Arc<WarmConnection>,
    timeouts: Timeouts,
    /// Where answers teach the time. Nobody vouches for what comes without TLS.
    learner: Option<Arc<UpstreamClock>>,
    metrics: Arc<Metrics>,
}

/// One attempt to send a request, while it runs.
struct Exchange {
    inner: Arc<UpstreamInner>,
    class: RequestClass,
    progress: Arc<Progress>,
    /// For a create. Boxed, since a read has no use for its room.
    create: Option<Box<AttemptedCreate>>,
}

/// What came of a request on one connection: an answer; or, if nothing of it was sent, the request
/// again and why.
type Sending = Result<http::Response<Download>, (Box<Request>, BoxError)>;

// === impl Upstream ===

impl Upstream {
    /// The one that keeps the connection for all. It starts without one. `dial` leads to `origin`.
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

    /// One for another thread, with connections of its own.
    #[must_use]
    pub fn for_thread(&self) -> Self {
        Self(Arc::new(UpstreamInner {
            pool: Arc::new(self.0.pool.for_thread()),
            ..UpstreamInner::clone(&self.0)
        }))
    }

    /// Asks upstream for nothing, without a credential: to learn its clock, and to be connected
    /// when the first request comes. Tells the log what came of it.
    ///
    /// A request that comes meanwhile does not wait for this: should its token be wrong, it is sent
    /// again.
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
            // Whatever it was: upstream is there.
            Ok(_) | Err(_) => tracing::debug!("connected to upstream"),
        }
    }

    /// Keeps a connection ready until nobody has asked for this long, and again once somebody does.
    pub async fn keep_warm(&self, warm: Duration) {
        self.0.warm.keep(warm).await;
    }
}

// === impl UpstreamInner ===

impl UpstreamInner {
    /// Sends a request and judges its answer.
    ///
    /// Mostly there is a connection, and a read leaves on it at once: what waits for the answer has no
    /// room for a request. Of 32 at a time each byte counts, for a core's first cache to hold them.
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
                // The client's fault is the cause; what upstream made of it only follows from that.
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

    /// A kept connection, and where it goes back to: our own, or else the warm one.
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
    /// The answer on the first connection, if there was one, or on the next.
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

    /// Sends on kept connections for as long as they hand the request back unsent, then on a new
    /// one.
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
            // HTTP/2 takes it away, and the next connection may speak HTTP/1.1.
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

    /// Has the clock learn from what upstream answered to a token that was minted by this correction, if
    /// it was shown one.
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

    /// Waits for the answer to what was sent on a connection, which goes back to where it comes from.
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

    /// Ends an exchange that took too long. Nothing more of the request is sent. If all of a create was
    /// sent, its answer may still come.
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

/// The outcome of an answer.
fn pass(mut answer: http::Response<Download>, verdict: Verdict) -> Result<Response, Error> {
    if answer.status().is_informational() {
        return Err(Error::NotHttp("upstream switched protocols unasked".into()));
    }
    // What upstream speaks is no concern of the client.
    *answer.version_mut() = Version::HTTP_11;
    let answer = answer.map(Body::new);
    match verdict {
        Verdict::Done | Verdict::Success => Ok(answer),
        Verdict::Service(envelope) => Err(Error::Service {
            answer: Answer::boxed(answer),
            envelope,
        }),
        Verdict::Bare(excerpt) => Err(Error::BadResponse {
            answer: Answer::boxed(answer),
            excerpt,
        }),
        Verdict::Broken(failure) => Err(download::broken(failure)),
    }
}

/// The error of a request for which there is no connection.
fn unreachable(cause: BoxError) -> Error {
    match egress::final_status(&cause) {
        Some(status) => Error::EgressRefused(status),
        None => Error::Unreachable(cause),
    }
}

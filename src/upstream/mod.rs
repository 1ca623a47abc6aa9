//! The way to Kling: sends a request over a kept or new connection, and answers with a response
//! that passes as it came, or with a typed error.
//!
//! One [`Upstream`] belongs to one thread, so that connections are neither shared nor woken across
//! threads. hyper's connections are used directly rather than through a pooling client: those hand
//! a request back when, and only when, nothing of it was sent, which is what decides whether a
//! create may be sent again.

mod answer;
mod clock;
mod connect;
mod download;
mod pool;
mod text;
mod upload;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::Request;
use axum::response::Response;
use http::Version;
use hyper::body::Incoming;
use tower::Service;

pub use self::clock::UpstreamClock;
pub use self::connect::{Origin, OriginError, TlsError, client_config};

use self::connect::Connector;
use self::download::{Download, Lease};
use self::pool::Pool;
use self::upload::{Progress, Upload};
use crate::clock::Clock;
use crate::effect::Effect;
use crate::error::{Error, Resend};
use crate::facts::Facts;
use crate::headers;
use crate::metrics::Metrics;

/// How long upstream may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Name resolution, TCP and TLS together.
    pub connect: Duration,
    /// From the last byte of a request to the head of its answer.
    pub response: Duration,
    /// Longest silence inside a body, either way.
    pub idle: Duration,
}

/// Sends requests to the one upstream.
#[derive(Clone)]
pub struct Upstream {
    pool: Arc<Pool>,
    timeouts: Timeouts,
    /// Where answers teach the time. Nobody vouches for what comes without TLS.
    learner: Option<Arc<UpstreamClock>>,
    metrics: Arc<Metrics>,
}

// === impl Upstream ===

impl Upstream {
    /// Starts without a connection: the first request makes one.
    pub fn new(
        origin: &Origin,
        tls: rustls::ClientConfig,
        timeouts: Timeouts,
        clock: Arc<dyn Clock>,
        upstream_clock: Arc<UpstreamClock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let connector = Connector::new(origin, tls, timeouts.idle);
        Self {
            pool: Arc::new(Pool::new(connector, timeouts.connect, clock)),
            timeouts,
            learner: origin.is_secure().then_some(upstream_clock),
            metrics,
        }
    }

    async fn forward(&self, request: Request) -> Result<Response, Error> {
        let (effect, facts) = (
            Effect::of(&request),
            Facts::of(request.extensions()).cloned(),
        );
        let (request, progress) = Upload::record(request);
        let response = match self.send(request, &progress).await {
            Ok(response) => response,
            // The client's fault is the cause; what upstream made of it only follows from that.
            Err(error) => return Err(progress.take_fault().unwrap_or(error)),
        };
        let (mut head, body) = response.into_parts();
        if head.status.is_informational() {
            return Err(Error::NotHttp("upstream switched protocols unasked".into()));
        }
        let learner = self.learner.as_deref();
        let reading = learner.and_then(|clock| clock.read(&head.headers, progress.since()));
        headers::strip_response(&mut head.headers);
        // What upstream speaks is no concern of the client.
        head.version = Version::HTTP_11;
        let created = facts.as_ref().filter(|_| effect == Effect::Create);
        let judged = answer::judge(head, body, created).await;
        if let (Some(clock), Some(reading)) = (learner, reading) {
            match &judged {
                // The token was refused for its time: that was not upstream's.
                Err(error) if error.resend() == Resend::NewToken => clock.relearn(reading),
                _ => clock.learn(reading),
            }
        }
        judged
    }

    /// Sends on kept connections for as long as they hand the request back unsent, then on a new
    /// one.
    async fn send(
        &self,
        mut request: Request,
        progress: &Arc<Progress>,
    ) -> Result<http::Response<Download>, Error> {
        loop {
            let (mut connection, kept) = match self.pool.checkout() {
                Some(connection) => (connection, true),
                None => (
                    self.pool.connect().await.map_err(Error::Unreachable)?,
                    false,
                ),
            };
            let sent = connection.send(request);
            match progress.supervise(sent, self.timeouts).await? {
                Ok(response) => {
                    let lease = Lease::new(Arc::clone(&self.pool), connection, progress);
                    let idle = self.timeouts.idle;
                    return Ok(response.map(|body: Incoming| Download::new(body, lease, idle)));
                }
                Err(mut refused) => match refused.take_message() {
                    Some(unsent) if kept => request = unsent,
                    Some(_) => return Err(Error::Unreachable(refused.into_error().into())),
                    None => return Err(classify(refused.into_error())),
                },
            }
        }
    }
}

impl Service<Request> for Upstream {
    type Response = Response;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let this = self.clone();
        if let Some(facts) = Facts::of(request.extensions()) {
            facts.attempted();
        }
        Box::pin(async move {
            let metrics = Arc::clone(&this.metrics);
            let result = this.forward(request).await;
            metrics.attempted(result.as_ref().err().map(Error::kind));
            result
        })
    }
}

/// What a failure means after something may have been sent.
fn classify(error: hyper::Error) -> Error {
    if error.is_parse() {
        Error::NotHttp(error.into())
    } else {
        Error::Disconnected(error.into())
    }
}

//! One id, one span, one outcome and one count for each request, refused ones included. It adds the
//! id to the answer and changes nothing else.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderName, Method, Uri};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};
use tracing::Span;

use crate::effect::Effect;
use crate::facts::{Facts, Inbound};
use crate::metrics::{Metrics, method_label};
use crate::request_id::RequestId;
use crate::telemetry::{printable, unhurried};

/// Names the request in its answer.
const REQUEST_ID: HeaderName = HeaderName::from_static("kling-proxy-request-id");

/// Adds [`Trace`] to a service.
#[derive(Clone)]
pub struct TraceLayer {
    metrics: Arc<Metrics>,
}

/// Accompanies each request from its head to the end of its answer.
#[derive(Clone)]
pub struct Trace<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

pin_project! {
    /// Waits for the answer, inside the request's span.
    pub struct TraceFuture<F> {
        #[pin]
        inner: F,
        request: Unanswered,
    }
}

/// What is kept of a request until it is answered.
struct Unanswered {
    facts: Facts,
    span: Span,
    method: Method,
    uri: Uri,
    effect: Effect,
    answered: bool,
}

pin_project! {
    /// A body that counts its request as in flight until it is dropped.
    pub struct Counted {
        #[pin]
        body: Body,
        facts: Facts,
    }
}

// === impl TraceLayer ===

impl TraceLayer {
    /// Counts in `metrics`.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics }
    }
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace {
            inner,
            metrics: Arc::clone(&self.metrics),
        }
    }
}

// === impl Trace ===

impl<S> Service<Request> for Trace<S>
where
    S: Service<Inbound, Response = Response, Error = Infallible>,
{
    type Response = http::Response<Counted>;
    type Error = Infallible;
    type Future = TraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let facts = Facts::new(RequestId::of(request.headers()), self.metrics.enter());
        let effect = Effect::of(&request);
        // Formatting a span for each poll would cost more than the guard, so it is there for those
        // who look for details; the outcome names the request itself.
        let span = tracing::debug_span!("request", id = facts.id().as_str());
        let unanswered = Unanswered {
            facts: facts.clone(),
            span,
            method: request.method().clone(),
            uri: request.uri().clone(),
            effect,
            answered: false,
        };
        let facts = Some(facts);
        let inbound = Inbound { request, facts };
        let inner = unanswered.span.in_scope(|| self.inner.call(inbound));
        TraceFuture {
            inner,
            request: unanswered,
        }
    }
}

// === impl TraceFuture ===

impl<F> Future for TraceFuture<F>
where
    F: Future<Output = Result<Response, Infallible>>,
{
    type Output = Result<http::Response<Counted>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let entered = this.request.span.enter();
        let Ok(mut response) = ready!(this.inner.poll(cx));
        this.request.log(&response);
        drop(entered);

        let request = this.request;
        let after = request.facts.begun().elapsed();
        let metrics = request.facts.metrics();
        metrics.answered(&request.method, response.status(), after);
        response
            .headers_mut()
            .insert(REQUEST_ID, request.facts.id().clone().into_value());
        request.answered = true;
        let facts = request.facts.clone();
        Poll::Ready(Ok(response.map(|body| Counted { body, facts })))
    }
}

// === impl Unanswered ===

impl Unanswered {
    /// One event an outcome. Reads that went well are many and say little.
    fn log(&self, response: &Response) {
        /// The event is complete in itself: the span is there at `debug` only.
        macro_rules! event {
            ($level:ident, $($more:tt)*) => {
                tracing::$level!(
                    request_id = self.facts.id().as_str(),
                    client = self.facts.client(),
                    http.request.method = method_label(&self.method),
                    url.path = &*printable(self.uri.path()),
                    http.request.resend_count = self.facts.resend_count(),
                    http.response.status_code = response.status().as_u16(),
                    duration_seconds = self.facts.begun().elapsed().as_secs_f64(),
                    $($more)*
                )
            };
        }
        match (self.facts.failure(), self.effect) {
            (Some(failure), effect) => {
                let upstream_id = failure.upstream_request_id.as_deref().map(printable);
                let log = || {
                    event!(
                        warn,
                        error.type = failure.kind,
                        error.code = failure.code,
                        error.cause = &*printable(&failure.cause),
                        upstream.request_id = upstream_id.as_deref(),
                        "failed"
                    );
                };
                match effect {
                    Effect::Read => unhurried(log),
                    Effect::Create => log(),
                }
            }
            (None, Effect::Create) => {
                let task = self.facts.task();
                event!(
                    info,
                    task.id = task
                        .and_then(|task| task.id.as_deref())
                        .map(printable)
                        .as_deref(),
                    "answered"
                );
            }
            (None, Effect::Read) => event!(debug, "answered"),
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        // `carry` tells what comes of a create.
        tracing::debug!(
            request_id = self.facts.id().as_str(),
            client = self.facts.client(),
            url.path = &*printable(self.uri.path()),
            "the client has gone before its answer"
        );
    }
}

// === impl Counted ===

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

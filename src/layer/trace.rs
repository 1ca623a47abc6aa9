//! Gives each request one id, one span, one outcome and one count, refused requests included. It adds
//! the id to the response and changes nothing else.

use std::borrow::Cow;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderName, Method, StatusCode, Uri};
use http_body::{Body as _, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};
use tracing::Span;

use crate::error::FailureRecord;
use crate::kling::idempotency::Effect;
use crate::request::context::{ProxyRequest, RequestContext};
use crate::request::id::RequestId;
use crate::telemetry::metrics::{Metrics, method_label};
use crate::telemetry::{CREATES, INTERIM, READS, printable};

/// Response header with the id of the request.
const REQUEST_ID: HeaderName = HeaderName::from_static("kling-proxy-request-id");
/// Response header with the proxy's own id of a create.
const TASK: HeaderName = HeaderName::from_static("kling-proxy-task");

/// Adds [`Trace`] to a service.
#[derive(Clone)]
pub struct TraceLayer {
    metrics: Arc<Metrics>,
}

/// Counts and logs each request, from its head to the end of its response.
#[derive(Clone)]
pub struct Trace<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

pin_project! {
    /// Waits for the response, inside the span of the request.
    pub struct TraceFuture<F> {
        #[pin]
        inner: F,
        request: Unanswered,
    }
}

/// State of a request until its response. Its drop logs a client that disconnects before that.
struct Unanswered {
    subject: Subject,
    span: Span,
    effect: Effect,
    answered: bool,
}

/// Fields of a request that its log lines show.
#[derive(Clone)]
struct Subject {
    context: RequestContext,
    method: Method,
    uri: Uri,
}

pin_project! {
    /// Response body that counts its request as in flight until it is dropped.
    pub struct Counted {
        #[pin]
        body: Body,
        context: RequestContext,
        // Set for a create whose log line waits until the task is known.
        unlogged: Option<Box<(Subject, StatusCode)>>,
    }
}

// === impl TraceLayer ===

impl TraceLayer {
    /// Makes a layer that counts requests in `metrics`.
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
    S: Service<ProxyRequest, Response = Response, Error = Infallible>,
{
    type Response = http::Response<Counted>;
    type Error = Infallible;
    type Future = TraceFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let context = RequestContext::new(RequestId::of(request.headers()), self.metrics.enter());
        let effect = Effect::of(&request);
        // Formatting a span at each poll would cost more than the guard. So the span exists at `debug`
        // only; the log line of the outcome names the request itself.
        let span = tracing::debug_span!("request", id = context.id().as_str());
        let unanswered = Unanswered {
            subject: Subject {
                context: context.clone(),
                method: request.method().clone(),
                uri: request.uri().clone(),
            },
            span,
            effect,
            answered: false,
        };
        let inbound = ProxyRequest { request, context };
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
        let request = this.request;
        let entered = request.span.enter();
        let Ok(mut response) = ready!(this.inner.poll(cx));
        let unlogged = request.log(&response);
        drop(entered);

        let Subject {
            context, method, ..
        } = &request.subject;
        let after = context.begun().elapsed();
        context.metrics().answered(method, response.status(), after);
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, context.id().clone().into_value());
        if let Some(reference) = context.reference() {
            headers.insert(TASK, reference.to_header());
        }
        request.answered = true;
        let context = context.clone();
        Poll::Ready(Ok(response.map(|body| Counted {
            body,
            context,
            unlogged,
        })))
    }
}

// === impl Unanswered ===

impl Unanswered {
    /// Logs the outcome of a request, except that of a successful create: its task may be in a part of
    /// the response that has not arrived yet. Returns the subject and status for that later line.
    fn log(&self, response: &Response) -> Option<Box<(Subject, StatusCode)>> {
        let Self {
            subject, effect, ..
        } = self;
        let status = response.status();
        match (subject.context.failure(), effect) {
            (Some(failure), _) => subject.log_failure(failure, *effect, status),
            (None, Effect::Read) => subject.log_read(status),
            (None, Effect::Create) if response.body().is_end_stream() => {
                subject.log_create(status);
            }
            (None, Effect::Create) => return Some(Box::new((subject.clone(), status))),
        }
        None
    }
}

// === impl Subject ===

/// Logs an event with all fields of the request, because the span exists at `debug` only.
macro_rules! event {
    ($subject:ident, $status:ident, $level:ident, target: $target:expr, $($more:tt)*) => {
        tracing::$level!(
            target: $target,
            request_id = $subject.context.id().as_str(),
            client = $subject.context.client(),
            http.request.method = method_label(&$subject.method),
            url.path = &*printable($subject.uri.path()),
            http.request.resend_count = $subject.context.resend_count(),
            http.response.status_code = $status.as_u16(),
            duration_seconds = $subject.context.begun().elapsed().as_secs_f64(),
            $($more)*
        )
    };
}

impl Subject {
    fn log_failure(&self, failure: &FailureRecord, effect: Effect, status: StatusCode) {
        macro_rules! failed {
            ($target:expr) => {
                event!(
                    self, status, warn, target: $target,
                    task.external_id = self.external_id().as_deref(),
                    error.type = failure.kind,
                    error.code = failure.code,
                    error.cause = &*printable(&failure.cause),
                    upstream.request_id = failure.upstream_request_id.as_deref().map(printable).as_deref(),
                    "failed"
                )
            };
        }
        match effect {
            Effect::Create => failed!(CREATES),
            Effect::Read => failed!(READS),
        }
    }

    /// Logs a successful read at `debug`: there are many of them, and they show little.
    fn log_read(&self, status: StatusCode) {
        event!(self, status, debug, target: READS, "answered");
    }

    fn log_create(&self, status: StatusCode) {
        let task = self.context.task();
        event!(
            self, status, info, target: CREATES,
            task.id = task.and_then(|task| task.id.as_deref()).map(printable).as_deref(),
            task.external_id = self.external_id().as_deref(),
            "answered"
        );
    }

    fn external_id(&self) -> Option<Cow<'_, str>> {
        self.context.external_id().map(printable)
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let Subject { context, uri, .. } = &self.subject;
        macro_rules! gone {
            ($name:expr) => {
                tracing::debug!(
                    name: $name,
                    target: READS,
                    request_id = context.id().as_str(),
                    client = context.client(),
                    url.path = &*printable(uri.path()),
                    "the client has gone before its answer"
                )
            };
        }
        match self.effect {
            // The `detach` layer logs the outcome of a create.
            Effect::Create => gone!(INTERIM),
            Effect::Read => gone!("gone"),
        }
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
        let mut this = self.project();
        let step = ready!(this.body.as_mut().poll_frame(cx));
        if let Some(unlogged) = &this.unlogged {
            let is_over = step.is_none() || this.body.is_end_stream();
            if is_over || this.context.task().is_some() {
                let (subject, status) = &**unlogged;
                subject.log_create(*status);
                *this.unlogged = None;
            } else if let Some(Err(_)) = step {
                // The `detach` layer logs that the response is incomplete.
                *this.unlogged = None;
            }
        }
        Poll::Ready(step)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

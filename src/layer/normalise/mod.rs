//! Turns every error into the one response that docs/errors.md describes. Inside of this layer a
//! request may fail; outside it cannot.

mod body;

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue,
    RETRY_AFTER,
};
use http::{StatusCode, response};
use hyper::ext::ReasonPhrase;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use self::body::ErrorBody;
use crate::error::{Error, FailureRecord};
use crate::kling::idempotency::Effect;
use crate::kling::service_code::{Row, WITH_RETRY_AFTER};
use crate::reloadable::Reloadable;
use crate::request::context::{ProxyRequest, RequestContext};

const ERROR_TYPE: HeaderName = HeaderName::from_static("kling-proxy-error");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const CLOSE: HeaderValue = HeaderValue::from_static("close");

/// Which status an error has (`errors.status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusMapping {
    /// That of the vendor's table.
    Documented,
    /// Another than 429 where sending again cannot help, for clients that retry every 429.
    Actionable,
}

/// Which body an error of upstream has (`errors.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorBodyFormat {
    /// Ours.
    Kling,
    /// Upstream's, untouched, with its status; our headers are added.
    Upstream,
}

/// How errors look (`errors.*`).
#[derive(Clone, Copy, Debug)]
pub struct ErrorFormat {
    /// See [`StatusMapping`].
    pub statuses: StatusMapping,
    /// See [`ErrorBodyFormat`].
    pub format: ErrorBodyFormat,
}

/// Adds [`Normalise`] to a service.
#[derive(Clone)]
pub struct NormaliseLayer {
    format_: Reloadable<ErrorFormat>,
}

/// Answers errors.
#[derive(Clone)]
pub struct Normalise<S> {
    inner: S,
    format_: Reloadable<ErrorFormat>,
}

pin_project! {
    /// Waits for the answer or the error.
    pub struct NormaliseFuture<F> {
        #[pin]
        inner: F,
        format_: ErrorFormat,
        effect: Effect,
        context: RequestContext,
    }
}

// === impl NormaliseLayer ===

impl NormaliseLayer {
    /// Makes errors look as `format_` says when they are answered.
    pub fn new(format_: Reloadable<ErrorFormat>) -> Self {
        Self { format_ }
    }
}

impl<S> Layer<S> for NormaliseLayer {
    type Service = Normalise<S>;

    fn layer(&self, inner: S) -> Normalise<S> {
        Normalise {
            inner,
            format_: self.format_.clone(),
        }
    }
}

// === impl ErrorFormat ===

impl ErrorFormat {
    fn respond(self, error: Error, effect: Effect, context: &RequestContext) -> Response {
        context.failed(FailureRecord::from(&error));
        let row = error.row();
        let retryable = error.retryable(effect);
        let status = match self.statuses {
            StatusMapping::Documented => error.status(),
            StatusMapping::Actionable => error.actionable_status(),
        };
        let json = ErrorBody::new(&error, effect, context).render();
        let (mut head, body) = match (self.format, error.into_answer()) {
            (ErrorBodyFormat::Upstream, Some(answer)) => (answer.head, answer.body.into_inner()),
            (_, Some(answer)) => (ours(answer.head, status), Body::from(json)),
            (_, None) => (
                ours(Response::new(()).into_parts().0, status),
                Body::from(json),
            ),
        };
        advise(&mut head, row, retryable);
        if row.closes_connection {
            head.headers.insert(CONNECTION, CLOSE);
        }
        Response::from_parts(head, body)
    }
}

// === impl Normalise ===

impl<S> Service<ProxyRequest> for Normalise<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = NormaliseFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Every layer inside is ready always: what limits requests answers them.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, inbound: ProxyRequest) -> Self::Future {
        NormaliseFuture {
            format_: **self.format_.load(),
            effect: Effect::of(&inbound.request),
            context: inbound.context.clone(),
            inner: self.inner.call(inbound),
        }
    }
}

// === impl NormaliseFuture ===

impl<F> Future for NormaliseFuture<F>
where
    F: Future<Output = Result<Response, Error>>,
{
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Poll::Ready(Ok(match ready!(this.inner.poll(cx)) {
            Ok(response) => response,
            Err(error) => this.format_.respond(error, *this.effect, this.context),
        }))
    }
}

/// Makes a head, upstream's or a new one, that of our body.
fn ours(mut head: response::Parts, status: StatusCode) -> response::Parts {
    head.status = status;
    // Upstream's words for its own status.
    head.extensions.remove::<ReasonPhrase>();
    head.headers.remove(CONTENT_LENGTH);
    head.headers.remove(CONTENT_ENCODING);
    head.headers.insert(CONTENT_TYPE, JSON);
    head
}

/// Says besides the body what failed, and whether and when to send again.
fn advise(head: &mut response::Parts, row: &'static Row, retryable: bool) {
    let should_retry = HeaderValue::from_static(if retryable { "true" } else { "false" });
    let headers = &mut head.headers;
    headers.insert(ERROR_TYPE, HeaderValue::from_static(row.kind));
    headers.insert(SHOULD_RETRY, should_retry);
    if !retryable {
        // Clients that obey it would send again whatever `x-should-retry` says.
        headers.remove(RETRY_AFTER);
    } else if WITH_RETRY_AFTER.contains(&head.status) && !headers.contains_key(RETRY_AFTER) {
        headers.insert(RETRY_AFTER, HeaderValue::from(row.retry_after.as_secs()));
    }
}

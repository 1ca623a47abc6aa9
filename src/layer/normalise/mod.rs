//! Turns every error into the response that docs/errors.md describes. Inside this layer a request may
//! fail; outside it cannot.

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

/// Table of statuses for error responses (`errors.status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusMapping {
    /// The status of the vendor's table.
    Documented,
    /// Another status than 429 if a retry cannot help, for clients that retry every 429.
    Actionable,
}

/// Body format of an error that upstream sent (`errors.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorBodyFormat {
    /// The proxy's JSON body, in the form of Kling's envelope.
    Kling,
    /// The unchanged body and status of upstream, with the proxy's headers added.
    Upstream,
}

/// Form of error responses (`errors.*`).
#[derive(Clone, Copy, Debug)]
pub struct ErrorFormat {
    pub statuses: StatusMapping,
    pub format: ErrorBodyFormat,
}

/// Adds [`Normalise`] to a service.
#[derive(Clone)]
pub struct NormaliseLayer {
    format: Reloadable<ErrorFormat>,
}

/// Turns each error of the inner service into a response.
#[derive(Clone)]
pub struct Normalise<S> {
    inner: S,
    format: Reloadable<ErrorFormat>,
}

pin_project! {
    /// Waits for the response, or turns the error into one.
    pub struct NormaliseFuture<F> {
        #[pin]
        inner: F,
        format: ErrorFormat,
        effect: Effect,
        context: RequestContext,
    }
}

// === impl NormaliseLayer ===

impl NormaliseLayer {
    /// Makes a layer that formats each error by the value that `format` holds when the request arrives.
    pub fn new(format: Reloadable<ErrorFormat>) -> Self {
        Self { format }
    }
}

impl<S> Layer<S> for NormaliseLayer {
    type Service = Normalise<S>;

    fn layer(&self, inner: S) -> Normalise<S> {
        Normalise {
            inner,
            format: self.format.clone(),
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
        // Every layer inside is always ready: layers that limit requests answer them with an error
        // instead.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, inbound: ProxyRequest) -> Self::Future {
        NormaliseFuture {
            format: **self.format.load(),
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
            Err(error) => this.format.respond(error, *this.effect, this.context),
        }))
    }
}

/// Adapts a head, upstream's or a new one, to the proxy's JSON body.
fn ours(mut head: response::Parts, status: StatusCode) -> response::Parts {
    head.status = status;
    // The reason phrase belongs to upstream's status.
    head.extensions.remove::<ReasonPhrase>();
    head.headers.remove(CONTENT_LENGTH);
    head.headers.remove(CONTENT_ENCODING);
    head.headers.insert(CONTENT_TYPE, JSON);
    head
}

/// Adds headers with the type of the error, and with advice about a retry.
fn advise(head: &mut response::Parts, row: &'static Row, retryable: bool) {
    let should_retry = HeaderValue::from_static(if retryable { "true" } else { "false" });
    let headers = &mut head.headers;
    headers.insert(ERROR_TYPE, HeaderValue::from_static(row.kind));
    headers.insert(SHOULD_RETRY, should_retry);
    if !retryable {
        // Clients that obey `retry-after` would send again even if `x-should-retry` is `false`.
        headers.remove(RETRY_AFTER);
    } else if WITH_RETRY_AFTER.contains(&head.status) && !headers.contains_key(RETRY_AFTER) {
        headers.insert(RETRY_AFTER, HeaderValue::from(row.retry_after.as_secs()));
    }
}

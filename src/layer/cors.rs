//! Lets web pages of allowed origins read the responses, errors included. The guard refuses all other
//! pages and answers preflights; this layer adds the headers that each response to an allowed page needs
//! (Fetch Standard, section 3.2.3).

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::response::Response;
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue, ORIGIN, VARY,
};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::layer::guard::rules::Rules;
use crate::reloadable::Reloadable;
use crate::request::context::ProxyRequest;

/// Response headers of the proxy that a page may read.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "kling-proxy-error, kling-proxy-request-id, kling-proxy-task, preference-applied, retry-after, x-should-retry",
);

/// Adds [`Cors`] to a service.
#[derive(Clone)]
pub struct CorsLayer {
    rules: Reloadable<Rules>,
}

/// Adds CORS headers to each response.
#[derive(Clone)]
pub struct Cors<S> {
    inner: S,
    rules: Reloadable<Rules>,
}

pin_project! {
    /// Waits for the response and adds the CORS headers.
    pub struct CorsFuture<F> {
        #[pin]
        inner: F,
        origin: Option<HeaderValue>,
        varies: bool,
    }
}

// === impl CorsLayer ===

impl CorsLayer {
    /// Adds CORS headers for pages of the origins that `rules` allow.
    pub fn new(rules: Reloadable<Rules>) -> Self {
        Self { rules }
    }
}

impl<S> Layer<S> for CorsLayer {
    type Service = Cors<S>;

    fn layer(&self, inner: S) -> Cors<S> {
        let rules = self.rules.clone();
        Cors { inner, rules }
    }
}

// === impl Cors ===

impl<S> Service<ProxyRequest> for Cors<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Infallible>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = CorsFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, inbound: ProxyRequest) -> Self::Future {
        let rules = self.rules.load();
        let allowed = &rules.allowed_origins;
        let varies = !allowed.is_empty(); // usually no origin is allowed: skip the lookup
        let origin = varies
            .then(|| inbound.request.headers().get(ORIGIN))
            .flatten();
        CorsFuture {
            origin: origin.filter(|origin| allowed.contains(origin)).cloned(),
            varies,
            inner: self.inner.call(inbound),
        }
    }
}

// === impl CorsFuture ===

impl<F> Future for CorsFuture<F>
where
    F: Future<Output = Result<Response, Infallible>>,
{
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(mut response) = ready!(this.inner.poll(cx));
        let headers = response.headers_mut();
        if *this.varies {
            headers.append(VARY, HeaderValue::from_static("Origin"));
        }
        if let Some(origin) = this.origin.take() {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        }
        Poll::Ready(Ok(response))
    }
}

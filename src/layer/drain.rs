//! Answers the requests that are still in flight when the drain is over. Without a response a client
//! would only see its connection end, and some clients then send the request again.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::response::Response;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::error::Error;
use crate::kling::idempotency::Effect;
use crate::lifecycle::{Lifecycle, Phase};
use crate::request::context::ProxyRequest;

/// Adds [`Drain`] to a service.
#[derive(Clone)]
pub struct DrainLayer {
    lifecycle: Arc<Lifecycle>,
}

/// Ends each request with an error when the drain is over.
#[derive(Clone)]
pub struct Drain<S> {
    inner: S,
    lifecycle: Arc<Lifecycle>,
}

pin_project! {
    /// Waits for the response, or for the end of the drain.
    pub struct DrainFuture<F> {
        #[pin]
        inner: F,
        effect: Effect,
        lifecycle: Arc<Lifecycle>,
        // Set at the first poll after the drain has begun: a shutdown polls each connection.
        end: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    }
}

// === impl DrainLayer ===

impl DrainLayer {
    /// Ends requests when `lifecycle` reaches [`Phase::Ended`].
    pub fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle }
    }
}

impl<S> Layer<S> for DrainLayer {
    type Service = Drain<S>;

    fn layer(&self, inner: S) -> Drain<S> {
        let lifecycle = Arc::clone(&self.lifecycle);
        Drain { inner, lifecycle }
    }
}

// === impl Drain ===

impl<S> Service<ProxyRequest> for Drain<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = DrainFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, inbound: ProxyRequest) -> Self::Future {
        DrainFuture {
            effect: Effect::of(&inbound.request),
            inner: self.inner.call(inbound),
            lifecycle: Arc::clone(&self.lifecycle),
            end: None,
        }
    }
}

// === impl DrainFuture ===

impl<F> Future for DrainFuture<F>
where
    F: Future<Output = Result<Response, Error>>,
{
    type Output = Result<Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(answer) = this.inner.poll(cx) {
            return Poll::Ready(answer);
        }
        if this.lifecycle.phase() < Phase::Draining {
            return Poll::Pending;
        }
        let end = this.end.get_or_insert_with(|| {
            let lifecycle = Arc::clone(this.lifecycle);
            Box::pin(async move { lifecycle.ended().await })
        });
        ready!(end.as_mut().poll(cx));
        Poll::Ready(Err(match this.effect {
            Effect::Read => Error::Draining,
            Effect::Create => Error::ShutDown,
        }))
    }
}

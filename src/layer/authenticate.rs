//! Gives a request the two things that make upstream accept it: a token and upstream's name.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::extract::Request;
use axum::response::Response;
use futures_util::future::{Either, ready};
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use tower::{Layer, Service};

use crate::error::Error;
use crate::headers;
use crate::layer::Refusable;
use crate::token::Tokens;

/// Adds [`Authenticate`] to a service.
#[derive(Clone)]
pub struct AuthenticateLayer {
    tokens: Arc<Tokens>,
    host: HeaderValue,
}

/// Strips what may not pass, then sets `Authorization` and `Host`.
#[derive(Clone)]
pub struct Authenticate<S> {
    inner: S,
    layer: AuthenticateLayer,
}

// === impl AuthenticateLayer ===

impl AuthenticateLayer {
    /// Shows `tokens` to the upstream that is called `host`.
    pub fn new(tokens: Arc<Tokens>, host: HeaderValue) -> Self {
        Self { tokens, host }
    }
}

impl<S> Layer<S> for AuthenticateLayer {
    type Service = Authenticate<S>;

    fn layer(&self, inner: S) -> Authenticate<S> {
        Authenticate {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl Authenticate ===

impl<S> Service<Request> for Authenticate<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Refusable<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let bearer = match self.layer.tokens.bearer() {
            Ok(bearer) => bearer,
            Err(error) => return Either::Left(ready(Err(Error::Credentials(error)))),
        };
        let headers = request.headers_mut();
        // First strip, then add: `Connection: authorization` must not name what we add.
        headers::strip_request(headers);
        headers.insert(HOST, self.layer.host.clone());
        headers.insert(AUTHORIZATION, bearer);
        Either::Right(self.inner.call(request))
    }
}

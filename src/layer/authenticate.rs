//! Adds a token and the host name of upstream to each request.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::response::Response;
use futures_util::future::{self, Either};
use http::header::{AUTHORIZATION, HOST, HeaderValue};
use http::uri::PathAndQuery;
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::auth::token::{Authorization, Tokens};
use crate::error::Error;
use crate::kling::api_path::Accepts;
use crate::layer::Refusable;
use crate::request::replayable::{Attempt, ReplayableRequest};

/// Adds [`Authenticate`] to a service.
#[derive(Clone)]
pub struct AuthenticateLayer(Arc<AuthenticateShared>);

/// Sets `Authorization` and `Host` of each attempt. The client's own values are not sent.
#[derive(Clone)]
pub struct Authenticate<S> {
    inner: S,
    shared: Arc<AuthenticateShared>,
}

struct AuthenticateShared {
    tokens: Arc<Tokens>,
    host: HeaderValue,
}

pin_project! {
    /// Waits for the response, and reports a refused credential to [`Tokens`].
    pub struct Authenticated<F> {
        #[pin]
        inner: F,
        shared: Arc<AuthenticateShared>,
        path: Option<PathAndQuery>,
    }
}

// === impl AuthenticateLayer ===

impl AuthenticateLayer {
    /// Sends `tokens` to the upstream at `host`.
    pub fn new(tokens: Arc<Tokens>, host: HeaderValue) -> Self {
        Self(Arc::new(AuthenticateShared { tokens, host }))
    }
}

impl<S> Layer<S> for AuthenticateLayer {
    type Service = Authenticate<S>;

    fn layer(&self, inner: S) -> Authenticate<S> {
        Authenticate {
            inner,
            shared: Arc::clone(&self.0),
        }
    }
}

// === impl Authenticate ===

impl<S> Service<ReplayableRequest> for Authenticate<S>
where
    S: Service<Attempt, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Refusable<Authenticated<S::Future>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, original: ReplayableRequest) -> Self::Future {
        let Authorization { value, minted_by } = match self.shared.tokens.bearer() {
            Ok(authorization) => authorization,
            Err(error) => return Either::Left(future::ready(Err(Error::Credentials(error)))),
        };
        original.context().attempted();
        let path = original.uri().path_and_query().cloned();
        // The client's headers are stripped already: its `Connection: authorization` must not remove
        // ours.
        let mut attempt = original.attempt();
        attempt.minted_by = minted_by;
        let headers = attempt.request.headers_mut();
        headers.insert(HOST, self.shared.host.clone());
        headers.insert(AUTHORIZATION, value);
        Either::Right(Authenticated {
            inner: self.inner.call(attempt),
            shared: Arc::clone(&self.shared),
            path,
        })
    }
}

// === impl Authenticated ===

impl<F> Future for Authenticated<F>
where
    F: Future<Output = Result<Response, Error>>,
{
    type Output = Result<Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx));
        if let Err(error) = &result
            && error.row().class.refuses_credential()
        {
            let path = this.path.as_ref().map_or("/", PathAndQuery::path);
            let accepted = Accepts::of_plain(path);
            this.shared.tokens.was_refused(accepted);
        }
        Poll::Ready(result)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::body::Body;
    use axum::extract::Request;
    use bytesize::ByteSize;
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::*;
    use crate::auth::secret::Secret;
    use crate::auth::token::{Credential, Validity};
    use crate::clock::SystemClock;
    use crate::request::context::ProxyRequest;
    use crate::request::replay_body::{ReplayBudget, ReplayLimits};
    use crate::telemetry::metrics::Metrics;

    /// Returns the headers that reach the inner service, or the code of the error.
    async fn seen(api_key: &str, request: Request) -> Result<Vec<(String, String)>, i64> {
        let validity = Validity {
            lifetime: Duration::from_mins(30),
            not_before_leeway: Duration::from_secs(5),
            refresh_before: Duration::from_mins(5),
        };
        let credential = Credential::ApiKey(Secret::from(api_key.to_owned()));
        let metrics = Arc::new(Metrics::new().unwrap());
        let limits = ReplayLimits {
            body: ByteSize::kib(1),
            memory: ByteSize::kib(1),
        };
        let budget = Arc::new(ReplayBudget::new(limits, Arc::clone(&metrics)));
        let request = ProxyRequest::untraced(request, &metrics);
        let tokens = Tokens::new(credential, validity, Arc::new(SystemClock), metrics);
        let host = HeaderValue::from_static("kling.test");
        let stack = ServiceBuilder::new()
            .layer(AuthenticateLayer::new(Arc::new(tokens), host))
            .service(service_fn(|Attempt { request, .. }| async move {
                let mut answer = Response::new(Body::empty());
                *answer.headers_mut() = request.into_parts().0.headers;
                Ok::<_, Error>(answer)
            }));
        let request = ReplayableRequest::new(request, &budget, false);
        let answer = stack.oneshot(request).await.map_err(|error| error.code())?;
        let text = |value: &HeaderValue| value.to_str().unwrap().to_owned();
        Ok(answer
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), text(value)))
            .collect())
    }

    fn request() -> Request {
        let request = Request::builder()
            .header("host", "localhost")
            .header("connection", "authorization")
            .header("authorization", "Bearer mine")
            .header("authorization", "Bearer another");
        request.body(Body::empty()).unwrap()
    }

    #[tokio::test]
    async fn ours_is_the_only_authorization_and_host() {
        let ours = [("host", "kling.test"), ("authorization", "Bearer key")];
        let ours = ours.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(seen("key", request()).await, Ok(ours.to_vec()));
    }

    #[tokio::test]
    async fn without_a_token_nothing_is_sent() {
        assert_eq!(seen("no\nheader", request()).await, Err(9201));
    }
}

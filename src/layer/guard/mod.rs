//! Refuses requests that may not be forwarded, before they cost anything: no token is minted, no
//! connection is opened, no byte of the body is read. The first check that fails decides the error.

pub mod hop;
mod refusal;
pub mod rules;

use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures_util::future::{Either, ready};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderName,
    HeaderValue, ORIGIN,
};
use http::{Method, StatusCode};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Layer, Service};

use crate::auth::client_share::{NoPlace, Peer, Shares};
use crate::error::{BoxError, Error};
use crate::layer::Refusable;
use crate::layer::guard::hop::Hop;
use crate::layer::guard::rules::{Rules, check_framing, check_known_method, check_target};
use crate::lifecycle::Lifecycle;
use crate::reloadable::Reloadable;
use crate::request::context::ProxyRequest;
use crate::telemetry::metrics::Metrics;

/// Adds [`Guard`] to a service.
#[derive(Clone)]
pub struct GuardLayer {
    /// Rules that each request must pass.
    pub rules: Reloadable<Rules>,
    /// Tells where a request goes, because some rules depend on it.
    pub destination: fn(&Request) -> Destination,
    /// Requests that each client has in flight; `None` on listeners that do not limit requests.
    pub shares: Option<Arc<Shares>>,
    /// Detects loops of proxies; `None` if upstream is not on this machine.
    pub hop: Option<Arc<Hop>>,
    /// Phase of the proxy. While it drains, each request is refused.
    pub lifecycle: Arc<Lifecycle>,
    /// Counts refusals, and admitted requests per client.
    pub metrics: Arc<Metrics>,
}

/// Checks each request against the [`Rules`].
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    layer: GuardLayer,
}

/// The place that a request goes to if the guard admits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// It is forwarded, and must pass all rules.
    Upstream,
    /// The proxy answers it. The allow-lists of methods and paths do not apply, which restrict forwarding.
    ThisProxy,
    /// It reads a result file of the embedded sandbox, which is the same for everybody and holds nothing of
    /// a client. The rules about pages and client tokens do not apply, as they do not to Kling's own results.
    PublicFile,
}

/// Outcome of the checks for a request that is not refused.
enum Admission {
    Pass,
    /// A CORS preflight, answered here. A browser sends it without token and body before the page's
    /// request.
    Preflight,
}

/// Header of Private Network Access: a page from a public network asks for an address of this machine.
const REQUEST_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-allow-private-network");

// === impl GuardLayer ===

impl GuardLayer {
    fn check(&self, rules: &Rules, inbound: &ProxyRequest) -> Result<Admission, Error> {
        let ProxyRequest { request, context } = inbound;
        let headers = request.headers();
        let destination = (self.destination)(request);
        rules.check_host(headers)?;
        if destination != Destination::PublicFile {
            rules.check_origin(headers)?;
        }
        if is_preflight(request) {
            return Ok(Admission::Preflight);
        }
        check_known_method(request.method())?;
        if destination == Destination::Upstream {
            rules.check_method(request.method())?;
        }
        check_target(request.uri(), headers)?;
        check_framing(headers)?;
        if destination == Destination::Upstream {
            rules.check_path(request.uri().path())?;
        }
        let mut share = None;
        if destination != Destination::PublicFile
            && let Some(client) = rules.check_client(headers)?
        {
            self.metrics.admitted(client.name.as_str());
            share = Some(Arc::clone(&client.share));
            context.is_from(client.name.clone());
        }
        let limit = rules.request_body.as_u64();
        if request.body().size_hint().lower() > limit {
            let begun = false;
            return Err(Error::BodyTooLarge { limit, begun });
        }
        if self.lifecycle.is_draining() {
            return Err(Error::Draining);
        }
        if let Some(shares) = &self.shares {
            let peer = request.extensions().get::<Peer>();
            let share = share.or_else(|| Some(shares.of(*peer?)));
            // The `trace` layer has already counted this request as in flight.
            let in_flight = self.metrics.in_flight();
            let place = shares.take(share, in_flight, rules.in_flight);
            if let Some(place) = place.map_err(|NoPlace| Error::Overloaded(rules.in_flight))? {
                context.holds(place);
            }
        }
        Ok(Admission::Pass)
    }
}

impl<S> Layer<S> for GuardLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard {
            inner,
            layer: self.clone(),
        }
    }
}

// === impl Guard ===

impl<S> Service<ProxyRequest> for Guard<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Refusable<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut inbound: ProxyRequest) -> Self::Future {
        let rules = self.layer.rules.load();
        let verdict = self.layer.check(&rules, &inbound);
        let verdict = verdict.and_then(|verdict| {
            if let Some(hop) = &self.layer.hop {
                hop.mark(inbound.request.headers_mut())?;
            }
            Ok(verdict)
        });
        match verdict {
            Ok(Admission::Preflight) => Either::Left(ready(Ok(allow(inbound.request.headers())))),
            Ok(Admission::Pass) => {
                let limit = rules.request_body.as_u64();
                limit_body(inbound.request.body_mut(), limit);
                Either::Right(self.inner.call(inbound))
            }
            Err(refusal) => {
                self.layer.metrics.refused(refusal.kind());
                Either::Left(ready(Err(refusal)))
            }
        }
    }
}

/// Returns true if the request is a CORS preflight (Fetch Standard, section 3.2.2).
fn is_preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(ORIGIN)
        && request
            .headers()
            .contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Answers a preflight and allows everything that it asks for. The request that follows is checked like
/// any other.
fn allow(asked: &HeaderMap) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    for (question, answer) in [
        (ACCESS_CONTROL_REQUEST_METHOD, ACCESS_CONTROL_ALLOW_METHODS),
        (ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_ALLOW_HEADERS),
        (REQUEST_PRIVATE_NETWORK, ALLOW_PRIVATE_NETWORK),
    ] {
        if let Some(asked) = asked.get(question) {
            headers.insert(answer, asked.clone());
        }
    }
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

/// Limits the size of a body that did not declare it.
fn limit_body(body: &mut Body, limit: u64) {
    if body.size_hint().upper().is_some() {
        return;
    }
    let bound = usize::try_from(limit).unwrap_or(usize::MAX);
    let limited = Limited::new(mem::take(body), bound);
    *body = Body::new(limited.map_err(move |error: BoxError| {
        if error.is::<LengthLimitError>() {
            Error::BodyTooLarge { limit, begun: true }.into()
        } else {
            error
        }
    }));
}

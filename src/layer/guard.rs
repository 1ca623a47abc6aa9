//! Refuses what may not be forwarded, before anything is spent: no token is read, no connection
//! made, no byte of a body taken.
//!
//! The checks stand in the order of `security-requirements.md`; the first that fails answers.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytesize::ByteSize;
use futures_util::future::{Either, ready};
use http::header::{HOST, HeaderMap, ORIGIN};
use http::{Method, Uri};
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tower::{Layer, Service};

use crate::client_token::ClientTokens;
use crate::error::{BoxError, Error};
use crate::layer::Refusable;
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;

/// What the guard lets pass.
pub struct Rules {
    /// Accepted host names, without port (`access.allowed_hosts`).
    pub allowed_hosts: Vec<String>,
    /// Who may call; `None` for anyone who can connect.
    pub client_tokens: Option<ClientTokens>,
    /// Largest request body (`limits.request_body`).
    pub request_body: ByteSize,
    /// Most requests at once (`limits.in_flight`).
    pub in_flight: u64,
}

/// Adds [`Guard`] to a service.
#[derive(Clone)]
pub struct GuardLayer {
    rules: Arc<Rules>,
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
}

/// Checks each request against the [`Rules`].
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    layer: GuardLayer,
}

/// As much of a refused host name as its sender is told.
const LONGEST_QUOTE: usize = 255;

// === impl GuardLayer ===

impl GuardLayer {
    /// Refuses what breaks `rules`, and everything while the proxy drains.
    pub fn new(rules: Arc<Rules>, lifecycle: Arc<Lifecycle>, metrics: Arc<Metrics>) -> Self {
        Self {
            rules,
            lifecycle,
            metrics,
        }
    }

    fn check(&self, request: &Request) -> Result<(), Error> {
        let rules = &*self.rules;
        let headers = request.headers();
        rules.check_host(headers)?;
        check_origin(headers)?;
        check_method(request.method())?;
        check_target(request.uri(), headers)?;
        if let Some(tokens) = &rules.client_tokens
            && !tokens.admit(headers)
        {
            return Err(Error::ClientTokenInvalid);
        }
        if request.body().size_hint().lower() > rules.request_body.as_u64() {
            return Err(Error::BodyTooLarge {
                limit: rules.request_body,
                begun: false,
            });
        }
        if self.lifecycle.is_draining() {
            return Err(Error::Draining);
        }
        // `trace` has counted this request already.
        if self.metrics.in_flight() > rules.in_flight {
            return Err(Error::Overloaded(rules.in_flight));
        }
        Ok(())
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

impl<S> Service<Request> for Guard<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Refusable<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        match self.layer.check(&request) {
            Ok(()) => {
                let limit = self.layer.rules.request_body;
                Either::Right(self.inner.call(request.map(|body| limited(body, limit))))
            }
            Err(refusal) => {
                self.layer.metrics.refused(&refusal);
                Either::Left(ready(Err(refusal)))
            }
        }
    }
}

// === impl Rules ===

impl Rules {
    /// R1, R2, R4: exactly one `Host`, and one of ours. Nothing else says which host is meant.
    fn check_host(&self, headers: &HeaderMap) -> Result<(), Error> {
        let mut hosts = headers.get_all(HOST).into_iter();
        let refusal = |host: &[u8]| {
            let host = String::from_utf8_lossy(host);
            Err(Error::HostNotAllowed(
                host.chars().take(LONGEST_QUOTE).collect(),
            ))
        };
        match (hosts.next(), hosts.next()) {
            (Some(host), None) => match host.to_str().ok().and_then(without_port) {
                Some(name) if self.allows(name) => Ok(()),
                _ => refusal(host.as_bytes()),
            },
            (None, _) => refusal(b""),
            (Some(_), Some(second)) => refusal(second.as_bytes()),
        }
    }

    fn allows(&self, name: &str) -> bool {
        self.allowed_hosts
            .iter()
            .any(|allowed| allowed.eq_ignore_ascii_case(name))
    }
}

/// The host of `host[:port]`; `None` if it is not of that form.
fn without_port(authority: &str) -> Option<&str> {
    let end = match authority.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (name, port) = authority.split_at(end);
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    (port.is_empty() || port.strip_prefix(':').is_some_and(is_port)).then_some(name)
}

/// R3: only browsers send these headers, and they do not let a page forge them.
fn check_origin(headers: &HeaderMap) -> Result<(), Error> {
    let from_other_site = headers
        .get("sec-fetch-site")
        .is_some_and(|site| !matches!(site.as_bytes(), b"none" | b"same-origin"));
    if headers.contains_key(ORIGIN) || from_other_site {
        return Err(Error::OriginNotAllowed);
    }
    Ok(())
}

/// A tunnel could lead anywhere, and a trace would show what we added.
fn check_method(method: &Method) -> Result<(), Error> {
    match *method {
        Method::CONNECT | Method::TRACE => Err(Error::MethodNotAllowed),
        _ => Ok(()),
    }
}

/// R7: a path on this proxy. An absolute target may name it by the same name as `Host`.
fn check_target(target: &Uri, headers: &HeaderMap) -> Result<(), Error> {
    if !target.path().starts_with('/') {
        return Err(Error::BadRequest("the request target is not a path"));
    }
    let Some(authority) = target.authority() else {
        return Ok(());
    };
    let same = headers.get(HOST).is_some_and(|host| {
        host.as_bytes()
            .eq_ignore_ascii_case(authority.as_str().as_bytes())
    });
    if same {
        Ok(())
    } else {
        Err(Error::BadRequest("the request target names another host"))
    }
}

/// Bounds a body that did not declare its size.
fn limited(body: Body, limit: ByteSize) -> Body {
    if body.size_hint().upper().is_some() {
        return body;
    }
    let bound = usize::try_from(limit.as_u64()).unwrap_or(usize::MAX);
    Body::new(Limited::new(body, bound).map_err(move |error: BoxError| {
        if error.is::<LengthLimitError>() {
            Error::BodyTooLarge { limit, begun: true }.into()
        } else {
            error
        }
    }))
}

//! Refuses what may not be forwarded, before anything is spent: no token of ours is minted, no
//! connection made, no byte of a body taken. The first check that fails answers.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytesize::ByteSize;
use futures_util::future::{Either, ready};
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HOST, HeaderMap, HeaderName,
    HeaderValue, ORIGIN, TRANSFER_ENCODING,
};
use http::{Method, StatusCode, Uri};
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
    /// Web origins that may call (`access.allowed_origins`).
    pub allowed_origins: Arc<[HeaderValue]>,
    /// Methods that pass; all if empty (`access.allowed_methods`).
    pub allowed_methods: Vec<Method>,
    /// Prefixes, on whole segments, of paths that pass; all if empty (`access.allowed_paths`).
    pub allowed_paths: Vec<String>,
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

/// What becomes of a request that is not refused.
enum Verdict {
    Pass,
    /// It is answered here: a browser sends it without token and body, to ask for its page.
    Preflight,
}

/// Private Network Access: a public page asks for an address of this machine.
const REQUEST_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-allow-private-network");
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

    fn check(&self, request: &Request) -> Result<Verdict, Error> {
        let rules = &*self.rules;
        let headers = request.headers();
        rules.check_host(headers)?;
        rules.check_origin(headers)?;
        if is_preflight(request) {
            return Ok(Verdict::Preflight);
        }
        rules.check_method(request.method())?;
        check_target(request.uri(), headers)?;
        check_framing(headers)?;
        rules.check_path(request.uri().path())?;
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
        Ok(Verdict::Pass)
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
            Ok(Verdict::Preflight) => Either::Left(ready(Ok(allow(request.headers())))),
            Ok(Verdict::Pass) => {
                let limit = self.layer.rules.request_body;
                Either::Right(self.inner.call(request.map(|body| limited(body, limit))))
            }
            Err(refusal) => {
                self.layer.metrics.refused(refusal.kind());
                Either::Left(ready(Err(refusal)))
            }
        }
    }
}

// === impl Rules ===

impl Rules {
    /// Exactly one `Host`, and one of ours. Nothing else says which host is meant.
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

    /// Only browsers send these headers, and they do not let a page forge them.
    fn check_origin(&self, headers: &HeaderMap) -> Result<(), Error> {
        let from_this_site =
            |site: &HeaderValue| [&b"none"[..], b"same-origin"].contains(&site.as_bytes());
        let allowed = match headers.get(ORIGIN) {
            Some(origin) => self.allowed_origins.contains(origin),
            None => headers.get("sec-fetch-site").is_none_or(from_this_site),
        };
        if allowed {
            Ok(())
        } else {
            Err(Error::OriginNotAllowed)
        }
    }

    /// A tunnel could lead anywhere, and a trace would show what we added.
    fn check_method(&self, method: &Method) -> Result<(), Error> {
        let never = [Method::CONNECT, Method::TRACE].contains(method);
        let listed = self.allowed_methods.is_empty() || self.allowed_methods.contains(method);
        if listed && !never {
            Ok(())
        } else {
            Err(Error::MethodNotAllowed)
        }
    }

    /// Judges the very bytes that are forwarded. What a server might resolve to another path
    /// is in no list.
    fn check_path(&self, path: &str) -> Result<(), Error> {
        let listed = |prefix: &String| {
            let rest = path.strip_prefix(prefix.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let all = self.allowed_paths.is_empty();
        if all || !path.split('/').any(is_ambiguous) && self.allowed_paths.iter().any(listed) {
            Ok(())
        } else {
            Err(Error::PathNotAllowed)
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

/// Whether a browser asks, for a page, if that may send another request (Fetch Standard, 3.2.2).
fn is_preflight(request: &Request) -> bool {
    request.method() == Method::OPTIONS
        && request.headers().contains_key(ORIGIN)
        && request
            .headers()
            .contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Allows an allowed page what it asks for: what it then sends is checked like any other request.
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

/// Whether a segment is one of dots, or holds a separator, once it is decoded.
fn is_ambiguous(segment: &str) -> bool {
    let decoded = segment.to_ascii_lowercase().replace("%2e", ".");
    [".", ".."].contains(&&*decoded)
        || ["\\", "%5c", "%2f"]
            .iter()
            .any(|separator| decoded.contains(separator))
}

/// A path on this proxy. An absolute target may name it by the same name as `Host`.
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

/// No coding but `chunked`, and that once. hyper reads `gzip, chunked` too, but what it hands on
/// would have lost its `gzip`.
fn check_framing(headers: &HeaderMap) -> Result<(), Error> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).into_iter();
    let chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if chunked(coding) => Ok(()),
        _ => Err(Error::BadRequest(
            "the transfer coding is not `chunked` alone",
        )),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(allowed_paths: &[&str]) -> Rules {
        Rules {
            allowed_hosts: Vec::new(),
            allowed_origins: Arc::default(),
            allowed_methods: Vec::new(),
            allowed_paths: allowed_paths.iter().map(ToString::to_string).collect(),
            client_tokens: None,
            request_body: ByteSize::mib(1),
            in_flight: 1,
        }
    }

    #[test]
    fn a_path_is_judged_by_whole_segments_and_never_by_what_it_might_resolve_to() {
        for (path, allowed) in [
            ("/v1/videos", true),
            ("/v1/videos/", true),
            ("/v1/videos/text2video/1", true),
            ("/v1/videos//text2video", true),
            ("/v1/videos/a.b/..c", true),
            ("/v1/videosx", false),
            ("/v1", false),
            ("/V1/videos", false),
            ("//v1/videos", false),
            ("/v1/videos/../images", false),
            ("/v1/videos/./x", false),
            ("/v1/videos/%2e%2E/images", false),
            ("/v1/videos/.%2e", false),
            ("/v1/videos/a%2fb", false),
            ("/v1/videos/a%5Cb", false),
            ("/v1/videos/a\\b", false),
        ] {
            for entry in ["/v1/videos", "/v1/videos/"] {
                let outcome = rules(&["/account/costs", entry]).check_path(path);
                assert_eq!(outcome.is_ok(), allowed, "{path} by {entry}");
            }
            assert!(rules(&[]).check_path(path).is_ok(), "{path} without a list");
            let root = rules(&["/"]).check_path(path);
            assert_eq!(
                root.is_ok(),
                !path.split('/').any(is_ambiguous),
                "{path} by /"
            );
        }
    }

    #[test]
    fn a_host_is_what_stands_before_the_port() {
        for (authority, name) in [
            ("localhost", Some("localhost")),
            ("localhost:5546", Some("localhost")),
            ("[::1]", Some("[::1]")),
            ("[::1]:5546", Some("[::1]")),
            ("localhost:", None),
            ("localhost:x", None),
            ("localhost:1:2", None),
            ("[::1", None),
            ("[::1]x", None),
            ("", Some("")),
        ] {
            assert_eq!(without_port(authority), name, "{authority:?}");
        }
    }
}

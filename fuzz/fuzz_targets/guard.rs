//! Fuzzes the guard with arbitrary bytes of a client: a request that passes keeps the rules, by a second
//! reading of them, and any other request gets a response with one of our codes.
//!
//! An input is all bytes of one connection.

#![no_main]

use std::convert::Infallible;
use std::io::Write;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytesize::ByteSize;
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, AUTHORIZATION, HOST, HeaderMap, HeaderValue, ORIGIN,
    TRANSFER_ENCODING,
};
use http::{Method, StatusCode, request};
use http_body_util::BodyExt;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use kling_proxy::internals::{
    ClientTokens, Clock, CorsLayer, Destination, Error, ErrorBodyFormat, ErrorFormat, GuardLayer,
    Metrics, NormaliseLayer, ProxyRequest, Purpose, Reloadable, Rules, StatusMapping, TraceLayer,
    service_code,
};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;
use tokio::runtime::{Builder, Runtime};
use tower::{ServiceBuilder, ServiceExt};

const HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];
const PAGE: &str = "http://localhost:3000";
const PATHS: [&str; 2] = ["/v1/videos", "/account/"];
const TOKEN: &str = "0123456789abcdef";
/// JWT that is valid at the time of the test, signed with [`TOKEN`].
const JWT: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.\
    eyJleHAiOjE4MDAwMDE4MDAsIm5iZiI6MTc5OTk5OTk5NX0.\
    XXh28IiSsYtSrkBLhBU91V73IFLSA-gyQG9yenBK8wo";
const BODY: u64 = 16;

struct At(u64);

impl Clock for At {
    fn now(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.0)
    }
}

/// Rules by default, with allow-lists, and with client tokens.
static RULES: LazyLock<[Reloadable<Rules>; 3]> = LazyLock::new(|| {
    [
        rules(),
        Rules {
            allowed_origins: vec![HeaderValue::from_static(PAGE)],
            allowed_methods: vec![Method::GET, Method::POST],
            allowed_paths: PATHS.map(str::to_owned).into(),
            ..rules()
        },
        Rules {
            client_tokens: Some(client_tokens().expect("a file of one token").into()),
            ..rules()
        },
    ]
    .map(Reloadable::new)
});
static LOOK: LazyLock<Reloadable<ErrorFormat>> = LazyLock::new(|| {
    Reloadable::new(ErrorFormat {
        statuses: StatusMapping::Documented,
        format: ErrorBodyFormat::Kling,
    })
});
static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Metrics::new().expect("metrics").into());
static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime"));

fn rules() -> Rules {
    Rules {
        allowed_hosts: HOSTS.map(str::to_owned).into(),
        allowed_origins: Vec::new(),
        allowed_methods: Vec::new(),
        allowed_paths: Vec::new(),
        client_tokens: None,
        request_body: ByteSize::b(BODY),
        in_flight: 1,
        purpose: Purpose::Serve,
    }
}

fn client_tokens() -> Result<ClientTokens, Box<dyn std::error::Error>> {
    let mut file = NamedTempFile::new()?;
    file.write_all(TOKEN.as_bytes())?;
    Ok(ClientTokens::read(
        file.path(),
        Arc::new(At(1_800_000_000)),
    )?)
}

fuzz_target!(|bytes: &[u8]| {
    for rules in &*RULES {
        RUNTIME.block_on(connection(bytes, rules));
    }
});

/// Serves a connection as the server does.
async fn connection(bytes: &[u8], rules: &'static Reloadable<Rules>) {
    let service = hyper::service::service_fn(|request: request::Request<_>| {
        answer(request.map(Body::new), rules)
    });
    let io = TokioIo::new(tokio::io::join(bytes, tokio::io::sink()));
    let mut http = http1::Builder::new();
    // Bytes that are not HTTP end the connection with an error.
    let _ = http.half_close(true).serve_connection(io, service).await;
}

/// Marks the response to a request that has passed.
#[derive(Clone)]
struct Passed;

async fn answer(
    request: Request,
    rules: &'static Reloadable<Rules>,
) -> Result<Response, Infallible> {
    let origins: Vec<_> = request.headers().get_all(ORIGIN).iter().cloned().collect();
    let guard = GuardLayer {
        rules: rules.clone(),
        destination: |_| Destination::Upstream,
        shares: Some(Arc::default()),
        hop: None,
        lifecycle: Arc::default(),
        metrics: Arc::clone(&METRICS),
    };
    let stack = ServiceBuilder::new()
        .layer(TraceLayer::new(Arc::clone(&METRICS)))
        .layer(CorsLayer::new(rules.clone()))
        .layer(NormaliseLayer::new(LOOK.clone()))
        .layer(guard)
        .service_fn(move |inbound: ProxyRequest| upstream(inbound.request, rules));
    let response = stack.oneshot(request).await?;
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("it is all there").to_bytes();
    let allowed = &rules.load().allowed_origins;
    let id = head.headers["kling-proxy-request-id"].as_bytes();
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._-".contains(b);
    assert!((1..=64).contains(&id.len()) && id.iter().all(plain));
    if let Some(readable_by) = head.headers.get(ACCESS_CONTROL_ALLOW_ORIGIN) {
        assert!(allowed.contains(readable_by) && origins.contains(readable_by));
    }
    if head.extensions.get::<Passed>().is_some() {
        return Ok(Response::new(Body::empty()));
    }
    if head.status == StatusCode::NO_CONTENT {
        assert!(is_subset(&origins, allowed), "preflight of {origins:?}");
        assert_eq!(body, "");
    } else {
        let told: serde_json::Value = serde_json::from_slice(&body).expect("our body is JSON");
        let row = told["code"].as_i64().and_then(service_code::find);
        let row = row.filter(|row| row.source() == "proxy");
        let row = row.expect("a code of ours");
        assert_eq!(head.status, row.status);
        assert_eq!(head.headers["kling-proxy-error"], row.kind);
    }
    Ok(Response::from_parts(head, Body::empty()))
}

/// Stands for everything behind the guard.
async fn upstream(request: Request, rules: &'static Reloadable<Rules>) -> Result<Response, Error> {
    let (head, body) = request.into_parts();
    keeps(&head, &rules.load());
    if let Ok(body) = body.collect().await {
        assert!(body.to_bytes().len() as u64 <= BODY);
    }
    let mut answer = Response::new(Body::empty());
    answer.extensions_mut().insert(Passed);
    Ok(answer)
}

/// Checks the rules a second time.
fn keeps(head: &request::Parts, rules: &Rules) {
    let values = |name: &str| -> Vec<_> { head.headers.get_all(name).iter().collect() };
    let hosts = values(HOST.as_str());
    let [host] = hosts[..] else {
        panic!("hosts: {hosts:?}")
    };
    let host = host.to_str().expect("a host is ASCII").to_ascii_lowercase();
    assert!(
        HOSTS.iter().any(|allowed| is_host(&host, allowed)),
        "{host}"
    );
    let authority = head.uri.authority().map(http::uri::Authority::as_str);
    assert!(authority.is_none_or(|authority| authority.eq_ignore_ascii_case(&host)));

    let origins = head
        .headers
        .get_all(ORIGIN)
        .iter()
        .cloned()
        .collect::<Vec<_>>();
    assert!(is_subset(&origins, &rules.allowed_origins), "{origins:?}");
    let sites = values("sec-fetch-site");
    let from_here = |site: &&HeaderValue| *site == "none" || *site == "same-origin";
    assert!(
        !origins.is_empty() || sites.iter().all(from_here),
        "{sites:?}"
    );

    assert!(head.method != Method::CONNECT && head.method != Method::TRACE);
    assert!(rules.allowed_methods.is_empty() || rules.allowed_methods.contains(&head.method));
    let codings = values(TRANSFER_ENCODING.as_str());
    assert!(
        codings
            .iter()
            .all(|coding| coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    );
    assert!(codings.len() <= 1);

    let path = head.uri.path();
    assert!(path.starts_with('/'), "{path}");
    assert!(
        rules.allowed_paths.is_empty() || is_below(path, &PATHS),
        "{path}"
    );
    assert!(rules.client_tokens.is_none() || shows_token(&head.headers));
}

fn is_host(host: &str, allowed: &str) -> bool {
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let rest = host.strip_prefix(allowed);
    rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port))
}

fn is_subset(some: &[HeaderValue], all: &[HeaderValue]) -> bool {
    some.iter().all(|one| all.contains(one))
}

/// Returns true if the path is below one of these prefixes, also for a server that decodes it again and
/// again, removes parameters and resolves it.
fn is_below(path: &str, prefixes: &[&str]) -> bool {
    let mut decoded = path.as_bytes().to_vec();
    for _ in 0..path.len() {
        decoded = self::decoded(&decoded);
    }
    let separators = |path: &[u8]| path.iter().filter(|b| b"/\\".contains(b)).count();
    let slashes = path.bytes().filter(|b| *b == b'/').count();
    let segments = decoded.split(|b| *b == b'/');
    let names = segments.map(|segment| segment.split(|b| *b == b';').next().unwrap_or_default());
    let names: Vec<_> = names.collect();
    let plain = separators(&decoded) == slashes
        && decoded.iter().all(|b| b.is_ascii_graphic() && *b != b'%')
        && !names.iter().any(|name| [&b"."[..], b".."].contains(name));
    let resolved = names.join(&b'/');
    let below = |prefix: &&str| {
        let prefix = prefix.trim_end_matches('/').as_bytes();
        let is_below = |path: &[u8]| {
            let rest = path.strip_prefix(prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        is_below(path.as_bytes()) && is_below(&resolved)
    };
    plain && prefixes.iter().any(below)
}

fn decoded(path: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        let digits = tail
            .get(..2)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let code = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(byte) if *first == b'%' => {
                decoded.push(byte);
                rest = &tail[2..];
            }
            _ => {
                decoded.push(*first);
                rest = tail;
            }
        }
    }
    decoded
}

fn shows_token(headers: &HeaderMap) -> bool {
    let header = headers.get("kling-proxy-token");
    let bearer = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let is_bearer = |token: &str| {
        let (scheme, shown) = bearer?.split_at_checked("Bearer ".len())?;
        Some(scheme.eq_ignore_ascii_case(b"Bearer ") && shown == token.as_bytes())
    };
    header.is_some_and(|header| header == TOKEN)
        || is_bearer(TOKEN) == Some(true)
        || is_bearer(JWT) == Some(true)
}

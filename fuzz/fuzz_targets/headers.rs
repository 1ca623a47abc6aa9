//! Fuzzes the headers: forbidden headers are removed, all others are unchanged, and upstream gets one
//! credential and one host, both ours.
//!
//! An input is lines of `name: value`.

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytesize::ByteSize;
use futures_util::FutureExt;
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue};
use kling_proxy::internals::{
    Attempt, AuthenticateLayer, Credential, Error, Metrics, ProxyRequest, ReplayBudget,
    ReplayLimits, ReplayableRequest, Secret, SystemClock, Tokens, Validity, strip_request,
    strip_response,
};
use libfuzzer_sys::fuzz_target;
use tower::{Layer, ServiceExt, service_fn};

const HOP_BY_HOP: [&str; 10] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
const OF_CLIENT: [&str; 13] = [
    "authorization",
    "cookie",
    "forwarded",
    "via",
    "x-http-method",
    "x-http-method-override",
    "x-method-override",
    "x-original-host",
    "x-original-method",
    "x-original-uri",
    "x-original-url",
    "x-real-ip",
    "x-rewrite-url",
];

/// Response headers that affect more than the response.
const OF_ORIGIN: [&str; 17] = [
    "accept-ch",
    "alt-svc",
    "clear-site-data",
    "critical-ch",
    "expect-ct",
    "nel",
    "origin-agent-cluster",
    "public-key-pins",
    "public-key-pins-report-only",
    "report-to",
    "reporting-endpoints",
    "service-worker-allowed",
    "set-cookie",
    "set-cookie2",
    "set-login",
    "strict-transport-security",
    "use-as-dictionary",
];
/// Headers that are added to a response that is not JSON.
const CONFINED: [(&str, &str); 2] = [
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "sandbox"),
];

/// Characters that may surround an element of a list.
const SPACE: [char; 2] = [' ', '\t'];

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Metrics::new().expect("metrics").into());

static AUTHENTICATE: LazyLock<AuthenticateLayer> = LazyLock::new(|| {
    let validity = Validity {
        lifetime: Duration::from_mins(30),
        not_before_leeway: Duration::from_secs(5),
        refresh_before: Duration::from_mins(5),
    };
    let credential = Credential::ApiKey(Secret::from("ours".to_owned()));
    let tokens = Tokens::new(
        credential,
        validity,
        Arc::new(SystemClock),
        Arc::clone(&METRICS),
    );
    AuthenticateLayer::new(Arc::new(tokens), HeaderValue::from_static("kling.test"))
});

static BUDGET: LazyLock<Arc<ReplayBudget>> = LazyLock::new(|| {
    let [body, memory] = [ByteSize::b(0); 2];
    Arc::new(ReplayBudget::new(
        ReplayLimits { body, memory },
        Arc::clone(&METRICS),
    ))
});

fuzz_target!(|input: &[u8]| {
    let headers = parse(input);
    let [mut asked, mut answered] = [(); 2].map(|()| headers.clone());
    strip_request(&mut asked, false);
    let is_json = strip_response(&mut answered);
    if !is_json {
        // These headers are added if a page could run.
        for (name, value) in CONFINED {
            assert_eq!(answered.get_all(name).iter().collect::<Vec<_>>(), [value]);
            answered.remove(name);
        }
    }
    let chunked = headers.contains_key("transfer-encoding");
    let lies = |name: &str| name == "content-length" && chunked;
    let of_client = |name: &str| {
        OF_CLIENT.contains(&name)
            || name.starts_with("kling-proxy-")
            || name.starts_with("x-forwarded-")
            || name.contains('_')
            || lies(name)
    };
    let of_proxy = |name: &str| {
        name.starts_with("kling-proxy-")
            || name.starts_with("access-control-")
            || OF_ORIGIN.contains(&name)
            || !is_json && CONFINED.iter().any(|(confined, _)| *confined == name)
            || lies(name)
    };
    let mut expected = without(&headers, of_client);
    encodings_agree(&mut expected, &asked);
    assert_eq!(lines(&asked), lines(&expected));
    assert_eq!(lines(&answered), lines(&without(&headers, of_proxy)));

    let mut sent = authenticated(headers);
    let ours = [(HOST, "kling.test"), (AUTHORIZATION, "Bearer ours")];
    for (name, value) in ours {
        let values: Vec<_> = sent.get_all(&name).iter().cloned().collect();
        assert_eq!(values, [value]);
        assert_eq!(values[0].is_sensitive(), name == AUTHORIZATION);
        sent.remove(&name);
        asked.remove(&name);
    }
    assert_eq!(lines(&sent), lines(&asked));
});

fn parse(input: &[u8]) -> HeaderMap {
    let lines = input.split(|b| *b == b'\n').filter_map(|line| {
        let colon = line.iter().position(|b| *b == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        Some((
            name,
            HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?,
        ))
    });
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        headers.append(name, value);
    }
    headers
}

/// Returns the headers that the rules leave, found line by line.
fn without(headers: &HeaderMap, forbidden: impl Fn(&str) -> bool) -> HeaderMap {
    let connection = headers.get_all("connection").iter();
    let named: Vec<_> = connection
        .flat_map(|line| line.as_bytes().split(|b| *b == b','))
        .map(|name| name.trim_ascii().to_ascii_lowercase())
        .collect();
    let kept = headers.iter().filter(|(name, _)| {
        let name = name.as_str();
        !HOP_BY_HOP.contains(&name)
            && !named.iter().any(|named| named == name.as_bytes())
            && !forbidden(name)
    });
    let mut left = HeaderMap::new();
    for (name, value) in kept {
        left.append(name, value.clone());
    }
    left
}

/// Checks the change of `Accept-Encoding`, and copies it to the expected headers.
fn encodings_agree(before: &mut HeaderMap, after: &HeaderMap) {
    let [asked, sent] = [&*before, after].map(encodings);
    assert_eq!(
        before.contains_key(ACCEPT_ENCODING),
        after.contains_key(ACCEPT_ENCODING)
    );
    let passes = |(name, refused): &(String, bool)| {
        let read = ["gzip", "x-gzip", "deflate", "identity"].contains(&&**name);
        read || (name == "*" && *refused)
    };
    assert!(sent.iter().all(passes), "{sent:?}");
    let changed = !asked.iter().all(passes);
    if changed {
        // An acceptable encoding is left, or only `identity` is asked for.
        assert!(sent.iter().any(|(_, refused)| !refused), "{sent:?}");
        if sent != [("identity".to_owned(), false)] {
            let mut sent = sent.iter();
            let mut kept = asked.iter().filter(|asked| passes(asked));
            assert!(kept.all(|asked| sent.any(|sent| sent == asked)));
        }
        before.remove(ACCEPT_ENCODING);
        for value in after.get_all(ACCEPT_ENCODING) {
            before.append(ACCEPT_ENCODING, value.clone());
        }
    }
}

/// Returns the name of each encoding, and true if its weight is 0.
fn encodings(headers: &HeaderMap) -> Vec<(String, bool)> {
    let lines = headers.get_all(ACCEPT_ENCODING).iter();
    let text = lines.map(|line| String::from_utf8_lossy(line.as_bytes()).to_ascii_lowercase());
    let text = text.collect::<Vec<_>>().join(",");
    let items = text.split(',').map(|item| item.trim_matches(SPACE));
    let items = items.filter(|item| !item.is_empty()).map(|item| {
        let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
        let zero = |parameter: &str| {
            let weight = parameter.trim_matches(SPACE).strip_prefix("q=0");
            weight.is_some_and(|rest| rest.trim_matches(['.', '0']).is_empty())
        };
        let refused = parameters.split(';').any(zero);
        (name.trim_matches(SPACE).to_owned(), refused)
    });
    items.collect()
}

/// Returns the names in alphabetical order, each with its values in their own order.
fn lines(headers: &HeaderMap) -> BTreeMap<&str, Vec<&[u8]>> {
    let names = headers.keys().map(HeaderName::as_str);
    names
        .map(|name| {
            (
                name,
                headers
                    .get_all(name)
                    .iter()
                    .map(HeaderValue::as_bytes)
                    .collect(),
            )
        })
        .collect()
}

/// Returns the headers that the service behind the layer gets.
fn authenticated(headers: HeaderMap) -> HeaderMap {
    let mut request = Request::default();
    *request.headers_mut() = headers;
    let inner = service_fn(|Attempt { request, .. }| async {
        let mut answer = Response::new(Body::empty());
        *answer.headers_mut() = request.into_parts().0.headers;
        Ok::<_, Error>(answer)
    });
    let request = ProxyRequest::untraced(request, &METRICS);
    let request = ReplayableRequest::new(request, &BUDGET, false);
    let answer = AUTHENTICATE.layer(inner).oneshot(request);
    let answer = answer.now_or_never().expect("it waits for nothing");
    answer.expect("there is a key").into_parts().0.headers
}

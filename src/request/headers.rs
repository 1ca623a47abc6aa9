//! Rules for the headers that pass the proxy, in both directions.

use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap,
    HeaderName, HeaderValue, TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
};

use crate::request::accept_encoding;

/// `User-Agent` of the requests that the proxy sends for itself.
pub const NAME: &str = concat!("kling-proxy/", env!("CARGO_PKG_VERSION"));

/// Header that lists the ids of the proxies that a request came through; see
/// [`Hop`](crate::layer::guard::hop).
pub const HOP: HeaderName = HeaderName::from_static("kling-proxy-hop");

/// Value of `X-Content-Type-Options`: the browser uses the declared media type and guesses no other.
const NO_SNIFF: HeaderValue = HeaderValue::from_static("nosniff");
/// Value of `Content-Security-Policy`: a page gets no origin, no scripts and no forms (Content Security
/// Policy, `sandbox`).
const NO_SCRIPTS: HeaderValue = HeaderValue::from_static("sandbox");

/// Removes the headers that must not reach upstream. If `is_marked`, the guard has added [`HOP`], and that
/// header stays.
pub fn strip_request(headers: &mut HeaderMap, is_marked: bool) {
    let mut is_readable = true;
    strip(headers, |name, value| {
        // This pass also reads `Accept-Encoding`. Usually all of its encodings are readable, and the header
        // need not be looked up again.
        if *name == ACCEPT_ENCODING {
            is_readable &= accept_encoding::is_readable(value);
            return false;
        }
        is_of_client(name) && !(is_marked && *name == HOP)
    });
    if !is_readable {
        accept_encoding::restrict(headers);
    }
}

/// Removes the headers that must not reach the client, and returns true if the body is JSON.
///
/// A body that is not JSON must not run as a page of `localhost`: headers are added so that a browser keeps
/// the declared media type and runs none of the page's scripts.
pub fn strip_response(headers: &mut HeaderMap) -> bool {
    let mut json = None;
    strip(headers, |name, value| {
        if *name == CONTENT_TYPE {
            json = Some(json.is_none() && is_json(value));
        }
        is_of_proxy(name)
    });
    let is_json = json == Some(true);
    if !is_json {
        headers.insert(X_CONTENT_TYPE_OPTIONS, NO_SNIFF);
        headers.insert(CONTENT_SECURITY_POLICY, NO_SCRIPTS);
    }
    is_json
}

/// Returns true if a `Content-Type` is JSON, or a format based on JSON (RFC 6839, section 3.1).
fn is_json(media_type: &HeaderValue) -> bool {
    let value = media_type.as_bytes();
    let end = value.iter().position(|b| *b == b';');
    let essence = value[..end.unwrap_or(value.len())].trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
        || essence
            .last_chunk()
            .is_some_and(|suffix: &[u8; 5]| suffix.eq_ignore_ascii_case(b"+json"))
}

/// Removes the headers that are for one hop only, and those that `is_forbidden` selects.
fn strip(headers: &mut HeaderMap, mut is_forbidden: impl FnMut(&HeaderName, &HeaderValue) -> bool) {
    let mut doomed = Vec::new();
    for (name, value) in &*headers {
        if !is_hop_by_hop(name) && !is_forbidden(name, value) {
            continue;
        }
        if *name == CONNECTION {
            // `Connection` makes each header that it names hop-by-hop (RFC 9110, section 7.6.1).
            let names = value.as_bytes().split(|b| *b == b',');
            doomed.extend(names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()));
        } else if *name == TRANSFER_ENCODING {
            // The chunks show the end of the body, and the length may be wrong (RFC 9112, section 6.3).
            doomed.push(CONTENT_LENGTH);
        }
        doomed.push(name.clone());
    }
    for name in doomed {
        headers.remove(name);
    }
}

/// Returns true for a hop-by-hop header of RFC 9110, section 7.6.1, or RFC 2616, section 13.5.1.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "http2-settings"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// Returns true for a header about the client: its credentials, its address, its options for the proxy. Names
/// with `_` count too, because some servers read `_` as `-`.
fn is_of_client(name: &HeaderName) -> bool {
    let text = name.as_str();
    matches!(
        text,
        "authorization" | "cookie" | "forwarded" | "via" | "x-real-ip"
    ) || text.starts_with("kling-proxy-")
        || text.starts_with("x-forwarded-")
        || is_override(text)
        || text.contains('_')
}

/// Returns true for a header that some servers obey in place of the method, target or host of a
/// request. With such a header, a request could pass the checks of `access.allowed_methods` and
/// `access.allowed_paths` with one method and path, and be carried out with others.
fn is_override(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("x-") else {
        return false;
    };
    matches!(
        rest,
        // Google, Microsoft and IBM use one name each. The README of npm's `method-override` 3.0.0 shows a
        // server that obeys all three.
        "http-method-override" | "http-method" | "method-override"
        // IIS obeys them with a rewrite module; Symfony obeyed them on any server (CVE-2018-14773).
        | "original-url" | "rewrite-url"
        // Services that authorize requests for nginx (`auth_request`) decide by these headers and by
        // `X-Original-URL`. The examples of nginx and of ingress-nginx set them.
        | "original-uri" | "original-method"
        // Azure Application Gateway puts the client's `Host` there, and the servers behind it read that.
        | "original-host"
    )
}

/// Returns true for a header that upstream must not set for a client: the proxy's own headers, headers that
/// decide which pages may read the response, and headers that act on the whole origin.
fn is_of_proxy(name: &HeaderName) -> bool {
    let text = name.as_str();
    text.starts_with("kling-proxy-") || text.starts_with("access-control-") || acts_on_origin(text)
}

/// Returns true for a header that affects more than its own response. For a browser, a response of upstream
/// comes from `localhost`. The browser would apply the header to every program of this machine that it
/// reaches under that name.
fn acts_on_origin(name: &str) -> bool {
    matches!(
        name,
        "accept-ch"
            | "alt-svc"
            | "clear-site-data"
            | "critical-ch"
            | "expect-ct"
            | "nel"
            | "origin-agent-cluster"
            | "public-key-pins"
            | "public-key-pins-report-only"
            | "report-to"
            | "reporting-endpoints"
            | "service-worker-allowed"
            | "set-cookie"
            | "set-cookie2"
            | "set-login"
            | "strict-transport-security"
            | "use-as-dictionary"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn whatever_connection_names_is_stripped() {
        for line in ["x-a", "close, x-a", " X-A ,", ",,x-a", "x-a;q=1, x-a"] {
            let mut headers = headers(&[("x-a", "1"), ("x-b", "2")]);
            headers.append(CONNECTION, "".parse().unwrap());
            headers.append(CONNECTION, line.parse().unwrap());
            strip_request(&mut headers, false);
            assert_eq!(names(&headers), ["x-b"], "{line:?}");
        }
    }

    #[test]
    fn a_request_keeps_its_ordinary_headers_only() {
        let mut headers = headers(&[
            ("accept-encoding", "gzip"),
            ("authorization", "Bearer x"),
            ("cookie", "a=b"),
            ("forwarded", "for=x"),
            ("keep-alive", "timeout=5"),
            ("kling-proxy-account", "x"),
            ("kling-proxy-token", "x"),
            ("proxy-authorization", "x"),
            ("te", "trailers"),
            ("via", "1.1 x"),
            ("x-forwarded-host", "x"),
            ("x-http-method", "DELETE"),
            ("x-http-method-override", "DELETE"),
            ("x-method-override", "DELETE"),
            ("x-original-host", "x"),
            ("x-original-method", "DELETE"),
            ("x-original-uri", "/x"),
            ("x-original-url", "/x"),
            ("x-real-ip", "1.2.3.4"),
            ("x-rewrite-url", "/x"),
            ("x_real_ip", "1.2.3.4"),
        ]);
        strip_request(&mut headers, false);
        assert_eq!(names(&headers), ["accept-encoding"]);
    }

    #[test]
    fn a_response_cannot_speak_for_the_proxy_or_for_its_host() {
        let mut headers = headers(&[
            ("etag", "a"),
            ("set-cookie", "a=b"),
            ("strict-transport-security", "max-age=31536000"),
            ("kling-proxy-error", "none"),
            ("upgrade", "h2c"),
            ("transfer-encoding", "chunked"),
            ("content-length", "5"),
            ("date", "today"),
        ]);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        strip_response(&mut headers);
        assert_eq!(names(&headers), ["etag", "content-type", "date"]);
    }

    #[test]
    fn what_is_not_json_cannot_run_as_a_page() {
        for (types, confined) in [
            (&["application/json"][..], false),
            (&["Application/JSON; charset=utf-8"], false),
            (&["application/problem+json"], false),
            (&["text/html"], true),
            (&["text/html;a=application/json"], true),
            (&["image/svg+xml"], true),
            (&["application/json", "text/html"], true),
            (&["application/json", "application/json"], true),
            (&[], true),
        ] {
            let types: Vec<_> = types.iter().map(|value| ("content-type", *value)).collect();
            let mut headers = headers(&types);
            headers.append(CONTENT_SECURITY_POLICY, HeaderValue::from_static("a"));
            strip_response(&mut headers);
            let policies = headers.get_all(CONTENT_SECURITY_POLICY).iter();
            let policies: Vec<_> = policies.collect();
            let told = headers.contains_key(X_CONTENT_TYPE_OPTIONS);
            assert_eq!(
                (policies == [NO_SCRIPTS], told),
                (confined, confined),
                "{types:?}"
            );
        }
    }
}

//! Which headers pass, in both directions.

use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap,
    HeaderName, HeaderValue, TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
};

use crate::request::accept_encoding;

/// Lists the proxies that a request came through, by id; see [`Hop`](crate::layer::guard::hop).
pub const HOP: HeaderName = HeaderName::from_static("kling-proxy-hop");

/// A type is what it says.
const NO_SNIFF: HeaderValue = HeaderValue::from_static("nosniff");
/// A page has no origin, no scripts and no forms (Content Security Policy, `sandbox`).
const NO_SCRIPTS: HeaderValue = HeaderValue::from_static("sandbox");

/// Removes what must not reach upstream. A request that is marked keeps its [`HOP`].
pub fn strip_request(headers: &mut HeaderMap, is_marked: bool) {
    let mut is_readable = true;
    strip(headers, |name, value| {
        // Seen in passing: mostly there is nothing to restrict, and nothing is looked up.
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

/// Removes what must not reach the client, and keeps what is not JSON from running as a page of
/// `localhost`: a browser takes its type as it is, and runs none of its scripts. Returns whether it is JSON.
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

/// Whether a `Content-Type` is that of JSON, or of a format made of it (RFC 6839, section 3.1).
fn is_json(media_type: &HeaderValue) -> bool {
    let value = media_type.as_bytes();
    let end = value.iter().position(|b| *b == b';');
    let essence = value[..end.unwrap_or(value.len())].trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
        || essence
            .last_chunk()
            .is_some_and(|suffix: &[u8; 5]| suffix.eq_ignore_ascii_case(b"+json"))
}

/// Removes what is for one hop only, and what is forbidden.
fn strip(headers: &mut HeaderMap, mut is_forbidden: impl FnMut(&HeaderName, &HeaderValue) -> bool) {
    let mut doomed = Vec::new();
    for (name, value) in &*headers {
        if !is_hop_by_hop(name) && !is_forbidden(name, value) {
            continue;
        }
        if *name == CONNECTION {
            // It makes those hop-by-hop that it names (RFC 9110, section 7.6.1).
            let names = value.as_bytes().split(|b| *b == b',');
            doomed.extend(names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok()));
        } else if *name == TRANSFER_ENCODING {
            // The chunks tell where the body ends, and the length may lie (RFC 9112, section 6.3).
            doomed.push(CONTENT_LENGTH);
        }
        doomed.push(name.clone());
    }
    for name in doomed {
        headers.remove(name);
    }
}

/// Those of RFC 9110, section 7.6.1, and RFC 2616, section 13.5.1.
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

/// What speaks of the client: its credentials, where it comes from, what it tells the proxy, and
/// names with `_`, which some servers read as `-`.
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
/// request. With such a header a request could pass `access.allowed_methods` and
/// `access.allowed_paths` as one thing and be carried out as another.
fn is_override(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("x-") else {
        return false;
    };
    matches!(
        rest,
        // Google, Microsoft and IBM have a name each; the README of npm's `method-override` 3.0.0
        // shows a server that obeys all three.
        "http-method-override" | "http-method" | "method-override"
        // IIS with a rewrite module; Symfony obeyed them on any server (CVE-2018-14773).
        | "original-url" | "rewrite-url"
        // Services that authorize requests for nginx (`auth_request`) judge by these and by
        // `X-ReplayableRequest-URL`, as nginx's own examples and ingress-nginx set them.
        | "original-uri" | "original-method"
        // Azure Application Gateway keeps the client's `Host` there, and what is behind it reads that.
        | "original-host"
    )
}

/// What only this proxy may say to a client: its own headers, and which pages may read the answer.
fn is_of_proxy(name: &HeaderName) -> bool {
    let text = name.as_str();
    text.starts_with("kling-proxy-") || text.starts_with("access-control-") || acts_on_origin(text)
}

/// Returns true for a header that acts on more than its own answer. A browser takes upstream's answer
/// for one of `localhost`, and would keep the effect for every program of this machine that it finds
/// under that name.
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

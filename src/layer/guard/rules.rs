//! Rules about the head of a request, in the order in which the guard checks them.

use std::sync::Arc;

use bytesize::ByteSize;
use http::header::{HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, TRANSFER_ENCODING};
use http::{Method, Uri};
use percent_encoding::percent_decode;

use super::refusal;
use crate::auth::client_token::{Client, ClientTokens};
use crate::error::{Error, TokenSource};
use crate::kling::api_path::is_under;

/// Rules that decide if a request is forwarded.
#[derive(Clone)]
pub struct Rules {
    /// Accepted host names, without port (`access.allowed_hosts`).
    pub allowed_hosts: Vec<String>,
    /// Web origins whose pages may send requests (`access.allowed_origins`).
    pub allowed_origins: Vec<HeaderValue>,
    /// Methods that are forwarded; all if empty (`access.allowed_methods`).
    pub allowed_methods: Vec<Method>,
    /// Prefixes of paths that are forwarded, compared by whole segments; all paths if empty
    /// (`access.allowed_paths`).
    pub allowed_paths: Vec<String>,
    /// Accepted client tokens; `None` if anyone who can connect may send requests.
    pub client_tokens: Option<Arc<ClientTokens>>,
    /// Largest request body, in bytes (`limits.request_body`).
    pub request_body: ByteSize,
    /// Most requests in flight at once (`limits.in_flight`).
    pub in_flight: u64,
    /// Decides what a refusal advises.
    pub purpose: Purpose,
}

/// The listener that rules are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Any client: the settings say who may call.
    Serve,
    /// The admin listener, which admits no page of another origin.
    Admin,
    /// The command of `run` alone, whatever the settings say.
    Run,
}

/// Whether a page asks, and of which site (Fetch Metadata, section 2.4).
pub(super) const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// In bytes. No registered method has more than 17; hyper takes any that fits into a head.
const LONGEST_METHOD: usize = 32;

// === impl Rules ===

impl Rules {
    /// Returns the rules for the admin listener: the same hosts, and no page of another origin.
    #[must_use]
    pub fn for_admin(&self) -> Self {
        Self {
            purpose: Purpose::Admin,
            ..Self::of_hosts(self.allowed_hosts.clone(), Vec::new(), ByteSize::b(0))
        }
    }

    /// Makes rules that restrict only the hosts, the origins and the size of the body.
    pub fn of_hosts(
        allowed_hosts: Vec<String>,
        allowed_origins: Vec<HeaderValue>,
        request_body: ByteSize,
    ) -> Self {
        Self {
            allowed_hosts,
            allowed_origins,
            allowed_methods: Vec::new(),
            allowed_paths: Vec::new(),
            client_tokens: None,
            request_body,
            in_flight: u64::MAX,
            purpose: Purpose::Serve,
        }
    }

    /// Checks that there is exactly one `Host` header, and that it names an allowed host. No other
    /// header can name the host.
    ///
    /// # Errors
    ///
    /// [`Error::HostNotAllowed`].
    pub fn check_host(&self, headers: &HeaderMap) -> Result<(), Error> {
        let mut hosts = headers.get_all(HOST).into_iter();
        let refusal = |message: &str| Err(Error::HostNotAllowed(message.to_owned()));
        match (hosts.next(), hosts.next()) {
            (Some(host), None) => match host.to_str().ok().and_then(without_port) {
                Some(name) if self.allows(name) => Ok(()),
                name => Err(refusal::of_host(self, host, name)),
            },
            (None, _) => refusal("the request has no `Host` header"),
            (Some(_), Some(_)) => refusal("the request has more than one `Host` header"),
        }
    }

    /// Checks `Origin` and `Sec-Fetch-Site`. Only browsers send these headers, and a page cannot forge
    /// them.
    ///
    /// # Errors
    ///
    /// [`Error::OriginNotAllowed`].
    pub fn check_origin(&self, headers: &HeaderMap) -> Result<(), Error> {
        let from_this_site =
            |site: &HeaderValue| [&b"none"[..], b"same-origin"].contains(&site.as_bytes());
        let is_listed = |origin: &HeaderValue| self.allowed_origins.contains(origin);
        let mut origins = headers.get_all(ORIGIN).iter();
        let allowed = match origins.next() {
            Some(origin) => is_listed(origin) && origins.all(is_listed),
            None => headers.get_all(SEC_FETCH_SITE).iter().all(from_this_site),
        };
        if allowed {
            Ok(())
        } else {
            Err(refusal::of_page(self, headers))
        }
    }

    /// Checks that a method may be forwarded.
    ///
    /// # Errors
    ///
    /// [`Error::MethodNotAllowed`].
    pub fn check_method(&self, method: &Method) -> Result<(), Error> {
        if self.allowed_methods.is_empty() || self.allowed_methods.contains(method) {
            Ok(())
        } else {
            Err(Error::MethodNotAllowed)
        }
    }

    /// Checks that a path is allowed in both forms: as it is forwarded, and as a server might resolve
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::PathNotAllowed`].
    pub fn check_path(&self, path: &str) -> Result<(), Error> {
        if self.allowed_paths.is_empty() {
            return Ok(());
        }
        let is_listed = |path: &str| {
            let mut prefixes = self.allowed_paths.iter();
            prefixes.any(|prefix| is_under(path, prefix.trim_end_matches('/')))
        };
        if is_listed(path) && resolved(path).is_some_and(|path| is_listed(&path)) {
            Ok(())
        } else {
            Err(Error::PathNotAllowed)
        }
    }

    /// Returns the client whose token the request carries; `None` if no tokens are configured.
    ///
    /// # Errors
    ///
    /// [`Error::ClientTokenInvalid`].
    pub fn check_client(&self, headers: &HeaderMap) -> Result<Option<&Client>, Error> {
        let Some(tokens) = &self.client_tokens else {
            return Ok(None);
        };
        let client = tokens.admit(headers).ok_or_else(|| {
            Error::ClientTokenInvalid(match self.purpose {
                Purpose::Run => TokenSource::Run,
                Purpose::Serve | Purpose::Admin => TokenSource::File,
            })
        })?;
        Ok(Some(client))
    }

    fn allows(&self, name: &str) -> bool {
        self.allowed_hosts
            .iter()
            .any(|allowed| allowed.eq_ignore_ascii_case(name))
    }
}

/// Returns the host of `host[:port]`; `None` if the text does not have that form.
fn without_port(authority: &str) -> Option<&str> {
    let end = match authority.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (name, port) = authority.split_at(end);
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    (port.is_empty() || port.strip_prefix(':').is_some_and(is_port)).then_some(name)
}

/// A name or an address, as a `Host` header has it before the port.
pub fn is_host(host: &str) -> bool {
    let port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.ends_with(']'));
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._[]:".contains(&b);
    !host.is_empty() && !port && host.bytes().all(plain)
}

/// Scheme, host and port as browsers send them, and nothing else. `null` is the origin of files and
/// sandboxed frames, which anyone can be.
pub fn is_web_origin(origin: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-._[]:".contains(&b);
    origin.split_once("://").is_some_and(|(scheme, host)| {
        !scheme.is_empty() && !host.is_empty() && scheme.bytes().chain(host.bytes()).all(plain)
    })
}

/// As often a path may be encoded: no client encodes one twice, and each time costs as much as the first.
const MOST_ENCODINGS: usize = 4;

/// Resolves a path as a server might: decodes it until nothing is left to decode, since a server behind
/// a server may decode again, and removes the part of a segment from `;` on, as servlets do.
///
/// Returns `None` if servers would not agree on the result: if a part stays encoded or becomes a
/// separator, if a byte is not a visible ASCII character (overlong and full-width forms of `.` and `/`
/// are not), or if a segment is `.` or `..`, which leads to another path.
fn resolved(path: &str) -> Option<String> {
    let mut decoded = path.as_bytes().to_vec();
    for _ in 0..MOST_ENCODINGS {
        decoded = percent_decode(&decoded).collect();
    }
    let decoded = String::from_utf8(decoded).ok()?;
    let is_plain = |b: u8| b.is_ascii_graphic() && b != b'%' && b != b'\\';
    if !decoded.bytes().all(is_plain) || decoded.split('/').count() != path.split('/').count() {
        return None;
    }
    let names = decoded.split('/').map(|segment| {
        let (name, _parameters) = segment.split_once(';').unwrap_or((segment, ""));
        (![".", ".."].contains(&name)).then_some(name)
    });
    let names: Option<Vec<_>> = names.collect();
    Some(names?.join("/"))
}

/// Checks that a method is not one that no settings allow. `CONNECT` is refused, because a tunnel could lead
/// anywhere, and `TRACE`, because its response would show the headers that the proxy added.
///
/// # Errors
///
/// [`Error::MethodNotAllowed`].
pub fn check_known_method(method: &Method) -> Result<(), Error> {
    let never =
        [Method::CONNECT, Method::TRACE].contains(method) || method.as_str().len() > LONGEST_METHOD;
    if never {
        Err(Error::MethodNotAllowed)
    } else {
        Ok(())
    }
}

/// Checks that the request target is a path on this proxy. A target in absolute form must name the same
/// host as `Host`.
///
/// # Errors
///
/// [`Error::BadRequest`].
pub fn check_target(target: &Uri, headers: &HeaderMap) -> Result<(), Error> {
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

/// Checks that the transfer coding is exactly one `chunked`, or absent. hyper accepts `gzip, chunked`
/// too, but it removes only `chunked`, and the forwarded body would no longer be marked as `gzip`.
///
/// # Errors
///
/// [`Error::BadRequest`].
pub fn check_framing(headers: &HeaderMap) -> Result<(), Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(allowed_paths: &[&str]) -> Rules {
        Rules {
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            allowed_methods: Vec::new(),
            allowed_paths: allowed_paths.iter().map(ToString::to_string).collect(),
            client_tokens: None,
            request_body: ByteSize::mib(1),
            in_flight: 1,
            purpose: Purpose::Serve,
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
            ("/v1/videos/a;b=1/c", true),
            ("/v1/videos/%61%2561", true),
            ("/v1/videos;a", false),
            ("/v1/%76ideos", false),
            ("/v1/videos/..;/images", false),
            ("/v1/videos/.;a=b/x", false),
            ("/v1/videos/..%3b/images", false),
            ("/v1/videos/%252e%252e/images", false),
            ("/v1/videos/%25252e./images", false),
            ("/v1/videos/a%252fb", false),
            ("/v1/videos/%c0%ae%c0%ae/images", false),
            ("/v1/videos/%c0%afimages", false),
            ("/v1/videos/%ef%bc%8e%ef%bc%8e/images", false),
            ("/v1/videos/\u{ff0e}\u{ff0e}/images", false),
            ("/v1/videos/%e4%bd%a0", false),
            ("/v1/videos/a%00", false),
            ("/v1/videos/a%0a", false),
            ("/v1/videos/a%20b", false),
            ("/v1/videos/a%7f", false),
            ("/v1/videos/%u002e%u002e/images", false),
            ("/v1/videos/%", false),
            ("/v1/videos/%25252561", true),
            // Encoded once more than is decoded: the rest that is still encoded is refused.
            ("/v1/videos/%2525252561", false),
        ] {
            for entry in ["/v1/videos", "/v1/videos/"] {
                let outcome = rules(&["/account/costs", entry]).check_path(path);
                assert_eq!(outcome.is_ok(), allowed, "{path} by {entry}");
            }
            assert!(rules(&[]).check_path(path).is_ok(), "{path} without a list");
            let root = rules(&["/"]).check_path(path);
            assert_eq!(root.is_ok(), resolved(path).is_some(), "{path} by /");
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

//! The origin of upstream, which all requests are sent to.

use std::fmt;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri};

/// Scheme and authority of `upstream.url`. All requests go there, and nothing in a request can change that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    scheme: Scheme,
    authority: Authority,
    host: HeaderValue,
}

/// Reasons why a URL is no [`Origin`].
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The text is not a URL with a host and the scheme `http` or `https`.
    #[error("want a URL such as https://api-singapore.klingai.com")]
    NotAUrl,
    /// The URL has more parts than an origin: a path, a query, a fragment or a user.
    #[error("want scheme and host only: no path, query or user")]
    MoreThanOrigin,
    /// The URL is plain http to another machine: the key would travel in the clear.
    #[error("want https: plain http is accepted for loopback only")]
    Insecure,
}

// === impl Origin ===

impl Origin {
    /// Returns true if the origin is authenticated (https).
    pub fn is_secure(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// Returns the origin as a `Host` value.
    pub fn host(&self) -> HeaderValue {
        self.host.clone()
    }

    /// Returns the name or address to connect to, without brackets, and the port.
    pub fn name_and_port(&self) -> (&str, u16) {
        let default = if self.is_secure() { 443 } else { 80 };
        let port = self.authority.port_u16().unwrap_or(default);
        (without_brackets(self.authority.host()), port)
    }

    /// Returns the name or address to connect to, with the brackets that an IPv6 address needs before a port.
    pub(super) fn bracketed_name(&self) -> &str {
        self.authority.host()
    }

    /// Returns the port to connect to, if the origin is on this machine.
    pub fn loopback_port(&self) -> Option<u16> {
        let (name, port) = self.name_and_port();
        is_loopback(name).then_some(port)
    }

    /// Returns the absolute URI of a path and query on this origin.
    pub(super) fn uri(&self, path_and_query: PathAndQuery) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path_and_query);
        // A URI with a scheme, an authority and a path is absolute, so this does not fail.
        Uri::from_parts(parts).unwrap_or_default()
    }
}

impl std::str::FromStr for Origin {
    type Err = OriginError;

    fn from_str(url: &str) -> Result<Self, OriginError> {
        let uri: Uri = url.parse().map_err(|_| OriginError::NotAUrl)?;
        let parts = uri.into_parts();
        let (Some(scheme), Some(authority)) = (parts.scheme, parts.authority) else {
            return Err(OriginError::NotAUrl);
        };
        if scheme != Scheme::HTTPS && scheme != Scheme::HTTP || authority.host().is_empty() {
            return Err(OriginError::NotAUrl);
        }
        let path = parts
            .path_and_query
            .as_ref()
            .map_or("", PathAndQuery::as_str);
        if !matches!(path, "" | "/") || authority.as_str().contains('@') || url.contains('#') {
            return Err(OriginError::MoreThanOrigin);
        }
        if scheme == Scheme::HTTP && !is_loopback(authority.host()) {
            return Err(OriginError::Insecure);
        }
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| OriginError::NotAUrl)?;
        Ok(Self {
            scheme,
            authority,
            host,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || without_brackets(host)
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Removes the brackets around an IPv6 address, which stand there if a port may follow.
pub(super) fn without_brackets(host: &str) -> &str {
    host.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_https_or_loopback_and_nothing_more() {
        for (url, outcome) in [
            (
                "https://api-singapore.klingai.com",
                "https://api-singapore.klingai.com",
            ),
            (
                "https://api-beijing.klingai.com/",
                "https://api-beijing.klingai.com",
            ),
            ("https://example.test:8443", "https://example.test:8443"),
            ("http://127.0.0.1:80", "http://127.0.0.1:80"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            ("http://LocalHost:1", "http://LocalHost:1"),
            (
                "http://api-singapore.klingai.com",
                "want https: plain http is accepted for loopback only",
            ),
            (
                "http://127.0.0.1.nip.io",
                "want https: plain http is accepted for loopback only",
            ),
            (
                "http://localhost.evil.test",
                "want https: plain http is accepted for loopback only",
            ),
            (
                "https://example.test/v1",
                "want scheme and host only: no path, query or user",
            ),
            (
                "https://example.test?a",
                "want scheme and host only: no path, query or user",
            ),
            (
                "https://example.test#a",
                "want scheme and host only: no path, query or user",
            ),
            (
                "https://user:pass@example.test",
                "want scheme and host only: no path, query or user",
            ),
            (
                "ftp://example.test",
                "want a URL such as https://api-singapore.klingai.com",
            ),
            (
                "example.test",
                "want a URL such as https://api-singapore.klingai.com",
            ),
            (
                "/path",
                "want a URL such as https://api-singapore.klingai.com",
            ),
            ("", "want a URL such as https://api-singapore.klingai.com"),
        ] {
            let parsed = url.parse::<Origin>();
            let actual = parsed.map_or_else(|error| error.to_string(), |origin| origin.to_string());
            assert_eq!(actual, outcome, "{url:?}");
        }
    }
}

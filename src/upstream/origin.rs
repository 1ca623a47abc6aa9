//! Where requests go.

use std::fmt;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri};

/// The proxy's own `User-Agent`, for requests that it sends for itself.
pub const NAME: &str = concat!("kling-proxy/", env!("CARGO_PKG_VERSION"));

/// Where requests go: scheme and authority of `upstream.url`, and nothing a request says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    scheme: Scheme,
    authority: Authority,
    host: HeaderValue,
}

/// Why a URL is no [`Origin`].
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// It is not a URL, or not one of `http` or `https`.
    #[error("want a URL such as https://api-singapore.klingai.com")]
    NotAUrl,
    /// It says more than an origin may.
    #[error("want scheme and host only: no path, query or user")]
    MoreThanOrigin,
    /// The key would travel in the clear.
    #[error("want https: plain http is accepted for loopback only")]
    Insecure,
}

// === impl Origin ===

impl Origin {
    /// Returns true if the origin is authenticated (https).
    pub fn is_secure(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// The origin as a `Host` value.
    pub fn host(&self) -> HeaderValue {
        self.host.clone()
    }

    /// The name or address to connect to, without brackets, and the port.
    pub fn name_and_port(&self) -> (&str, u16) {
        let default = if self.is_secure() { 443 } else { 80 };
        let port = self.authority.port_u16().unwrap_or(default);
        (without_brackets(self.authority.host()), port)
    }

    /// The name or address to connect to, as it stands before a port.
    pub(super) fn bracketed_name(&self) -> &str {
        self.authority.host()
    }

    /// The port to connect to, where that is of this machine itself.
    pub fn loopback_port(&self) -> Option<u16> {
        let (name, port) = self.name_and_port();
        is_loopback(name).then_some(port)
    }

    /// The absolute URI of a path and query there.
    pub(super) fn uri(&self, path_and_query: PathAndQuery) -> Uri {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(path_and_query);
        // All three are there, which is what makes a URI absolute.
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

/// An IPv6 address stands in brackets where a port may follow.
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

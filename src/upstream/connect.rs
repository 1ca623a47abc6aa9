//! Connections to the one upstream: name resolution, TCP, TLS, and the version that ALPN chose.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connection as _, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{AlertDescription, ClientConfig};
use tokio::net::TcpStream;
use tower::{Service, ServiceExt};

use super::egress::{EgressProxy, Tcp};
use crate::error::BoxError;
use crate::quiet::{Awaited, Quiet};

/// How often TCP, or HTTP/2, asks a silent peer whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Receive windows of HTTP/2: a result file moves at full speed over a long way.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// As much of an upload as is encrypted for one system call, in bytes. It is rustls that would take
/// no more than 64 KiB.
const SEND_BUFFER: usize = 256 << 10;

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

type Stream = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Makes connections.
#[derive(Clone)]
pub(super) struct Connector {
    /// Of whichever version upstream likes best.
    any: HttpsConnector<Tcp>,
    /// Of HTTP/1.1.
    http1: HttpsConnector<Tcp>,
    origin: Arc<Origin>,
    ping_while_idle: bool,
}

/// The sending side of a connection.
pub(super) enum Connection {
    /// One request at a time.
    Http1(http1::SendRequest<Body>),
    /// Many at a time; needs scheme and authority for each.
    Http2(http2::SendRequest<Body>, Arc<Origin>),
}

/// Waits for the answer to what was sent. Boxed, since it has room for the request, if that comes
/// back.
pub(super) type Sent =
    Pin<Box<dyn Future<Output = Result<http::Response<Incoming>, TrySendError<Request>>> + Send>>;

// === impl Origin ===

impl Origin {
    /// Whether what comes from there is known to come from there.
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

    fn uri(&self, path_and_query: PathAndQuery) -> Uri {
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

// === impl Connector ===

impl Connector {
    pub(super) fn new(
        origin: &Origin,
        proxy: Option<EgressProxy>,
        tls: &ClientConfig,
        idle: Duration,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(KEEP_ALIVE));
        // Nobody else notices that an upstream has answered and reads no further.
        #[cfg(target_os = "linux")]
        tcp.set_tcp_user_timeout(Some(idle));
        let proxy = proxy.and_then(|proxy| proxy.leading_to(origin));
        let tcp = Tcp::new(tcp, proxy, origin);
        let offering = |protocols: &[&[u8]]| {
            let mut tls = tls.clone();
            tls.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            HttpsConnector::from((tcp.clone(), tls))
        };
        Self {
            any: offering(&[b"h2", b"http/1.1"]),
            http1: offering(&[b"http/1.1"]),
            origin: Arc::new(origin.clone()),
            ping_while_idle: false,
        }
    }

    /// Makes HTTP/2 connections that ask upstream whether it is still there although nobody uses
    /// them.
    pub(super) fn pinging(mut self) -> Self {
        self.ping_while_idle = true;
        self
    }

    /// The origin as a `Host` value.
    pub(super) fn host(&self) -> HeaderValue {
        self.origin.host()
    }

    /// A connection of whichever version upstream likes best.
    pub(super) async fn connect(&self) -> Result<Connection, BoxError> {
        let stream = self.stream(&self.any).await?;
        if stream.connected().is_negotiated_h2() {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .keep_alive_interval(KEEP_ALIVE)
                .keep_alive_while_idle(self.ping_while_idle)
                .handshake(stream)
                .await?;
            tokio::spawn(connection);
            Ok(Connection::Http2(sender, Arc::clone(&self.origin)))
        } else {
            Ok(Connection::Http1(http1_on(stream).await?))
        }
    }

    /// A connection of HTTP/1.1; `None` where upstream does not speak that.
    pub(super) async fn connect_http1(&self) -> Result<Option<http1::SendRequest<Body>>, BoxError> {
        match self.stream(&self.http1).await {
            Ok(stream) => Ok(Some(http1_on(stream).await?)),
            Err(error) if is_protocol_refused(&*error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn stream(&self, by: &HttpsConnector<Tcp>) -> Result<Stream, BoxError> {
        let root = self.origin.uri(PathAndQuery::from_static("/"));
        let mut stream = by.clone().ready().await?.call(root).await?;
        if let MaybeHttpsStream::Https(tls) = &mut stream {
            let (_, session) = tls.inner_mut().get_mut();
            session.set_buffer_limit(Some(SEND_BUFFER));
        }
        Ok(stream)
    }
}

async fn http1_on(stream: Stream) -> Result<http1::SendRequest<Body>, BoxError> {
    let (sender, connection) = http1::handshake(Awaited::new(stream)).await?;
    tokio::spawn(Quiet::new(connection));
    Ok(sender)
}

/// Whether upstream ended the handshake because it speaks none of the offered protocols (RFC 7301,
/// section 3.2).
fn is_protocol_refused(error: &(dyn std::error::Error + 'static)) -> bool {
    let refused = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    // I/O errors are wrapped into one another on the way.
    let mut wrapping = error.downcast_ref::<io::Error>();
    while let Some(cause) = wrapping.and_then(io::Error::get_ref) {
        if let Some(cause) = cause.downcast_ref::<rustls::Error>() {
            return *cause == refused;
        }
        wrapping = cause.downcast_ref();
    }
    false
}

// === impl Connection ===

impl Connection {
    /// Sends a request. An error that holds the request says that nothing of it was sent.
    ///
    /// Dropping the future before the answer closes the connection (HTTP/1.1) or resets the stream
    /// (HTTP/2), so that a body cut short never looks complete.
    pub(super) fn send(&mut self, mut request: Request) -> Sent {
        match self {
            Self::Http1(sender) => {
                *request.version_mut() = Version::HTTP_11;
                if request.uri().authority().is_some() {
                    *request.uri_mut() = Uri::from(path_and_query(&request));
                }
                if request.body().size_hint().exact().is_none() {
                    // hyper would send a GET without its body otherwise.
                    let chunked = HeaderValue::from_static("chunked");
                    request.headers_mut().insert(TRANSFER_ENCODING, chunked);
                }
                Box::pin(sender.try_send_request(request))
            }
            Self::Http2(sender, origin) => {
                *request.version_mut() = Version::HTTP_2;
                *request.uri_mut() = origin.uri(path_and_query(&request));
                // `:authority` says it (RFC 9113, section 8.3.1).
                request.headers_mut().remove(HOST);
                Box::pin(sender.try_send_request(request))
            }
        }
    }
}

fn path_and_query(request: &Request) -> PathAndQuery {
    // The guard has seen that there is a path.
    request
        .uri()
        .path_and_query()
        .cloned()
        .unwrap_or(PathAndQuery::from_static("/"))
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

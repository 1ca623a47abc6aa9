//! Byte streams to upstream: name resolution, TCP, a tunnel if there is an egress proxy, and TLS.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::egress::{EgressProxy, TunnelError};
use super::origin::Origin;
use super::tcp;
use crate::error::BoxError;

/// Opens byte streams to upstream. [`Network`] uses the real network; a simulation has its own
/// implementation.
pub trait Dial: Send + Sync + 'static {
    /// Opens a stream on which upstream may choose one of these versions of HTTP.
    fn dial(&self, versions: Versions) -> Dialing<'_>;
}

/// Waits for a stream to open.
///
/// Fails with [`NoHttp1`] if upstream does not speak HTTP/1.1 and nothing else was offered.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<Transport, BoxError>> + Send + 'a>>;

/// The versions of HTTP that upstream may choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versions {
    /// HTTP/1.1 only, where each connection serves one request at a time.
    Http1,
    /// HTTP/2 or HTTP/1.1, as upstream prefers.
    Any,
}

/// An open byte stream to upstream.
pub struct Transport {
    /// The stream, encrypted if the origin is https.
    pub io: Box<dyn Stream>,
    /// True if upstream chose HTTP/2.
    pub is_http2: bool,
}

/// A byte stream in both directions.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

/// Error of a handshake in which upstream refused HTTP/1.1.
#[derive(Debug, thiserror::Error)]
#[error("upstream does not speak HTTP/1.1")]
pub struct NoHttp1(#[source] pub BoxError);

/// Opens byte streams over the real network.
pub struct Network {
    origin: Origin,
    egress: Option<EgressProxy>,
    /// TLS connector that offers HTTP/1.1 only.
    http1: TlsConnector,
    /// TLS connector that offers HTTP/2 and HTTP/1.1.
    any: TlsConnector,
    /// Longest time that the peer may leave sent data unacknowledged.
    idle: Duration,
}

/// Most bytes of an upload that are encrypted for one system call. By default rustls takes no more than 64
/// KiB.
const SEND_BUFFER: usize = 256 << 10;

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

// === impl Network ===

impl Network {
    /// Creates a dialler for `origin`, through `egress` if the origin is https.
    pub fn new(
        origin: &Origin,
        egress: Option<EgressProxy>,
        tls: &ClientConfig,
        idle: Duration,
    ) -> Self {
        let offering = |protocols: &[&[u8]]| {
            let mut tls = tls.clone();
            tls.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            TlsConnector::from(Arc::new(tls))
        };
        Self {
            origin: origin.clone(),
            egress: egress.and_then(|egress| egress.leading_to(origin)),
            http1: offering(&[b"http/1.1"]),
            any: offering(&[b"h2", b"http/1.1"]),
            idle,
        }
    }

    async fn connect(&self, versions: Versions) -> Result<Transport, BoxError> {
        let stream = match &self.egress {
            None => tcp::connect(self.origin.name_and_port(), self.idle).await?,
            Some(egress) => {
                let stream = tcp::connect(egress.name_and_port(), self.idle).await;
                let stream = stream.map_err(|error| TunnelError::Unreachable(error.into()))?;
                egress.open_tunnel(stream, &self.origin).await?
            }
        };
        if !self.origin.is_secure() {
            return Ok(Transport {
                io: Box::new(stream),
                is_http2: false,
            });
        }
        let (name, _) = self.origin.name_and_port();
        let name = ServerName::try_from(name.to_owned())?;
        let connector = match versions {
            Versions::Http1 => &self.http1,
            Versions::Any => &self.any,
        };
        let mut stream = match connector.connect(name, stream).await {
            Ok(stream) => stream,
            Err(error) if is_protocol_refused(&error) => return Err(NoHttp1(error.into()).into()),
            Err(error) => return Err(error.into()),
        };
        let (_, session) = stream.get_mut();
        session.set_buffer_limit(Some(SEND_BUFFER));
        let is_http2 = session.alpn_protocol() == Some(b"h2");
        Ok(Transport {
            io: Box::new(stream),
            is_http2,
        })
    }
}

impl Dial for Network {
    fn dial(&self, versions: Versions) -> Dialing<'_> {
        Box::pin(self.connect(versions))
    }
}

/// Returns true if upstream ended the handshake because it speaks none of the offered protocols
/// (RFC 7301, section 3.2).
fn is_protocol_refused(error: &io::Error) -> bool {
    let refused = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    cause == Some(&refused)
}

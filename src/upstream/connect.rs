//! Connections to upstream over HTTP/1.1 or HTTP/2, and the operations on one connection.

use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::PathAndQuery;
use http::{HeaderValue, Uri, Version};
use http_body::Body as _;
use hyper::body;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;

use super::dial::{Dial, NoHttp1, Transport, Versions};
use super::egress::final_status;
use super::flush::{FlushTracker, Flushed};
use super::http2;
use super::incoming::Incoming;
use super::origin::Origin;
use super::send_error::SendError;
use super::upload::Progress;
use crate::error::BoxError;

/// Most bytes that an HTTP/1.1 connection buffers for reading, and most for writing. This is less than for
/// the connection of a client, because responses are small, and each response that its client does not read
/// occupies a buffer.
const LARGEST_BUFFER: usize = 16 << 10;

/// Makes connections to upstream, of either version of HTTP.
#[derive(Clone)]
pub(super) struct Connector {
    dial: Arc<dyn Dial>,
    origin: Arc<Origin>,
    ping_while_idle: bool,
    /// True if the last attempt failed in a way that another attempt would not change.
    is_refused: Arc<AtomicBool>,
}

/// A new connection that no request uses yet.
pub(super) enum Connected {
    Http1(Http1),
    Http2(http2::Sender),
}

/// The sending side of a connection, for one request.
pub(super) enum Connection {
    /// The whole connection, which no other request uses.
    Http1(Http1),
    /// One stream of the connection. Boxed, because most connections are of HTTP/1.1.
    Http2(Box<Http2>),
}

/// A free stream of an HTTP/2 connection.
pub(super) struct Http2 {
    connection: http2::Sender,
    /// The reserved stream; `None` once it is used.
    slot: Option<http2::Slot>,
    /// Scheme and authority, which each request over HTTP/2 needs.
    origin: Arc<Origin>,
}

/// The sending side of an HTTP/1.1 connection.
pub(super) struct Http1 {
    pub(super) sender: http1::SendRequest<Body>,
    flushed: Flushed,
}

/// Waits for the response to a request that was sent. If it is dropped before, it closes the connection
/// (HTTP/1.1) or resets the stream (HTTP/2), so that a body cut short never looks complete. Boxed, because it
/// has room for the request, which may come back unsent.
pub(super) enum Sent {
    Http1(PendingResponse<body::Incoming, TrySendError<Request>>),
    Http2(PendingResponse<http2::Body, SendError>),
}

type PendingResponse<B, E> = Pin<Box<dyn Future<Output = Result<http::Response<B>, E>> + Send>>;

// === impl Connector ===

impl Connector {
    pub(super) fn new(dial: Arc<dyn Dial>, origin: &Origin) -> Self {
        Self {
            dial,
            origin: Arc::new(origin.clone()),
            ping_while_idle: false,
            is_refused: Arc::default(),
        }
    }

    /// Makes HTTP/2 connections ping upstream even while no request uses them.
    pub(super) fn pinging(mut self) -> Self {
        self.ping_while_idle = true;
        self
    }

    /// Returns the origin as a `Host` value.
    pub(super) fn host(&self) -> HeaderValue {
        self.origin.host()
    }

    pub(super) fn origin(&self) -> Arc<Origin> {
        Arc::clone(&self.origin)
    }

    /// Connects with the version of HTTP that upstream prefers.
    pub(super) async fn connect(&self) -> Result<Connected, BoxError> {
        let Transport { io, is_http2 } = self.dial(Versions::Any).await?;
        if is_http2 {
            let sender = http2::Sender::handshake(io, self.ping_while_idle).await?;
            Ok(Connected::Http2(sender))
        } else {
            Ok(Connected::Http1(Http1::handshake(io).await?))
        }
    }

    /// Connects over HTTP/1.1; returns `None` if upstream does not speak it.
    pub(super) async fn connect_http1(&self) -> Result<Option<Http1>, BoxError> {
        match self.dial(Versions::Http1).await {
            Ok(Transport { io, .. }) => Ok(Some(Http1::handshake(io).await?)),
            Err(error) if error.is::<NoHttp1>() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns true if the egress proxy refused the last connection of any thread, and would refuse another
    /// one.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused.load(Relaxed)
    }

    async fn dial(&self, versions: Versions) -> Result<Transport, BoxError> {
        let dialed = self.dial.dial(versions).await;
        let refusal = dialed.as_ref().err().and_then(final_status);
        self.is_refused.store(refusal.is_some(), Relaxed);
        dialed
    }
}

// === impl Http1 ===

impl Http1 {
    async fn handshake(io: Box<dyn super::dial::Stream>) -> Result<Self, BoxError> {
        let (io, flushed) = FlushTracker::new(io);
        let mut http = http1::Builder::new();
        http.max_buf_size(LARGEST_BUFFER);
        let (sender, connection) = http.handshake(TokioIo::new(io)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, flushed })
    }

    fn send(&mut self, mut request: Request) -> Sent {
        *request.version_mut() = Version::HTTP_11;
        if request.uri().authority().is_some() {
            *request.uri_mut() = Uri::from(path_and_query(&request));
        }
        if request.body().size_hint().exact().is_none() {
            // Without this header, hyper would send a GET without its body.
            let chunked = HeaderValue::from_static("chunked");
            request.headers_mut().insert(TRANSFER_ENCODING, chunked);
        }
        Sent::Http1(Box::pin(self.sender.try_send_request(request)))
    }
}

// === impl Connection ===

impl Connection {
    /// Reserves a free stream of an HTTP/2 connection, if there is one.
    pub(super) fn stream_of(connection: &http2::Sender, origin: &Arc<Origin>) -> Option<Self> {
        let slot = connection.reserve()?;
        Some(Self::Http2(Box::new(Http2 {
            connection: connection.clone(),
            slot: Some(slot),
            origin: Arc::clone(origin),
        })))
    }

    /// Sends a request at once, and returns the future of its response.
    pub(super) fn send(&mut self, mut request: Request, progress: &Arc<Progress>) -> Sent {
        let Http2 { slot, origin, .. } = match self {
            Self::Http1(connection) => return connection.send(request),
            Self::Http2(stream) => &mut **stream,
        };
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = origin.uri(path_and_query(&request));
        // HTTP/2 sends `:authority` instead (RFC 9113, section 8.3.1).
        request.headers_mut().remove(HOST);
        // An earlier attempt over HTTP/1.1 may have added this header.
        request.headers_mut().remove(TRANSFER_ENCODING);
        let sent = match slot.take() {
            Some(slot) => slot.send(request, progress),
            None => Err(SendError::Unsent(
                Box::new(request),
                "the stream is used".into(),
            )),
        };
        Sent::Http2(match sent {
            Ok(answer) => Box::pin(answer),
            Err(error) => Box::pin(ready(Err(error))),
        })
    }

    /// Returns true if all data that was sent so far has left this process.
    pub(super) fn is_flushed(&self) -> bool {
        match self {
            Self::Http1(connection) => connection.flushed.is_complete(),
            Self::Http2(stream) => stream.connection.is_flushed(),
        }
    }

    /// Stops further requests from using the connection, because it gave no response in time.
    pub(super) fn retire(&self) {
        match self {
            // This request has the whole connection, so no other can use it.
            Self::Http1(_) => {}
            Self::Http2(stream) => stream.connection.retire(),
        }
    }
}

// === impl Sent ===

impl Future for Sent {
    type Output = Result<http::Response<Incoming>, SendError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match self.get_mut() {
            Self::Http1(answer) => match ready!(answer.as_mut().poll(cx)) {
                Ok(answer) => Ok(answer.map(Incoming::from)),
                Err(error) => Err(error.into()),
            },
            Self::Http2(answer) => Ok(ready!(answer.as_mut().poll(cx))?.map(Incoming::from)),
        })
    }
}

fn path_and_query(request: &Request) -> PathAndQuery {
    // The guard has checked that there is a path.
    request
        .uri()
        .path_and_query()
        .cloned()
        .unwrap_or(PathAndQuery::from_static("/"))
}

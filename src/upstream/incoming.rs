//! The body of a response, as a connection of either version of HTTP delivers it.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body;

use super::http2;
use crate::error::BoxError;

/// Result of one step of reading a body.
pub(super) type BodyStep = Result<Frame<Bytes>, BoxError>;

/// A body as its connection delivers it.
pub(super) enum Incoming {
    Http1(body::Incoming),
    /// Boxed, because it is large and responses are moved.
    Http2(Box<http2::Body>),
}

// === impl Incoming ===

impl From<body::Incoming> for Incoming {
    fn from(body: body::Incoming) -> Self {
        Self::Http1(body)
    }
}

impl From<http2::Body> for Incoming {
    fn from(body: http2::Body) -> Self {
        Self::Http2(Box::new(body))
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<BodyStep>> {
        match self.get_mut() {
            Self::Http1(body) => Pin::new(body).poll_frame(cx).map_err(BoxError::from),
            Self::Http2(body) => Pin::new(&mut **body).poll_frame(cx).map_err(BoxError::from),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(body) => body.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(body) => body.size_hint(),
            Self::Http2(body) => body.size_hint(),
        }
    }
}

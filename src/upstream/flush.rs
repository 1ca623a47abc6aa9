//! Tracks if all data that was written to a stream has left this process.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::dial::Stream;

/// A stream that records each write and each completed flush.
pub(super) struct FlushTracker {
    stream: Box<dyn Stream>,
    flushed: Flushed,
}

/// Flag that is true if the last write was followed by a completed flush. All clones share it.
#[derive(Clone)]
pub(super) struct Flushed(Arc<AtomicBool>);

// === impl FlushTracker ===

impl FlushTracker {
    pub(super) fn new(stream: Box<dyn Stream>) -> (Self, Flushed) {
        let flushed = Flushed(Arc::new(AtomicBool::new(true)));
        let tracker = Self {
            stream,
            flushed: flushed.clone(),
        };
        (tracker, flushed)
    }

    fn writing(&mut self) -> Pin<&mut dyn Stream> {
        self.flushed.0.store(false, Relaxed);
        Pin::new(&mut *self.stream)
    }
}

impl AsyncRead for FlushTracker {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for FlushTracker {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writing().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writing().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut *self.stream).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) {
            self.flushed.0.store(true, Relaxed);
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

// === impl Flushed ===

impl Flushed {
    /// Returns true if no data waits to be written.
    pub(super) fn is_complete(&self) -> bool {
        self.0.load(Relaxed)
    }
}

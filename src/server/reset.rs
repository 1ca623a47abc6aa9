//! Resets a connection whose answer was cut off where a client cannot tell that otherwise.
//!
//! To a client of HTTP/1.0, a body without a length ends with its connection: a clean end would make a
//! cut-off body look whole. On a Unix socket there is no reset, and the client sees a clean end.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use http::Version;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

/// Whether a connection is to be reset when it is closed. Clones are for the same connection.
#[derive(Clone, Default)]
pub(super) struct Reset(Arc<AtomicBool>);

pin_project! {
    /// A body that has its connection reset if it fails.
    pub(super) struct ResetOnFailure<B> {
        #[pin]
        body: B,
        // `None` where the client can tell by itself.
        reset: Option<Reset>,
    }
}

// === impl Reset ===

impl Reset {
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// The connection, if its client is of a version without chunks.
    pub(super) fn of_version(&self, version: Version) -> Option<Self> {
        (version < Version::HTTP_11).then(|| self.clone())
    }
}

// === impl ResetOnFailure ===

impl<B: Body> ResetOnFailure<B> {
    /// Watches a body, unless it has a length.
    pub(super) fn new(body: B, reset: Option<Reset>) -> Self {
        let reset = reset.filter(|_| body.size_hint().exact().is_none());
        Self { body, reset }
    }
}

impl<B: Body> Body for ResetOnFailure<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let step = ready!(this.body.poll_frame(cx));
        if let (Some(Err(_)), Some(reset)) = (&step, this.reset) {
            reset.0.store(true, Relaxed);
        }
        Poll::Ready(step)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

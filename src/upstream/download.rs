//! The body of a response on its way to the client. It limits the silence of upstream, and gives its
//! connection back when it ends.

use std::collections::VecDeque;
use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::connect::Connection;
use super::incoming::{BodyStep, Incoming};
use super::pool::Pool;
use super::upload::Progress;
use crate::error::{BoxError, Error};

/// A response body that passes unchanged as it arrives.
pub(super) struct Download {
    /// Steps that were read ahead, to be passed on first.
    ahead: VecDeque<BodyStep>,
    body: Incoming,
    lease: Option<Lease>,
    idle: Duration,
    silence: Option<Pin<Box<Sleep>>>,
    moved: bool,
    flushed: bool,
}

/// Error for a body of which nothing more arrived for this long.
#[derive(Debug, thiserror::Error)]
#[error("upstream was silent for {0:?} inside a body")]
struct Silence(Duration);

/// The connection that a body arrives over. It goes back to its pool when the exchange is complete, and is
/// closed if the exchange ends in any other way.
pub(super) struct Lease {
    pool: Arc<Pool>,
    connection: Option<Connection>,
    upload: Arc<Progress>,
}

// === impl Lease ===

impl Lease {
    pub(super) fn new(pool: Arc<Pool>, connection: Connection, upload: Arc<Progress>) -> Self {
        Self {
            pool,
            connection: Some(connection),
            upload,
        }
    }

    /// Gives the connection back after the response has ended.
    fn end(mut self) {
        // If the response came early, the rest of the request would still have to be sent on this connection.
        if self.upload.is_done()
            && let Some(connection) = self.connection.take()
        {
            self.pool.checkin(connection);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.upload.is_done() {
            self.upload.abandon();
        }
    }
}

// === impl Download ===

impl Download {
    pub(super) fn new(body: Incoming, lease: Lease, idle: Duration) -> Self {
        let lease = Some(lease);
        let mut this = Self {
            ahead: VecDeque::new(),
            body,
            lease,
            idle,
            silence: None,
            moved: false,
            flushed: false,
        };
        this.end_lease(false);
        this
    }

    /// Reads one step ahead. The client still gets that step in its turn.
    pub(super) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Option<&BodyStep>> {
        Poll::Ready(match ready!(self.poll_step(cx)) {
            Some(step) => {
                self.ahead.push_back(step);
                self.ahead.back()
            }
            None => None,
        })
    }

    /// Takes the error that occurred before anything of the body was read, if there is one.
    pub(super) fn take_failure(&mut self) -> Option<BoxError> {
        match self.ahead.pop_front_if(|step| step.is_err()) {
            Some(Err(failure)) => Some(failure),
            _ => None,
        }
    }

    /// Returns true if the whole body is known to be read, even if only ahead. The end of a chunked body is
    /// known only after it was read.
    pub(super) fn is_read(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Gives the connection back if the body is over. For a chunked body only `end` shows that.
    fn end_lease(&mut self, end: bool) {
        if (end || self.body.is_end_stream())
            && let Some(lease) = self.lease.take()
        {
            lease.end();
        }
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<BodyStep>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(step) => {
                // Trailers are dropped: a client might take them for headers, even for those that were
                // removed from the head.
                let step = step.filter(|step| !step.as_ref().is_ok_and(Frame::is_trailers));
                self.moved = true;
                self.end_lease(step.is_none());
                Poll::Ready(step)
            }
            Poll::Pending => self
                .poll_silence(cx)
                .map(|()| Some(Err(Silence(self.idle).into()))),
        }
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let idle = self.idle;
        let silence = self.silence.get_or_insert_with(|| Box::pin(sleep(idle)));
        if std::mem::take(&mut self.moved) {
            silence.as_mut().reset(Instant::now() + idle);
        }
        silence.as_mut().poll(cx)
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<BodyStep>> {
        let this = self.get_mut();
        if let Some(Err(_)) = this.ahead.front()
            && !std::mem::replace(&mut this.flushed, true)
        {
            // hyper writes the data before the error only if it has to wait, so it waits once.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if let Some(step) = this.ahead.pop_front() {
            return Poll::Ready(Some(step));
        }
        this.poll_step(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let ahead: u64 = self
            .ahead
            .iter()
            .filter_map(|step| step.as_ref().ok()?.data_ref())
            .map(|data| data.len() as u64)
            .sum();
        let rest = self.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(ahead + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(ahead + upper);
        }
        hint
    }
}

/// Returns the error of a request whose response failed like this before the first byte of its body.
pub(super) fn broken(failure: BoxError) -> Error {
    if let Some(Silence(limit)) = failure.downcast_ref() {
        return Error::upstream_timeout(*limit);
    }
    let hyper = failure.downcast_ref::<hyper::Error>();
    let io: Option<&io::Error> = hyper.and_then(|error| error.source()?.downcast_ref());
    let is_malformed = match (io, failure.downcast_ref::<h2::Error>()) {
        (Some(io), _) => matches!(
            io.kind(),
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData
        ),
        (None, Some(h2)) => h2.is_library() && h2.is_reset(),
        (None, None) => false,
    };
    if is_malformed {
        Error::NotHttp(failure)
    } else {
        Error::Disconnected(failure)
    }
}

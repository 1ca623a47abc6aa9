//! The answer's body on its way down: bounded silence, and its connection kept when it ends.

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

/// A body that passes as it comes.
pub(super) struct Download {
    /// What was read ahead, to be passed first.
    ahead: VecDeque<BodyStep>,
    body: Incoming,
    lease: Option<Lease>,
    idle: Duration,
    silence: Option<Pin<Box<Sleep>>>,
    moved: bool,
    flushed: bool,
}

/// Nothing more of a body came for so long.
#[derive(Debug, thiserror::Error)]
#[error("upstream was silent for {0:?} inside a body")]
struct Silence(Duration);

/// The connection that a body comes over. It goes back to its pool when the exchange is over, and is
/// closed when the exchange ends in any other way.
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

    /// The answer has ended.
    fn end(mut self) {
        // After an answer that came early the request's rest would still have to be sent.
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

    /// Reads ahead: the step passes in its turn all the same.
    pub(super) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Option<&BodyStep>> {
        Poll::Ready(match ready!(self.poll_step(cx)) {
            Some(step) => {
                self.ahead.push_back(step);
                self.ahead.back()
            }
            None => None,
        })
    }

    /// Takes what went wrong before anything of the body was read.
    pub(super) fn take_failure(&mut self) -> Option<BoxError> {
        match self.ahead.pop_front_if(|step| step.is_err()) {
            Some(Err(failure)) => Some(failure),
            _ => None,
        }
    }

    /// Whether all of it is known to be read, be it ahead: of one in chunks only its end says so.
    pub(super) fn is_read(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Gives the connection back if the body is over: of one in chunks only its `end` says so.
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
                // What comes behind a body could not be told from headers that are dropped before it.
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
            // hyper writes what came before only when it has to wait.
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

/// The error of a request whose answer broke off like this before the first byte of its body.
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

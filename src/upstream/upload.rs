//! The request body on its way to upstream. It records which side keeps the other waiting, and errors of the
//! client.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use axum::body::Body;
use axum::extract::Request;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::request_class::InFlightCount;
use super::timeouts::Timeouts;
use crate::error::Error;
use crate::request::pace::Pace;

/// A request body that records its progress.
pub(super) struct Upload {
    body: Body,
    progress: Arc<Progress>,
}

/// Progress of a request body, which the body and the exchange that sends it share.
pub(super) struct Progress {
    state: Mutex<UploadState>,
    /// Notified when nothing is left to send, because another timeout applies from then on.
    done: Notify,
    /// Keeps the request counted as in flight.
    _in_flight: InFlightCount,
}

struct UploadState {
    turn: Turn,
    since: Instant,
    /// Backlog of the client, which decides how long the proxy waits for it.
    pace: Pace,
    fault: Option<Error>,
    /// True once nobody waits for the rest of the request any more.
    abandoned: bool,
    /// True if the connection takes data from the body before it can send it: HTTP/2 has windows.
    windowed: bool,
    /// Waker of the task that waits for data of the client.
    waiting: Option<Waker>,
}

/// The side that has to act next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// The client has to send more.
    Client,
    /// Upstream has to take what was sent.
    Upstream,
    /// All data was handed over: upstream has to respond.
    Done,
}

// === impl Upload ===

impl Upload {
    /// Makes the body of a request, if it has one, record its progress from `now` on. The request counts as
    /// in flight until the returned progress is dropped.
    pub(super) fn record(
        request: Request,
        now: Instant,
        in_flight: InFlightCount,
    ) -> (Request, Arc<Progress>) {
        let empty = request.body().is_end_stream();
        let turn = if empty { Turn::Done } else { Turn::Upstream };
        let state = UploadState {
            turn,
            since: now,
            pace: Pace::default(),
            fault: None,
            abandoned: false,
            windowed: false,
            waiting: None,
        };
        let progress = Arc::new(Progress {
            state: Mutex::new(state),
            done: Notify::new(),
            _in_flight: in_flight,
        });
        if empty {
            return (request, progress);
        }
        let recorded = Arc::clone(&progress);
        (
            request.map(|body| {
                Body::new(Self {
                    body,
                    progress: recorded,
                })
            }),
            progress,
        )
    }
}

impl http_body::Body for Upload {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        if this.progress.wait(cx) {
            let error = axum::Error::new("the rest of the request is not wanted any more");
            return Poll::Ready(Some(Err(error)));
        }
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            this.progress
                .received(frame.data_ref().map_or(0, Bytes::len));
        }
        match &polled {
            Poll::Pending => this.progress.enter(Turn::Client),
            Poll::Ready(None) => this.progress.body_ended(),
            Poll::Ready(Some(Ok(_))) if this.body.is_end_stream() => this.progress.body_ended(),
            Poll::Ready(Some(Ok(_))) => this.progress.moved(),
            Poll::Ready(Some(Err(_))) => {}
        }
        polled.map_err(|error| {
            this.progress.fail(error);
            axum::Error::new("the request body failed")
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

// === impl Progress ===

impl Progress {
    /// Runs the exchange that sends this body, as long as one side makes progress.
    ///
    /// # Errors
    ///
    /// [`Error::ClientTooSlow`] or [`Error::UpstreamTimeout`], by the side that had to act.
    pub(super) async fn supervise<F: Future + Unpin>(
        &self,
        mut exchange: F,
        timeouts: Timeouts,
    ) -> Result<F::Output, Error> {
        loop {
            // Read in this order: if the last data is handed over between the two, the notification below
            // still comes.
            let done = self.is_done();
            let (deadline, _) = self.deadline(timeouts);
            tokio::select! {
                biased;
                output = &mut exchange => return Ok(output),
                // If `done` has fired already, do not wait for it again.
                () = self.done.notified(), if !done => {}
                () = sleep_until(deadline) => {
                    // Progress that was made meanwhile has moved the deadline.
                    let (next, overdue) = self.deadline(timeouts);
                    if next <= deadline {
                        return Err(overdue);
                    }
                }
            }
        }
    }

    /// Records that the connection has windows, and calls [`finish`](Self::finish) after all data was handed
    /// over.
    pub(super) fn follows_windows(&self) {
        self.lock().windowed = true;
    }

    /// Records that the client has sent this many bytes.
    fn received(&self, bytes: usize) {
        let mut state = self.lock();
        if state.turn == Turn::Client {
            let waited = state.since.elapsed();
            state.pace.waited(waited);
        }
        state.pace.moved(bytes);
    }

    /// Records that some data was handed over, or counts as handed over.
    pub(super) fn moved(&self) {
        self.enter(Turn::Upstream);
    }

    /// Records that all data was handed over.
    pub(super) fn finish(&self) {
        self.enter(Turn::Done);
    }

    fn body_ended(&self) {
        let windowed = self.lock().windowed;
        self.enter(if windowed { Turn::Upstream } else { Turn::Done });
    }

    /// Restarts the time limits for a new attempt, of which nothing was sent yet.
    pub(super) fn restart(&self) {
        let mut state = self.lock();
        state.since = Instant::now();
        state.windowed = false;
    }

    /// Takes the error that the client caused, if there is one.
    pub(super) fn take_fault(&self) -> Option<Error> {
        self.lock().fault.take()
    }

    /// Ends the body, because upstream has responded, or nobody waits for the response. Otherwise a client
    /// that stalls would keep both connections, and a connection could go on sending.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.abandoned = true;
        if let Some(waiting) = state.waiting.take() {
            waiting.wake();
        }
    }

    /// Registers to be woken when the body is abandoned. Returns true if it is abandoned already.
    fn wait(&self, cx: &Context<'_>) -> bool {
        let mut state = self.lock();
        state.waiting = Some(cx.waker().clone());
        state.abandoned
    }

    /// Returns the time at which data was last handed over; without a body, the time at which the request
    /// began.
    pub(super) fn since(&self) -> Instant {
        self.lock().since
    }

    /// Returns true if nothing is left to send.
    pub(super) fn is_done(&self) -> bool {
        self.lock().turn == Turn::Done
    }

    fn deadline(&self, timeouts: Timeouts) -> (Instant, Error) {
        let state = self.lock();
        let (limit, overdue) = match state.turn {
            Turn::Client => (
                state.pace.left(timeouts.idle),
                Error::ClientTooSlow(timeouts.idle),
            ),
            Turn::Upstream => (timeouts.idle, Error::upstream_timeout(timeouts.idle)),
            Turn::Done => (
                timeouts.response,
                Error::upstream_timeout(timeouts.response),
            ),
        };
        (state.since + limit, overdue)
    }

    fn enter(&self, turn: Turn) {
        let mut state = self.lock();
        // A repeated poll for data that is still missing is no progress.
        if state.turn != turn || turn == Turn::Upstream {
            (state.turn, state.since) = (turn, Instant::now());
            if turn == Turn::Done {
                self.done.notify_one();
            }
        }
    }

    fn fail(&self, error: axum::Error) {
        self.lock().fault = Some(Error::of_body(error.into_inner()));
    }

    fn lock(&self) -> MutexGuard<'_, UploadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! HTTP/2 connections to upstream, on the `h2` crate.
//!
//! hyper's client queues: a request that finds no free stream, and what a closed window does not let
//! through. A create in such a queue would be sent after its client was told that it failed. Here a
//! request finds a free stream or another connection, and no more of a body is handed over than the
//! window has room for, so that a reset takes back what was not sent.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::extract::Request;
use bytes::Bytes;
use h2::client::{self, ResponseFuture};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderValue, Method, Response};
use http_body::{Body as _, Frame, SizeHint};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::dial::Stream;
use super::empty_frames::EmptyFrameFilter;
use super::flush::{FlushTracker, Flushed};
use super::send_error::SendError;
use super::upload::Progress;
use crate::error::BoxError;

/// How often a silent peer is asked whether it is still there, and how long it has to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// As much of an answer as upstream may send before its client takes it, in bytes. At 200 ms from here
/// to upstream and back that lets 640 KB a second pass. While few requests are on their way they go by
/// HTTP/1.1, which has no such window.
const STREAM_WINDOW: u32 = 128 << 10;
/// Most streams of a connection at once: what most servers allow. More requests go over another one.
const MOST_STREAMS: u32 = 128;
/// All streams have their whole window at once. So clients that do not read take nothing from others, and
/// what waits for them is at most 16 MiB a connection, and `limits.in_flight` times [`STREAM_WINDOW`]
/// in all.
const CONNECTION_WINDOW: u32 = MOST_STREAMS * STREAM_WINDOW;
/// As much of the connection's window as one upload asks for at a time, in bytes. What is asked for is
/// kept from the others.
const RESERVATION: usize = 64 << 10;

/// The sending side of a connection. It closes when the last clone and the last stream are dropped.
#[derive(Clone)]
pub(super) struct Sender {
    h2: client::SendRequest<Bytes>,
    state: Arc<ConnectionState>,
    flushed: Flushed,
    /// Tells the connection's task that somebody uses it.
    _user: mpsc::Sender<Infallible>,
}

/// What the connection's task and its users share.
struct ConnectionState {
    /// How many streams there may be at once; 0 until upstream has said how many it allows.
    limit: AtomicUsize,
    /// Notified when the limit changes, and at the end.
    changed: Notify,
    /// Streams that are open.
    streams: AtomicUsize,
    /// Set when the connection has ended, or a request on it got no answer in time.
    unusable: AtomicBool,
}

/// A free stream of a connection, until it is dropped.
pub(super) struct Slot {
    sender: Sender,
}

/// Waits for the answer on a stream, and sends the request's body meanwhile.
struct StreamExchange {
    response: ResponseFuture,
    upload: Option<StreamUpload>,
    answer_has_body: bool,
}

/// Sends a body as far as the windows allow. Dropped early, it resets the stream.
struct StreamUpload {
    stream: SendStream<Bytes>,
    body: axum::body::Body,
    /// Taken from the body and not sent yet.
    chunk: Bytes,
    /// Whether the body has nothing behind the chunk.
    ended: bool,
    /// Whether everything was sent, or sending was given up.
    finished: bool,
    progress: Arc<Progress>,
    _slot: Slot,
}

/// The body of an answer. While it is read, the rest of the request's body is sent.
pub(super) struct Body {
    stream: RecvStream,
    upload: StreamUpload,
    /// What is left of a declared length.
    length: Option<u64>,
}

// === impl Sender ===

impl Sender {
    /// Opens a connection and waits until upstream has said how many streams it allows.
    ///
    /// An idle connection is asked whether it is still there if `ping_while_idle`.
    ///
    /// # Errors
    ///
    /// What answers does not speak HTTP/2, or the connection ended.
    pub(super) async fn handshake(
        io: Box<dyn Stream>,
        ping_while_idle: bool,
    ) -> Result<Self, BoxError> {
        let io = EmptyFrameFilter::new(io);
        let (io, flushed) = FlushTracker::new(Box::new(io));
        let (h2, connection) = client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            // Until upstream's settings are there.
            .initial_max_send_streams(0)
            .handshake(io)
            .await?;
        let state = Arc::new(ConnectionState {
            limit: AtomicUsize::new(0),
            changed: Notify::new(),
            streams: AtomicUsize::new(0),
            unusable: AtomicBool::new(false),
        });
        let (user, users) = mpsc::channel(1);
        tokio::spawn(drive(
            connection,
            Arc::clone(&state),
            users,
            ping_while_idle,
        ));
        while state.limit.load(Relaxed) == 0 {
            state.changed.notified().await;
            if state.unusable.load(Relaxed) {
                return Err("upstream closed the connection before it sent its settings".into());
            }
        }
        Ok(Self {
            h2,
            state,
            flushed,
            _user: user,
        })
    }

    /// Returns true until the connection has ended or was retired.
    pub(super) fn is_usable(&self) -> bool {
        !self.state.unusable.load(Relaxed)
    }

    /// Gives no further request to this connection.
    pub(super) fn retire(&self) {
        self.state.unusable.store(true, Relaxed);
    }

    /// Returns true if all that was sent on the connection has left this process.
    pub(super) fn is_flushed(&self) -> bool {
        self.flushed.is_complete()
    }

    /// How many streams there may be at once.
    pub(super) fn limit(&self) -> usize {
        self.state.limit.load(Relaxed)
    }

    /// Reserves a free stream, if there is one.
    pub(super) fn reserve(&self) -> Option<Slot> {
        let ConnectionState { limit, streams, .. } = &*self.state;
        let limit = limit.load(Relaxed);
        let one_more = |open| (open < limit).then_some(open + 1);
        streams.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        let sender = self.clone();
        Some(Slot { sender })
    }
}

// === impl Slot ===

impl Slot {
    /// Sends a request on this stream. A create is not complete before the last byte of its body, or
    /// an empty frame in its place: given up before, it was not sent.
    pub(super) fn send(
        mut self,
        request: Request,
        progress: &Arc<Progress>,
    ) -> Result<impl Future<Output = Result<Response<Body>, SendError>> + Send + use<>, SendError>
    {
        // A connection that upstream ends takes nothing more, and then the head would be lost.
        let mut cx = Context::from_waker(Waker::noop());
        if let Poll::Ready(Err(error)) = self.sender.h2.poll_ready(&mut cx) {
            self.sender.retire();
            return Err(SendError::Unsent(Box::new(request), error.into()));
        }
        let (mut head, body) = request.into_parts();
        let answer_has_body = head.method != Method::HEAD;
        let may_create = !head.method.is_safe();
        if may_create && let Some(length) = body.size_hint().exact() {
            let length = HeaderValue::from(length);
            head.headers.entry(CONTENT_LENGTH).or_insert(length);
        }
        let ends = !may_create && body.is_end_stream();
        let head = http::Request::from_parts(head, ());
        let sent = self.sender.h2.send_request(head, ends);
        // The error is the connection's: the head did not leave.
        let (response, stream) = sent.map_err(|error| SendError::Unprocessed(error.into()))?;
        progress.follows_windows();
        let upload = StreamUpload {
            stream,
            body,
            chunk: Bytes::new(),
            ended: false,
            finished: ends,
            progress: Arc::clone(progress),
            _slot: self,
        };
        Ok(StreamExchange {
            response,
            upload: Some(upload),
            answer_has_body,
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.sender.state.streams.fetch_sub(1, Relaxed);
    }
}

// === impl StreamExchange ===

impl Future for StreamExchange {
    type Output = Result<Response<Body>, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Some(upload) = &mut this.upload {
            let _ = upload.poll(cx);
        }
        let response = ready!(Pin::new(&mut this.response).poll(cx)).map_err(SendError::from)?;
        let Some(upload) = this.upload.take() else {
            return Poll::Pending; // It was answered before.
        };
        let length = response.headers().get(CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let length = if this.answer_has_body {
            length
        } else {
            Some(0)
        };
        Poll::Ready(Ok(response.map(|stream| Body {
            stream,
            upload,
            length,
        })))
    }
}

impl Drop for StreamExchange {
    fn drop(&mut self) {
        if let Some(upload) = &mut self.upload {
            // Nobody waits for the answer: what was not sent is taken back.
            upload.stream.send_reset(Reason::CANCEL);
        }
    }
}

// === impl StreamUpload ===

impl StreamUpload {
    /// Sends what the body has and the windows allow. Ready when there is no more to do.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.finished {
            if !self.chunk.is_empty() {
                let Some(capacity) = ready!(self.poll_capacity(cx)) else {
                    // The stream has ended: the response says how.
                    self.finish();
                    break;
                };
                let part = self.chunk.split_to(capacity.min(self.chunk.len()));
                self.send(part);
            } else if self.ended {
                self.send(Bytes::new());
            } else {
                match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                    // Trailers are dropped.
                    Some(Ok(frame)) => self.chunk = frame.into_data().unwrap_or_default(),
                    Some(Err(_)) => {
                        self.stream.send_reset(Reason::CANCEL);
                        self.finish();
                        break;
                    }
                    None => self.ended = true,
                }
                self.ended |= self.body.is_end_stream();
            }
        }
        Poll::Ready(())
    }

    /// Waits until some of the chunk may be sent; `None` once the stream takes nothing more.
    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<Option<usize>> {
        self.stream
            .reserve_capacity(self.chunk.len().min(RESERVATION));
        while self.stream.capacity() == 0 {
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(None),
            }
        }
        Poll::Ready(Some(self.stream.capacity()))
    }

    fn send(&mut self, part: Bytes) {
        let is_last = self.ended && self.chunk.is_empty();
        self.progress.moved();
        let sent = self.stream.send_data(part, is_last);
        if sent.is_ok() && is_last {
            self.progress.finish();
        }
        if sent.is_err() || is_last {
            self.finish();
        }
    }

    /// Lets go of the body: what is kept of it to be sent again counts in the memory of all requests.
    fn finish(&mut self) {
        self.finished = true;
        self.body = axum::body::Body::empty();
    }
}

// === impl Body ===

impl Body {
    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if let Some(data) = ready!(self.stream.poll_data(cx)?) {
            let size = data.len();
            self.stream.flow_control().release_capacity(size)?;
            self.length = self.length.map(|length| length.saturating_sub(size as u64));
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.stream.poll_trailers(cx)?);
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = self.get_mut();
        let _ = this.upload.poll(cx);
        this.poll_step(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.length
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // An answer that came early: the stream must not stay open for the rest of the request.
        if !self.upload.finished {
            self.upload.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// Runs a connection until it ends, does not answer a ping, or has no user any more.
async fn drive(
    mut connection: client::Connection<FlushTracker, Bytes>,
    state: Arc<ConnectionState>,
    mut users: mpsc::Receiver<Infallible>,
    ping_while_idle: bool,
) {
    let pings = connection.ping_pong();
    let mut connection = pin!(poll_fn(|cx| {
        let ended = Pin::new(&mut connection).poll(cx);
        state.set_limit(connection.max_concurrent_send_streams());
        ended
    }));
    tokio::select! {
        biased;
        ended = &mut connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "HTTP/2 connection ended");
            }
        }
        () = keep_alive(pings, &state, ping_while_idle) => {
            tracing::debug!("HTTP/2 connection does not answer");
        }
        _ = users.recv() => {}
    }
    state.unusable.store(true, Relaxed);
    state.changed.notify_one();
}

/// Ends when upstream does not answer a ping in time.
async fn keep_alive(pings: Option<PingPong>, state: &ConnectionState, while_idle: bool) {
    let Some(mut pings) = pings else { return };
    loop {
        sleep(KEEP_ALIVE).await;
        if !while_idle && state.streams.load(Relaxed) == 0 {
            continue;
        }
        let answered = timeout(KEEP_ALIVE, pings.ping(Ping::opaque())).await;
        if !matches!(answered, Ok(Ok(_))) {
            return;
        }
    }
}

// === impl ConnectionState ===

impl ConnectionState {
    /// Upstream allows so many streams.
    fn set_limit(&self, limit: usize) {
        let limit = limit.min(MOST_STREAMS as usize);
        if self.limit.swap(limit, Relaxed) != limit {
            self.changed.notify_one();
        }
    }
}

// === impl SendError ===

impl From<h2::Error> for SendError {
    /// Upstream has not processed a stream that it refuses, or that is beyond the last one of its
    /// GOAWAY (RFC 9113, section 8.7): `h2` ends the latter streams, and only them, with that error.
    fn from(error: h2::Error) -> Self {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        if error.is_remote() && (refused || error.is_go_away()) {
            Self::Unprocessed(error.into())
        } else {
            Self::Disconnected(error.into())
        }
    }
}

//! HTTP/2 connections to upstream, on the `h2` crate.
//!
//! hyper's client has queues: for requests that find no free stream, and for data that a closed window holds
//! back. A create in such a queue would be sent after its client had got an error. Here a request finds a
//! free stream or goes to another connection, and no more of a body is handed to `h2` than the window has
//! room for. So a reset discards everything that was not sent.

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

/// Time between pings, and time that the peer has to answer one.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Most bytes of a response that upstream may send before the client takes them. At a round trip of 200 ms to
/// upstream, this lets 640 KB a second pass. A few requests at a time go over HTTP/1.1, which has no such
/// window.
const STREAM_WINDOW: u32 = 128 << 10;
/// Most streams of a connection at once, which is the number that most servers allow. Further requests go
/// over another connection.
const MOST_STREAMS: u32 = 128;
/// Window of a connection, with room for the whole window of each stream. So clients that do not read take
/// nothing from others. At most 16 MiB a connection wait for such clients, and at most `limits.in_flight`
/// times [`STREAM_WINDOW`] in all.
const CONNECTION_WINDOW: u32 = MOST_STREAMS * STREAM_WINDOW;
/// Most bytes of the connection's window that one upload asks for at a time. Other uploads cannot use the
/// bytes that it asked for.
const RESERVATION: usize = 64 << 10;

/// The sending side of a connection. It closes when the last clone and the last stream are dropped.
#[derive(Clone)]
pub(super) struct Sender {
    h2: client::SendRequest<Bytes>,
    state: Arc<ConnectionState>,
    flushed: Flushed,
    /// Shows the connection's task that the connection is in use.
    _user: mpsc::Sender<Infallible>,
}

/// State that the connection's task and its users share.
struct ConnectionState {
    /// Most streams at once; 0 until upstream has sent its limit.
    limit: AtomicUsize,
    /// Notified when the limit changes, and at the end.
    changed: Notify,
    /// Number of streams that are open or reserved.
    streams: AtomicUsize,
    /// True once the connection has ended, or a request on it got no response in time.
    unusable: AtomicBool,
}

/// A free stream of a connection, reserved until this is dropped.
pub(super) struct Slot {
    sender: Sender,
}

/// Waits for the response on a stream, and sends the request's body meanwhile.
struct StreamExchange {
    response: ResponseFuture,
    upload: Option<StreamUpload>,
    answer_has_body: bool,
}

/// Sends a body as far as the windows allow. Its owner resets the stream if it is dropped early.
struct StreamUpload {
    stream: SendStream<Bytes>,
    body: axum::body::Body,
    /// Data that was taken from the body and not sent yet.
    chunk: Bytes,
    /// True if the body has no more data behind the chunk.
    ended: bool,
    /// True if everything was sent, or sending was given up.
    finished: bool,
    progress: Arc<Progress>,
    _slot: Slot,
}

/// The body of a response. While it is read, the rest of the request's body is sent.
pub(super) struct Body {
    stream: RecvStream,
    upload: StreamUpload,
    /// Bytes that are left of a declared length; `None` if no length was declared.
    length: Option<u64>,
}

// === impl Sender ===

impl Sender {
    /// Opens a connection and waits until upstream has sent its limit of streams.
    ///
    /// If `ping_while_idle`, the connection is pinged even while no request uses it.
    ///
    /// # Errors
    ///
    /// The peer does not speak HTTP/2, or the connection ended.
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
            // No stream may open before upstream's settings have arrived.
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

    /// Returns the most streams that may be open at once.
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
    /// Sends a request on this stream. A create is complete only with the last byte of its body, or with an
    /// empty frame in its place. If it is given up before, it was not sent.
    pub(super) fn send(
        mut self,
        request: Request,
        progress: &Arc<Progress>,
    ) -> Result<impl Future<Output = Result<Response<Body>, SendError>> + Send + use<>, SendError>
    {
        // A connection that upstream is ending takes no more requests, and the head would be lost.
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
        // An error here is one of the connection: the head was not sent.
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
            return Poll::Pending; // The response was returned before.
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
            // Nobody waits for the response: the reset discards the data that was not sent.
            upload.stream.send_reset(Reason::CANCEL);
        }
    }
}

// === impl StreamUpload ===

impl StreamUpload {
    /// Sends data while the body has some and the windows allow it. Returns `Ready` if there is nothing more
    /// to do.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.finished {
            if !self.chunk.is_empty() {
                let Some(capacity) = ready!(self.poll_capacity(cx)) else {
                    // The stream has ended, and the response shows the cause.
                    self.finish();
                    break;
                };
                let part = self.chunk.split_to(capacity.min(self.chunk.len()));
                self.send(part);
            } else if self.ended {
                self.send(Bytes::new());
            } else {
                match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                    // A frame of trailers is dropped.
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

    /// Waits until some of the chunk may be sent; returns `None` once the stream takes nothing more.
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

    /// Ends the upload and drops the body. Bytes that are kept of it for another attempt count in the memory
    /// of all requests.
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
        // The response came early. The stream must not stay open for the rest of the request.
        if !self.upload.finished {
            self.upload.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// Runs a connection until it ends, does not answer a ping in time, or has no more users.
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

/// Pings upstream at intervals, and returns once a ping is not answered in time.
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
    /// Sets the number of streams that upstream allows, at most [`MOST_STREAMS`].
    fn set_limit(&self, limit: usize) {
        let limit = limit.min(MOST_STREAMS as usize);
        if self.limit.swap(limit, Relaxed) != limit {
            self.changed.notify_one();
        }
    }
}

// === impl SendError ===

impl From<h2::Error> for SendError {
    /// Classifies the error of a stream. Upstream has not processed a stream that it refused, or one beyond
    /// the last stream of its GOAWAY (RFC 9113, section 8.7). `h2` ends the latter streams, and no others,
    /// with a GOAWAY error.
    fn from(error: h2::Error) -> Self {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        if error.is_remote() && (refused || error.is_go_away()) {
            Self::Unprocessed(error.into())
        } else {
            Self::Disconnected(error.into())
        }
    }
}

//! Spares connections work that comes to nothing.
//!
//! hyper (1.12) drives a connection of HTTP/1.1 more often than there is something to do:
//!
//! - Whoever takes a piece of a body wakes the connection that it came over, to bring the next one.
//!   After the last there is none: of the five turns that asking for a task took, one. So [`Quiet`]
//!   sleeps on when the last of its [`Pieces`] is taken, where `Content-Length` says which that is.
//!   hyper has let go of such a body in the turn that brought its end.
//! - At each turn it looks for something to read, and more than once: ten times for such a request,
//!   to find something twice, and a look through TLS takes some 600 instructions. So [`Awaited`] is
//!   looked into when it has rung.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use pin_project_lite::pin_project;

pin_project! {
    /// A connection that is not woken for a piece after the last.
    pub struct Quiet<C> {
        #[pin]
        connection: C,
        line: Line,
    }
}

/// A body as hyper brings it, whose last piece does not wake its connection.
pub struct Pieces(Incoming);

pin_project! {
    /// A stream that is not read again before there may be something to read.
    pub struct Awaited<T> {
        #[pin]
        stream: T,
        line: Line,
    }
}

/// The bell of the task that polled last, and the waker that rings it.
#[derive(Default)]
struct Line(Option<(Arc<Bell>, Waker)>);

/// Wakes a task, but not while its thread takes a piece, and knows that it did.
struct Bell {
    task: Waker,
    /// Whether there may be something to read.
    rung: AtomicBool,
}

/// This thread takes a piece for as long as this is there.
struct Taking;

thread_local! {
    static TAKING: Cell<bool> = const { Cell::new(false) };
    /// What rings meanwhile: that of the connection, to which a body of hyper's shows no other way.
    static HELD: Cell<Option<Arc<Bell>>> = const { Cell::new(None) };
}

// === impl Quiet ===

impl<C> Quiet<C> {
    /// Drives a connection of hyper's.
    pub fn new(connection: C) -> Self {
        let line = Line::default();
        Self { connection, line }
    }
}

impl<C: Future> Future for Quiet<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = self.project();
        let (_, waker) = this.line.to(cx.waker());
        this.connection.poll(&mut Context::from_waker(waker))
    }
}

// === impl Pieces ===

impl From<Incoming> for Pieces {
    fn from(body: Incoming) -> Self {
        Self(body)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let body = &mut self.get_mut().0;
        let _taking = Taking::begin();
        let piece = Pin::new(&mut *body).poll_frame(cx);
        if piece.is_ready() && body.is_end_stream() {
            HELD.take();
        }
        piece
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

// === impl Awaited ===

impl<T> Awaited<T> {
    /// Waits for a stream.
    pub fn new(stream: T) -> Self {
        let line = Line::default();
        Self { stream, line }
    }
}

impl<T: Read> Read for Awaited<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let (bell, waker) = this.line.to(cx.waker());
        if !bell.take_ring() {
            return Poll::Pending;
        }
        let read = this.stream.poll_read(&mut Context::from_waker(waker), into);
        if read.is_ready() {
            // There may be more.
            bell.rung.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl<T: Write> Write for Awaited<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.project().stream.poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().stream.poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_shutdown(cx)
    }
}

// === impl Line ===

impl Line {
    /// The bell of a task, and a waker that rings it. Mostly that is the task of the last time.
    fn to(&mut self, task: &Waker) -> &(Arc<Bell>, Waker) {
        if let Some((bell, _)) = &self.0
            && !bell.task.will_wake(task)
        {
            self.0 = None;
        }
        self.0.get_or_insert_with(|| {
            let task = task.clone();
            let rung = AtomicBool::new(true);
            let bell = Arc::new(Bell { task, rung });
            (Arc::clone(&bell), bell.into())
        })
    }
}

// === impl Bell ===

impl Bell {
    fn take_ring(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        if !TAKING.get() {
            self.task.wake_by_ref();
        } else if let Some(other) = HELD.replace(Some(Arc::clone(self))) {
            other.task.wake_by_ref();
        }
    }
}

// === impl Taking ===

impl Taking {
    fn begin() -> Self {
        TAKING.set(true);
        Self
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        TAKING.set(false);
        if let Some(bell) = HELD.take() {
            bell.task.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use http::Request;
    use http_body_util::{BodyExt, Empty};
    use hyper::client::conn::http1::{self, SendRequest};
    use hyper::rt::ReadBuf;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::*;

    pin_project! {
        /// Counts how often something is polled.
        struct Counted<T> {
            #[pin]
            inner: T,
            polls: Arc<AtomicUsize>,
        }
    }

    /// A connection, and what has been done for it.
    struct Connection {
        sender: SendRequest<Empty<Bytes>>,
        upstream: DuplexStream,
        turns: Arc<AtomicUsize>,
        looks: Arc<AtomicUsize>,
    }

    /// Has nothing at first, but rings at once.
    struct Hasty(bool);

    async fn soon<T>(future: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(10), future).await.unwrap()
    }

    impl<T: Future> Future for Counted<T> {
        type Output = T::Output;

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T::Output> {
            let this = self.project();
            this.polls.fetch_add(1, Ordering::Relaxed);
            this.inner.poll(cx)
        }
    }

    impl<T: Read> Read for Counted<T> {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            into: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            let this = self.project();
            this.polls.fetch_add(1, Ordering::Relaxed);
            this.inner.poll_read(cx, into)
        }
    }

    impl<T: Write> Write for Counted<T> {
        fn poll_write(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.project().inner.poll_write(cx, bytes)
        }

        fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.project().inner.poll_flush(cx)
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.project().inner.poll_shutdown(cx)
        }
    }

    impl Read for Hasty {
        fn poll_read(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            _: ReadBufCursor<'_>,
        ) -> Poll<io::Result<()>> {
            if std::mem::replace(&mut self.get_mut().0, true) {
                return Poll::Ready(Ok(()));
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    }

    /// Reads up to eight bytes.
    async fn read(mut stream: impl Read + Unpin) -> usize {
        let mut bytes = [0; 8];
        let mut into = ReadBuf::new(&mut bytes);
        let read = poll_fn(|cx| Pin::new(&mut stream).poll_read(cx, into.unfilled()));
        soon(read).await.unwrap();
        into.filled().len()
    }

    impl Connection {
        async fn open() -> Self {
            let (turns, looks) = <(Arc<_>, Arc<_>)>::default();
            let (near, upstream) = duplex(1024);
            let stream = Counted {
                inner: TokioIo::new(near),
                polls: Arc::clone(&looks),
            };
            let (sender, connection) = http1::handshake(Awaited::new(stream)).await.unwrap();
            tokio::spawn(Quiet::new(Counted {
                inner: connection,
                polls: Arc::clone(&turns),
            }));
            Self {
                sender,
                upstream,
                turns,
                looks,
            }
        }

        /// Sends a request, and takes it at the other end.
        async fn ask(
            &mut self,
        ) -> impl Future<Output = hyper::Result<http::Response<Incoming>>> + use<> {
            let answer = self.sender.send_request(Request::new(Empty::new()));
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                self.upstream.read_buf(&mut head).await.unwrap();
            }
            answer
        }

        async fn send(&mut self, bytes: &str) {
            self.upstream.write_all(bytes.as_bytes()).await.unwrap();
        }

        /// Turns and looks, when there is nothing left to do.
        async fn done(&self) -> (usize, usize) {
            for _ in 0..8 {
                yield_now().await;
            }
            let count = |polls: &AtomicUsize| polls.load(Ordering::Relaxed);
            (count(&self.turns), count(&self.looks))
        }

        /// How many turns follow when a piece is taken.
        async fn turns_after(
            &self,
            body: &mut (dyn Body<Data = Bytes, Error = hyper::Error> + Unpin),
            piece: &str,
        ) -> usize {
            let (before, _) = self.done().await;
            let taken = soon(body.frame()).await.unwrap().unwrap();
            assert_eq!(taken.into_data().unwrap(), piece);
            self.done().await.0 - before
        }
    }

    #[tokio::test]
    async fn a_piece_that_is_not_the_last_wakes_its_connection() {
        let mut connection = Connection::open().await;
        for is_quiet in [true, false] {
            let answer = connection.ask().await;
            connection
                .send("HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nfirs")
                .await;
            let body = soon(answer).await.unwrap().into_body();
            let mut body: Box<dyn Body<Data = _, Error = _> + Unpin> = if is_quiet {
                Box::new(Pieces::from(body))
            } else {
                Box::new(body)
            };
            assert_eq!(connection.turns_after(&mut body, "firs").await, 1);
            connection.send("last").await;
            // Once hyper takes no turn here, `Quiet` and `Pieces` have nothing to do.
            let turns = usize::from(!is_quiet);
            assert_eq!(connection.turns_after(&mut body, "last").await, turns);
            assert!(soon(body.frame()).await.is_none());
        }
    }

    #[tokio::test]
    async fn a_stream_is_read_when_something_has_come() {
        let mut connection = Connection::open().await;
        for looks in [1, 3] {
            let answer = connection.ask().await;
            assert_eq!(connection.done().await.1, looks);
            connection
                .send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .await;
            assert!(soon(answer).await.is_ok());
        }
        drop(connection.upstream);
        soon(async {
            while !connection.sender.is_closed() {
                yield_now().await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_stream_that_rings_at_once_is_read_again() {
        assert_eq!(read(Awaited::new(Hasty(false))).await, 0);
    }

    #[tokio::test]
    async fn the_task_that_read_last_is_woken() {
        let (near, mut far) = duplex(8);
        let mut stream = Awaited::new(TokioIo::new(near));
        let mut bytes = [0; 8];
        let mut into = ReadBuf::new(&mut bytes);
        let mut nobody = Context::from_waker(Waker::noop());
        let read_by_nobody = Pin::new(&mut stream).poll_read(&mut nobody, into.unfilled());
        assert!(read_by_nobody.is_pending());
        let reader = tokio::spawn(read(stream));
        yield_now().await;
        far.write_all(b"news").await.unwrap();
        yield_now().await;
        assert!(reader.is_finished(), "its own timeout would wake it");
        assert_eq!(reader.await.unwrap(), 4);
    }
}

//! Reads a stream only after it has woken its task.
//!
//! hyper (1.12) tries to read at every poll of a connection: ten times for a request that polls a task,
//! of which two find something. Through TLS such an attempt takes some 600 instructions.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use hyper::rt::{Read, ReadBufCursor, Write};
use pin_project_lite::pin_project;

pin_project! {
    /// A stream whose reads return [`Poll::Pending`] at once until the stream wakes the reader. Writes
    /// pass as they are.
    pub struct ReadWhenWoken<T> {
        #[pin]
        stream: T,
        reader: Option<(Arc<Reader>, Waker)>,
    }
}

/// The task that reads.
struct Reader {
    task: Waker,
    /// True if there may be something to read.
    is_woken: AtomicBool,
}

// === impl ReadWhenWoken ===

impl<T> ReadWhenWoken<T> {
    /// Wraps a stream. The first read is tried.
    pub fn new(stream: T) -> Self {
        let reader = None;
        Self { stream, reader }
    }
}

impl<T: Read> Read for ReadWhenWoken<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let is_same = |(reader, _): &(Arc<Reader>, _)| reader.task.will_wake(cx.waker());
        if !this.reader.as_ref().is_some_and(is_same) {
            *this.reader = None;
        }
        let (reader, waker) = this.reader.get_or_insert_with(|| Reader::of(cx.waker()));
        if !reader.take_wake() {
            return Poll::Pending;
        }
        let mut cx = Context::from_waker(waker);
        let read = this.stream.poll_read(&mut cx, buffer);
        if read.is_ready() {
            // There may be more, of which no wake-up tells.
            reader.is_woken.store(true, Ordering::Relaxed);
        }
        read
    }
}

impl<T: Write> Write for ReadWhenWoken<T> {
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

// === impl Reader ===

impl Reader {
    fn of(task: &Waker) -> (Arc<Self>, Waker) {
        let task = task.clone();
        let is_woken = AtomicBool::new(true);
        let reader = Arc::new(Self { task, is_woken });
        (Arc::clone(&reader), reader.into())
    }

    fn take_wake(&self) -> bool {
        self.is_woken.load(Ordering::Relaxed) && self.is_woken.swap(false, Ordering::Acquire)
    }
}

impl Wake for Reader {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

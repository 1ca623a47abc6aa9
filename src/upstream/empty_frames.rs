//! Removes empty frames from the data that upstream sends over HTTP/2.
//!
//! `h2` (0.4.20) closes a connection at its 101st empty DATA frame, even if the connection is old, and has no
//! setting for that. Some servers end each flush with an empty frame. Such a frame carries nothing (RFC 9113,
//! section 6.1), so it is dropped here. A flood of them is not dropped: it reaches `h2`, which closes the
//! connection.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::dial::Stream;

/// A stream of HTTP/2 frames without empty DATA frames.
pub(super) struct EmptyFrameFilter {
    stream: Box<dyn Stream>,
    frames: Frames,
}

/// Buffer for the frames on their way to `h2`.
struct Frames {
    buffer: Box<[u8]>,
    /// Range of the buffer that passes next.
    ready: Range<usize>,
    /// Size of the incomplete frame head behind `ready`, in bytes.
    begun: usize,
    /// Bytes of the current frame that have not passed yet.
    rest: usize,
    /// Start of the second in which empty frames are counted.
    second: Instant,
    /// Number of empty frames in that second.
    dropped: u32,
}

/// Most bytes that are read at once: one TLS record.
const BUFFER: usize = 16 << 10;
/// Size of a frame head (RFC 9113, section 4.1), in bytes.
const HEAD: usize = 9;
/// Most empty frames that are dropped in a second. A connection brings fewer responses than that in a second,
/// and each may end with one empty frame. To drop this many takes a hundredth of a second.
const MOST_IN_A_SECOND: u32 = 10_000;

// === impl EmptyFrameFilter ===

impl EmptyFrameFilter {
    /// Wraps a stream whose next byte begins a frame.
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        let frames = Frames {
            buffer: vec![0; BUFFER].into(),
            ready: 0..0,
            begun: 0,
            rest: 0,
            second: Instant::now(),
            dropped: 0,
        };
        Self { stream, frames }
    }
}

impl AsyncRead for EmptyFrameFilter {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, frames } = &mut *self;
        while frames.ready.is_empty() {
            let mut free = ReadBuf::new(frames.free());
            ready!(Pin::new(&mut **stream).poll_read(cx, &mut free))?;
            let count = free.filled().len();
            if count == 0 && frames.begun == 0 {
                return Poll::Ready(Ok(()));
            }
            frames.sift(count);
        }
        frames.pass(into);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for EmptyFrameFilter {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

// === impl Frames ===

impl Frames {
    /// Returns the free part of the buffer, behind the incomplete head. Call it only if nothing is ready.
    fn free(&mut self) -> &mut [u8] {
        let begun = self.ready.end..self.ready.end + self.begun;
        self.buffer.copy_within(begun, 0);
        self.ready = 0..0;
        &mut self.buffer[self.begun..]
    }

    /// Removes the empty frames from the incomplete head and `count` new bytes. If `count` is 0, the stream
    /// has ended, and an incomplete head passes unchanged.
    fn sift(&mut self, count: usize) {
        let end = self.begun + count;
        let (mut from, mut to) = (0, 0);
        while from < end {
            if self.rest == 0 {
                let Some(head) = self.buffer[from..end].first_chunk() else {
                    break;
                };
                let size = size(head);
                if is_empty_data(head) && self.may_drop() {
                    from += HEAD;
                    continue;
                }
                self.rest = HEAD + size;
            }
            let passing = self.rest.min(end - from);
            if to < from {
                self.buffer.copy_within(from..from + passing, to);
            }
            self.rest -= passing;
            from += passing;
            to += passing;
        }
        self.buffer.copy_within(from..end, to);
        self.begun = end - from;
        if count == 0 {
            to += std::mem::take(&mut self.begun);
        }
        self.ready = 0..to;
    }

    fn pass(&mut self, into: &mut ReadBuf<'_>) {
        let count = into.remaining().min(self.ready.len());
        let passing = self.ready.start..self.ready.start + count;
        into.put_slice(&self.buffer[passing]);
        self.ready.start += count;
    }

    /// Counts one empty frame. Returns false in a flood.
    fn may_drop(&mut self) -> bool {
        let now = Instant::now();
        if now - self.second >= Duration::from_secs(1) {
            (self.second, self.dropped) = (now, 0);
        }
        self.dropped += 1;
        self.dropped <= MOST_IN_A_SECOND
    }
}

/// Returns the size of a frame without its head, in bytes.
fn size([a, b, c, ..]: &[u8; HEAD]) -> usize {
    usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c)
}

/// Returns true for a DATA frame without content and without flags: it does not end its stream.
fn is_empty_data(head: &[u8; HEAD]) -> bool {
    head[..5] == [0; 5]
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Builds a DATA frame on stream 1 with these flags.
    fn data(content: &[u8], flags: u8) -> Vec<u8> {
        let size = u8::try_from(content.len()).unwrap();
        [&[0, 0, size, 0, flags, 0, 0, 0, 1], content].concat()
    }

    /// Returns the bytes that pass the filter. They arrive in chunks of `piece` bytes, and are read `part`
    /// bytes at a time.
    async fn passing(stream: &[u8], piece: usize, part: usize) -> Vec<u8> {
        let (near, mut far) = tokio::io::duplex(piece);
        let stream = stream.to_vec();
        let writing = tokio::spawn(async move { far.write_all(&stream).await });
        let mut filter = EmptyFrameFilter::new(Box::new(near));
        let (mut passed, mut buffer) = (Vec::new(), vec![0; part]);
        loop {
            match filter.read(&mut buffer).await.unwrap() {
                0 => break,
                count => passed.extend(&buffer[..count]),
            }
        }
        writing.await.unwrap().unwrap();
        passed
    }

    #[tokio::test]
    async fn empty_frames_are_dropped_wherever_they_come_and_all_else_passes() {
        let empty = data(b"", 0);
        // The payload of the first frame looks like the head of an empty frame, but must pass.
        let kept = [
            data(&data(b"", 0), 0),
            data(b"", 1),
            data(b"\0", 8),
            vec![0, 0, 0, 4, 0, 0, 0, 0, 0],
            data(&[7; 200], 0),
            data(b"", 0)[..8].to_vec(),
        ];
        let sent = kept.join(&*empty.repeat(3));
        for (piece, part) in [(1, 1), (1, 100), (8, 3), (9, 9), (100, 1), (4_096, 4_096)] {
            let passed = passing(&sent, piece, part).await;
            assert_eq!(passed, kept.concat(), "pieces of {piece}, parts of {part}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn more_in_a_second_than_servers_send_pass() {
        let most = MOST_IN_A_SECOND as usize;
        let mut filter = EmptyFrameFilter::new(Box::new(tokio::io::empty()));
        let dropped = |filter: &mut EmptyFrameFilter| {
            let tries = 0..2 * most;
            tries.filter(|_| filter.frames.may_drop()).count()
        };
        assert_eq!(dropped(&mut filter), most);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(dropped(&mut filter), most);
    }
}

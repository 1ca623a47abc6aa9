//! Bounds the memory that heads of requests take before they are whole.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::Request;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// Largest head of a request, in bytes. hyper answers a larger one with 431.
pub(super) const LARGEST: usize = 64 << 10;
/// As much of each head does not count, in bytes: clients of the Kling API send less. So what counts
/// is left to no one while others send large heads, but ordinary requests do not need it.
const FREE: usize = 4 << 10;
/// What counts of all heads together, in bytes. With 10,000 connections, all of which send a head, they
/// take 64 MiB.
const MOST: usize = 24 << 20;

/// What counts of all heads that are not whole, in bytes.
#[derive(Default)]
pub struct Heads(AtomicUsize);

/// The head that a connection receives. Clones are for the same connection.
#[derive(Clone)]
pub(super) struct Head(Arc<Received>);

struct Received {
    heads: Arc<Heads>,
    /// Whether no head was whole so far.
    is_first: AtomicBool,
    /// Whether what comes belongs to a body, whose reader bounds it.
    is_body: AtomicBool,
    /// What has come and is not known to have been used, in bytes.
    size: AtomicUsize,
    /// What came last, in bytes. When a message is whole, what follows it came with its end.
    last: AtomicUsize,
}

/// A body of a request. When it is dropped, the next head is expected.
pub(super) struct Behind {
    body: Incoming,
    head: Head,
}

// === impl Heads ===

impl Heads {
    /// Counts a head that grows. Returns whether there is room for it.
    fn grow(&self, from: usize, to: usize) -> bool {
        let more = counted(to) - counted(from);
        more == 0 || self.0.fetch_add(more, Relaxed) + more <= MOST
    }

    fn free(&self, size: usize) {
        let counted = counted(size);
        if counted > 0 {
            self.0.fetch_sub(counted, Relaxed);
        }
    }

    fn are_too_large(&self) -> bool {
        self.0.load(Relaxed) > MOST
    }
}

// === impl Head ===

impl Head {
    pub(super) fn new(heads: &Arc<Heads>) -> Self {
        Self(Arc::new(Received {
            heads: Arc::clone(heads),
            is_first: AtomicBool::new(true),
            is_body: AtomicBool::new(false),
            size: AtomicUsize::new(0),
            last: AtomicUsize::new(0),
        }))
    }

    /// So many bytes have come.
    ///
    /// # Errors
    ///
    /// They belong to a head, and all heads take too much.
    pub(super) fn received(&self, bytes: usize) -> io::Result<()> {
        let this = &*self.0;
        let before = this.size.load(Relaxed);
        this.size.store(before + bytes, Relaxed);
        this.last.store(bytes, Relaxed);
        if this.is_body.load(Relaxed) || this.heads.grow(before, before + bytes) {
            return Ok(());
        }
        Err(io::Error::other("too many large heads at once"))
    }

    /// The head is whole, and the next one follows.
    pub(super) fn end<B>(&self, request: &Request<B>) {
        self.take(request);
        let left = self.0.size.load(Relaxed);
        self.0.heads.grow(0, left);
    }

    /// The head is whole, and this body follows.
    pub(super) fn followed_by<B>(self, request: &Request<B>, body: Incoming) -> Behind {
        self.take(request);
        self.0.is_body.store(true, Relaxed);
        Behind { body, head: self }
    }

    /// Whether the connection is to be closed after an answer: the next head has begun, and all heads
    /// take too much.
    pub(super) fn is_too_large(&self) -> bool {
        counted(self.0.size.load(Relaxed)) > 0 && self.0.heads.are_too_large()
    }

    /// Whether something has come, and no whole head so far.
    pub(super) fn is_unfinished(&self) -> bool {
        self.0.is_first.load(Relaxed) && self.0.size.load(Relaxed) > 0
    }

    /// Takes a head out of what has come. The rest does not count yet.
    fn take<B>(&self, request: &Request<B>) {
        self.0.is_first.store(false, Relaxed);
        let size = self.0.size.load(Relaxed);
        self.0.heads.free(size);
        // A small one does not count in any case.
        let used = if counted(size) > 0 {
            least_size(request)
        } else {
            0
        };
        self.keep_last(size.saturating_sub(used));
    }

    fn keep_last(&self, size: usize) {
        let last = self.0.last.load(Relaxed);
        self.0.size.store(size.min(last), Relaxed);
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if !self.is_body.load(Relaxed) {
            self.heads.free(self.size.load(Relaxed));
        }
    }
}

// === impl Behind ===

impl Body for Behind {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(data) = frame.data_ref()
        {
            let size = &this.head.0.size;
            size.store(size.load(Relaxed).saturating_sub(data.len()), Relaxed);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        let received = &*self.head.0;
        self.head.keep_last(received.size.load(Relaxed));
        received.is_body.store(false, Relaxed);
        received.heads.grow(0, received.size.load(Relaxed));
    }
}

/// What the head of a request took at least, in bytes.
fn least_size<B>(request: &Request<B>) -> usize {
    let lines = request.headers().iter();
    let lines = lines.map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len());
    request.method().as_str().len() + request.uri().path().len() + lines.sum::<usize>()
}

/// As much of a head of this size counts.
fn counted(size: usize) -> usize {
    size.saturating_sub(FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request whose head takes at least so many bytes.
    fn request(size: usize) -> Request<()> {
        let value = "a".repeat(size - "GET".len() - "/".len() - "a: \r\n".len());
        Request::get("/").header("a", value).body(()).unwrap()
    }

    #[test]
    fn large_heads_share_what_they_may_take_and_small_ones_do_not_need_it() {
        let heads = Arc::default();
        let head = || Head::new(&heads);
        let large: Vec<_> = (0..MOST / (60 << 10)).map(|_| head()).collect();
        for head in &large {
            assert!(head.received(1 << 10).is_ok());
            assert!(head.received(LARGEST - (1 << 10)).is_ok());
        }
        let rest = MOST % (60 << 10);
        assert!(head().received(FREE + rest + 1).is_err());
        assert!(head().received(FREE).is_ok());
        // One that is whole makes room, and so does one whose connection has ended.
        large[0].end(&request(LARGEST));
        assert!(large[0].received(LARGEST).is_ok());
        assert!(head().received(LARGEST).is_err());
        drop(large);
        let head = head();
        assert!(head.received(LARGEST).is_ok());
        drop(head);
        assert_eq!(heads.0.load(Relaxed), 0);
    }

    #[test]
    fn what_follows_a_whole_head_in_the_same_read_counts() {
        let heads = Arc::default();
        let head = Head::new(&heads);
        for (reads, used, left) in [
            (&[100][..], 80, 100),
            (&[50_000], 100, 50_000),
            // A new head is no part of what came before the end of the last one.
            (&[30_000, 20_000, 400], 50_000, 400),
            (&[30_000], 30_000, 400),
        ] {
            for bytes in reads {
                head.received(*bytes).unwrap();
            }
            head.end(&request(used));
            assert_eq!(head.0.size.load(Relaxed), left, "{reads:?}");
            assert_eq!(heads.0.load(Relaxed), counted(left), "{reads:?}");
        }
        assert!(!head.is_too_large());
        let others: Vec<_> = (0..MOST / LARGEST + 100)
            .map(|_| Head::new(&heads))
            .collect();
        assert!(others.iter().any(|other| other.received(LARGEST).is_err()));
        head.received(50_000).unwrap_err();
        head.end(&request(100));
        assert!(head.is_too_large());
        drop((head, others));
        assert_eq!(heads.0.load(Relaxed), 0);
    }
}

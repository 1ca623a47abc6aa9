//! Limits the memory of request heads that are not yet complete.

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
/// Bytes of each head that do not count. Clients of the Kling API send smaller heads. So ordinary requests
/// work even while others send large heads and use up the limit.
const FREE: usize = 4 << 10;
/// Most counted bytes of all heads together. With 10,000 connections that all send a head, it is 64 MiB.
const MOST: usize = 24 << 20;

/// Counted bytes of all incomplete heads.
#[derive(Default)]
pub struct Heads(AtomicUsize);

/// Head that a connection receives. Clones are for the same connection.
#[derive(Clone)]
pub(super) struct Head(Arc<Received>);

struct Received {
    heads: Arc<Heads>,
    /// True until the first head is complete.
    is_first: AtomicBool,
    /// True while received bytes belong to a body, whose reader limits them.
    is_body: AtomicBool,
    /// Bytes received and not known to have been used.
    size: AtomicUsize,
    /// Size of the last read, in bytes. When a message is complete, the bytes after it arrived in the same
    /// read as its end.
    last: AtomicUsize,
}

/// Body of a request. When it is dropped, the next head is expected.
pub(super) struct Behind {
    body: Incoming,
    head: Head,
}

// === impl Heads ===

impl Heads {
    /// Counts the growth of a head. Returns false if all heads together exceed [`MOST`].
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

    /// Counts bytes that were read from the connection.
    ///
    /// # Errors
    ///
    /// The bytes belong to a head, and all heads together take too much.
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

    /// Notes that a head without a body is complete. The next head follows.
    pub(super) fn end<B>(&self, request: &Request<B>) {
        self.take(request);
        let left = self.0.size.load(Relaxed);
        self.0.heads.grow(0, left);
    }

    /// Notes that a head is complete, and wraps the body that follows.
    pub(super) fn followed_by<B>(self, request: &Request<B>, body: Incoming) -> Behind {
        self.take(request);
        self.0.is_body.store(true, Relaxed);
        Behind { body, head: self }
    }

    /// Returns true if the connection is to be closed after a response: the next head has begun, and all
    /// heads together take too much.
    pub(super) fn is_too_large(&self) -> bool {
        counted(self.0.size.load(Relaxed)) > 0 && self.0.heads.are_too_large()
    }

    /// Returns true if the client has sent bytes, but no complete head so far.
    pub(super) fn is_unfinished(&self) -> bool {
        self.0.is_first.load(Relaxed) && self.0.size.load(Relaxed) > 0
    }

    /// Subtracts a complete head from the received bytes. The rest does not count yet.
    fn take<B>(&self, request: &Request<B>) {
        self.0.is_first.store(false, Relaxed);
        let size = self.0.size.load(Relaxed);
        self.0.heads.free(size);
        // A small head does not count, so it need not be measured.
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

/// Returns a lower bound for the size of a request's head, in bytes.
fn least_size<B>(request: &Request<B>) -> usize {
    let lines = request.headers().iter();
    let lines = lines.map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len());
    request.method().as_str().len() + request.uri().path().len() + lines.sum::<usize>()
}

/// Returns the bytes of a head of this size that count.
fn counted(size: usize) -> usize {
    size.saturating_sub(FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a request whose head takes at least `size` bytes.
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
        // A head frees its bytes when it is complete or when its connection ends.
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
            // A new head does not include bytes that came before the end of the last head.
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

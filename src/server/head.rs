//! Bounds the memory that heads of requests take before they are whole.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::quiet::Pieces;

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
    /// Whether what comes belongs to a head.
    is_expected: AtomicBool,
    /// How much of it has come, in bytes.
    size: AtomicUsize,
}

/// A body of a request. When it is dropped, the next head is expected.
pub(super) struct Behind {
    pieces: Pieces,
    head: Head,
}

// === impl Heads ===

impl Heads {
    /// Takes room for a head that grows, if there is any.
    fn grow(&self, from: usize, to: usize) -> bool {
        let more = counted(to) - counted(from);
        if more == 0 {
            return true;
        }
        let fits = self.0.fetch_add(more, Relaxed) + more <= MOST;
        if !fits {
            self.0.fetch_sub(more, Relaxed);
        }
        fits
    }

    fn free(&self, size: usize) {
        let counted = counted(size);
        if counted > 0 {
            self.0.fetch_sub(counted, Relaxed);
        }
    }
}

// === impl Head ===

impl Head {
    pub(super) fn new(heads: &Arc<Heads>) -> Self {
        Self(Arc::new(Received {
            heads: Arc::clone(heads),
            is_expected: AtomicBool::new(true),
            size: AtomicUsize::new(0),
        }))
    }

    /// So many bytes have come.
    ///
    /// # Errors
    ///
    /// They belong to a head, and all heads take too much.
    pub(super) fn received(&self, bytes: usize) -> io::Result<()> {
        let this = &*self.0;
        if !this.is_expected.load(Relaxed) {
            return Ok(());
        }
        let before = this.size.load(Relaxed);
        let size = before + bytes;
        if !this.heads.grow(before, size) {
            return Err(io::Error::other("too many large heads at once"));
        }
        this.size.store(size, Relaxed);
        Ok(())
    }

    /// It is whole, and this body follows.
    pub(super) fn followed_by(self, pieces: Pieces) -> Behind {
        self.0.is_expected.store(false, Relaxed);
        self.end();
        Behind { pieces, head: self }
    }

    /// It is whole, and the next one follows.
    pub(super) fn end(&self) {
        let size = self.0.size.swap(0, Relaxed);
        self.0.heads.free(size);
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.heads.free(self.size.load(Relaxed));
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
        Pin::new(&mut self.get_mut().pieces).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.pieces.size_hint()
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.head.0.is_expected.store(true, Relaxed);
    }
}

/// As much of a head of this size counts.
fn counted(size: usize) -> usize {
    size.saturating_sub(FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        large[0].end();
        assert!(large[0].received(LARGEST).is_ok());
        assert!(head().received(LARGEST).is_err());
        drop(large);
        let head = head();
        assert!(head.received(LARGEST).is_ok());
        drop(head);
        assert_eq!(heads.0.load(Relaxed), 0);
    }
}

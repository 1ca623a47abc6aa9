//! Resets a connection whose answer was cut off where a client cannot tell that otherwise.
//!
//! To a client of HTTP/1.0, a body without a length ends with its connection: a clean end would make a
//! cut-off body look whole. So from the beginning of such an answer the connection is to be reset, until
//! it is shut down as it should. On a Unix socket there is no reset, and the client sees a clean end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use http_body::Body;

/// Whether a connection is to be reset when it is closed. Clones are for the same connection.
#[derive(Clone, Default)]
pub(super) struct Reset(Arc<AtomicBool>);

// === impl Reset ===

impl Reset {
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Notes that an answer to a client of HTTP/1.0 begins.
    pub(super) fn begin(&self, body: &impl Body) {
        if body.size_hint().exact().is_none() {
            self.0.store(true, Relaxed);
        }
    }

    /// Notes that the connection was shut down as it should.
    pub(super) fn shut_down(&self) {
        self.0.store(false, Relaxed);
    }
}

//! Resets a connection after a truncated response, if the client cannot notice the truncation otherwise.
//!
//! For an HTTP/1.0 client, a body without a length ends with its connection: after a clean end, a truncated
//! body would look complete. So from the beginning of such a response, the connection is to be reset, until
//! it is shut down properly. A Unix socket cannot be reset, so its client sees a clean end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use http_body::Body;

/// Flag that a connection is to be reset when it is closed. Clones are for the same connection.
#[derive(Clone, Default)]
pub(super) struct Reset(Arc<AtomicBool>);

// === impl Reset ===

impl Reset {
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Notes that a response to an HTTP/1.0 client begins.
    pub(super) fn begin(&self, body: &impl Body) {
        if body.size_hint().exact().is_none() {
            self.0.store(true, Relaxed);
        }
    }

    /// Notes that the connection was shut down properly.
    pub(super) fn shut_down(&self) {
        self.0.store(false, Relaxed);
    }
}

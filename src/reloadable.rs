//! A value that may be replaced while requests read it.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

/// A shared value that can be replaced. Every clone reads the latest value, without a lock.
pub struct Reloadable<T>(Arc<ArcSwap<T>>);

// === impl Reloadable ===

impl<T> Reloadable<T> {
    /// Makes a shared value with this content.
    pub fn new(value: T) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(value)))
    }

    /// Returns the current value. Hold it for a short read only, not across an `.await`.
    pub fn load(&self) -> Guard<Arc<T>> {
        self.0.load()
    }

    /// Replaces the value for all later reads.
    pub fn store(&self, value: T) {
        self.0.store(Arc::new(value));
    }
}

impl<T> Clone for Reloadable<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

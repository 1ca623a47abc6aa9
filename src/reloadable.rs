//! A value that may be replaced while requests read it.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

/// A shared value; every clone sees the latest one. Reading takes no lock.
pub struct Reloadable<T>(Arc<ArcSwap<T>>);

// === impl Reloadable ===

impl<T> Reloadable<T> {
    /// Shares a value.
    pub fn new(value: T) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(value)))
    }

    /// The value now. Hold it for the length of a look, not across an `.await`.
    pub fn load(&self) -> Guard<Arc<T>> {
        self.0.load()
    }

    /// Replaces the value for whoever looks from now on.
    pub fn store(&self, value: T) {
        self.0.store(Arc::new(value));
    }
}

impl<T> Clone for Reloadable<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

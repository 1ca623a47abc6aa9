//! Classifies requests, to choose a connection for each.

use std::sync::Arc;

use axum::body::Body;
use http_body::Body as _;

/// Class of a request, by which it goes over HTTP/1.1 or HTTP/2 if upstream speaks both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestClass {
    /// At most [`FEW`] requests are in flight. HTTP/1.1 is cheaper.
    Few,
    /// More than [`FEW`] requests are in flight. A shared connection of HTTP/2 is cheaper.
    Many,
    /// The body is large: over HTTP/2 it would take longer than a handshake does.
    Large,
}

/// Number of requests that a thread has in flight. Each of them holds a clone of this count.
#[derive(Clone, Default)]
pub(super) struct InFlightCount(Arc<()>);

/// Most requests that a thread sends over HTTP/1.1 at once. Measured: 16 at once cost less over HTTP/1.1 than
/// over HTTP/2, and 128 cost more.
pub(super) const FEW: usize = 32;
/// Smallest body of a [`RequestClass::Large`] request, in bytes. A server usually accepts 64 KiB of a
/// stream before it acknowledges, so this size takes four round trips; a handshake takes two or three.
const LARGE: u64 = 256 << 10;

// === impl InFlightCount ===

impl InFlightCount {
    /// Classifies a request by its body, and counts it until the returned clone is dropped. A body of unknown
    /// length counts as large.
    pub(super) fn begin(&self, body: &Body) -> (RequestClass, Self) {
        let class = match body.size_hint().upper() {
            Some(LARGE..) | None => RequestClass::Large,
            Some(..LARGE) if Arc::strong_count(&self.0) <= FEW => RequestClass::Few,
            Some(..LARGE) => RequestClass::Many,
        };
        (class, self.clone())
    }
}

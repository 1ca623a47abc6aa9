//! Limits of the time that upstream may take.

use std::time::Duration;

/// The time limits of a request (`upstream.*_timeout`).
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Most time for name resolution, TCP and TLS together.
    pub connect: Duration,
    /// Most time from the last byte of a request to the head of its response.
    pub response: Duration,
    /// Longest silence inside a body, in either direction.
    pub idle: Duration,
}

//! The wall clock, as an argument: it decides when a token is minted, used and replaced.

use std::time::SystemTime;

/// Tells the wall-clock time.
pub trait Clock: Send + Sync + 'static {
    /// The time now. It may jump either way: machines sleep, and clocks are corrected.
    fn now(&self) -> SystemTime;
}

/// The clock of this machine.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock;

// === impl SystemClock ===

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the wall clock"
    )]
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }
}

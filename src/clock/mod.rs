//! The wall clock, as an argument. It decides when a token is minted, used and replaced.

pub mod last_seen;

use std::time::SystemTime;

/// A source of wall-clock time.
pub trait Clock: Send + Sync + 'static {
    /// Returns the time now. It may jump either way: machines sleep, and clocks are corrected.
    fn now(&self) -> SystemTime;

    /// Returns the number of the correction that [`now`](Self::now) applies.
    fn correction(&self) -> Correction {
        Correction::default()
    }
}

/// Number of a clock correction. A clock gets a new number each time its correction changes, so that
/// tokens minted before and after the change can be told apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Correction(pub u32);

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

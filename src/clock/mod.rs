//! The wall clock, as an argument: it decides when a token is minted, used and replaced.

pub mod last_seen;

use std::time::SystemTime;

/// Tells the wall-clock time.
pub trait Clock: Send + Sync + 'static {
    /// The time now. It may jump either way: machines sleep, and clocks are corrected.
    fn now(&self) -> SystemTime;

    /// Which correction the time has that [`now`](Self::now) tells.
    fn correction(&self) -> Correction {
        Correction::default()
    }
}

/// Names what a clock is corrected by. A clock that is set anew gets another name, so that what was made
/// by the time before is told from what is made by the time now.
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

//! The phase of the proxy, from its start to its end. The health endpoints show it, and the guard acts
//! on it.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use tokio::sync::Notify;

/// The phases, in order. A phase never changes back to an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Settings and credentials are loaded, but the first token or a listener is still missing.
    Starting,
    /// The proxy serves requests, until it is told to end.
    Ready,
    /// The proxy has received the signal to end and still serves, so that load balancers can remove it
    /// (`shutdown.delay`).
    Stopping,
    /// Requests in flight go on to their end; no new request begins.
    Draining,
    /// Requests that are still in flight are given up.
    Ended,
}

/// Holds the current [`Phase`], and wakes those that wait for one of the last two.
#[derive(Debug, Default)]
pub struct Lifecycle {
    phase: AtomicU8,
    /// Notified at the beginning of each of the last two phases.
    ending: Notify,
}

// === impl Phase ===

impl Phase {
    const ALL: [Self; 5] = [
        Self::Starting,
        Self::Ready,
        Self::Stopping,
        Self::Draining,
        Self::Ended,
    ];

    /// Returns a stable name for the health endpoints.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Draining | Self::Ended => "draining",
        }
    }
}

// === impl Lifecycle ===

impl Lifecycle {
    /// Moves to a phase. It has no effect if the current phase is later.
    pub fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Relaxed);
        if phase >= Phase::Draining {
            self.ending.notify_waiters();
        }
    }

    /// Waits until no new request may begin.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits until the phase is [`Phase::Ended`].
    pub async fn ended(&self) {
        self.reached(Phase::Ended).await;
    }

    /// Waits for one of the last two phases.
    async fn reached(&self, phase: Phase) {
        loop {
            let notified = self.ending.notified();
            if self.phase() >= phase {
                return;
            }
            notified.await;
        }
    }

    pub fn phase(&self) -> Phase {
        let phase = self.phase.load(Relaxed);
        Phase::ALL
            .into_iter()
            .find(|each| *each as u8 == phase)
            .unwrap_or(Phase::Ended)
    }

    /// Returns true if no new request may begin.
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Draining
    }
}

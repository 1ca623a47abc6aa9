//! Where in its life the proxy is: the health endpoints tell it, the guard obeys it.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use tokio::sync::Notify;

/// The phases in their order. A phase is never left for an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Settings and credentials are there; the first token or a listener is not.
    Starting,
    /// It serves.
    Ready,
    /// It was told to end and still serves, so that load balancers can turn away (`shutdown.delay`).
    Stopping,
    /// What is in flight ends; nothing new is begun.
    Draining,
    /// What is still in flight is given up.
    Ended,
}

/// A latch on the current [`Phase`].
#[derive(Debug, Default)]
pub struct Lifecycle {
    phase: AtomicU8,
    ended: Notify,
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

    /// A stable name for the health endpoints.
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
    /// Goes on to a phase; stays where it is if that has passed already.
    pub fn enter(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Relaxed);
        if phase == Phase::Ended {
            self.ended.notify_waiters();
        }
    }

    /// Waits for [`Phase::Ended`].
    pub async fn ended(&self) {
        let notified = self.ended.notified();
        if self.phase() != Phase::Ended {
            notified.await;
        }
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        let phase = self.phase.load(Relaxed);
        Phase::ALL
            .into_iter()
            .find(|each| *each as u8 == phase)
            .unwrap_or(Phase::Ended)
    }

    /// Whether nothing new may begin.
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Draining
    }
}

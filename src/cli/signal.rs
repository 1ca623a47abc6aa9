//! The signals that end the process.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// SIGINT and SIGTERM.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

/// Signals that come within this time are one.
const MOMENT: Duration = Duration::from_millis(500);

// === impl Signals ===

impl Signals {
    /// Takes the signals over from now on.
    pub(super) fn new() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self {
            interrupt,
            terminate,
        })
    }

    /// Waits for a further one, after the `first` if there was one. Those that come in the same moment
    /// count as one: a terminal signals a group, and a supervisor the process too.
    pub(super) async fn again(&mut self, mut first: Option<Instant>) {
        loop {
            self.next().await;
            match first {
                Some(first) if first.elapsed() >= MOMENT => return,
                Some(_) => {}
                None => first = Some(Instant::now()),
            }
        }
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// SIGHUP, which would end the process if nobody took it.
pub(super) fn hang_up() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

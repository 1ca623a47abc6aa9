//! Signals to the process: SIGINT and SIGTERM end it, and SIGHUP reloads its settings.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

/// Streams of the signals that end the process, SIGINT and SIGTERM.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

/// Signals count as one if they arrive within this time after the first.
const MOMENT: Duration = Duration::from_millis(500);

// === impl Signals ===

impl Signals {
    /// Receives the signals from now on, so that they do not end the process at once.
    pub(super) fn new() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self {
            interrupt,
            terminate,
        })
    }

    /// Waits for a further signal after the `first`; for the second one if `first` is `None`. Signals
    /// within [`MOMENT`] count as one: a terminal signals the whole group, and a supervisor may signal
    /// the process too.
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

    /// Waits for the next SIGINT or SIGTERM.
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Returns a stream of SIGHUP. The signal would end the process if it were not received.
pub(super) fn hang_up() -> io::Result<Signal> {
    signal(SignalKind::hangup())
}

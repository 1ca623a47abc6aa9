//! The signals that a command is told of.

use std::fs::{self, File};
use std::time::Duration;
use std::{future, io};

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::tcgetpgrp;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// All that somebody may send to a program. SIGWINCH and what stops a job are for the whole group,
/// by the terminal; SIGKILL cannot be passed on.
const PASSED_ON: [Signal; 6] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::USR1,
    Signal::USR2,
];
/// By these a terminal tells all that run in its foreground.
const OF_TERMINAL: [Signal; 2] = [Signal::INT, Signal::QUIT];
/// Whoever sends these wants it to end.
const ENDING: [Signal; 3] = [Signal::INT, Signal::QUIT, Signal::TERM];
/// What ended the command may reach us as late as this after its end.
const LAG: Duration = Duration::from_millis(500);

/// The signals that come to us, taken over so that they do not end us.
pub(super) struct ForwardedSignals {
    coming: mpsc::Receiver<Signal>,
    /// Whether we have been told to end.
    is_stopping: bool,
}

// === impl ForwardedSignals ===

impl ForwardedSignals {
    /// Takes them over from now on, but for those that we were started to ignore, as by nohup(1): the
    /// command ignores them too.
    pub(super) fn new() -> io::Result<Self> {
        let (sender, coming) = mpsc::channel(PASSED_ON.len());
        let ignored = ignored();
        for passed in PASSED_ON {
            if ignored & 1 << (passed.as_raw() - 1) != 0 {
                continue;
            }
            let mut stream = signal(SignalKind::from_raw(passed.as_raw()))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(passed).await.is_ok() {}
            });
        }
        let is_stopping = false;
        Ok(Self {
            coming,
            is_stopping,
        })
    }

    /// Waits for the next one.
    pub(super) async fn next(&mut self) -> Signal {
        let Some(signal) = self.coming.recv().await else {
            return future::pending().await; // all are ignored
        };
        signal
    }

    /// Tells the command, which decides what to do.
    pub(super) fn pass_on(&mut self, signal: Signal, command: &Child) {
        self.is_stopping |= ENDING.contains(&signal);
        if OF_TERMINAL.contains(&signal) && are_in_foreground() {
            return; // told already: a second one would cut its end short
        }
        let id = command.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(id) = id
            && let Err(error) = kill_process(id, signal)
        {
            tracing::warn!(%error, ?signal, "cannot pass a signal on");
        }
    }

    /// Waits, once the command has ended, until we are told to end again. What comes in the moment of
    /// the first time, or of the command's end, is the same word.
    pub(super) async fn insist(&mut self) {
        let mut is_stopping = self.is_stopping.then(Instant::now);
        loop {
            if !ENDING.contains(&self.next().await) {
                continue;
            }
            match is_stopping {
                Some(is_stopping) if is_stopping.elapsed() > LAG => return,
                Some(_) => {}
                None => is_stopping = Some(Instant::now()),
            }
        }
    }
}

/// The signals that are ignored, a bit each. Where the system does not tell, none.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default()
}

/// Whether we run in the foreground of a terminal, and the command with us.
fn are_in_foreground() -> bool {
    let foreground = File::open("/dev/tty").map(tcgetpgrp);
    foreground.is_ok_and(|group| group == Ok(getpgrp()))
}

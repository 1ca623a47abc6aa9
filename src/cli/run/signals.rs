//! The signals that are passed on to the command.

use std::fs::{self, File};
use std::time::Duration;
use std::{future, io};

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::tcgetpgrp;
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// All signals that somebody may send to a program. The terminal itself sends SIGWINCH and the signals
/// that stop a job to the whole group. SIGKILL cannot be passed on.
const PASSED_ON: [Signal; 6] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::USR1,
    Signal::USR2,
];
/// Signals that a terminal sends to all processes in its foreground.
const OF_TERMINAL: [Signal; 2] = [Signal::INT, Signal::QUIT];
/// Signals that ask the command to end.
const ENDING: [Signal; 3] = [Signal::INT, Signal::QUIT, Signal::TERM];
/// Longest time after the command's end until the signal that ended it has reached us too.
const LAG: Duration = Duration::from_millis(500);

/// The signals to this process. They are received here, so that they do not end the process.
pub(super) struct ForwardedSignals {
    coming: mpsc::Receiver<Signal>,
    /// True once one of [`ENDING`] has arrived.
    is_stopping: bool,
}

// === impl ForwardedSignals ===

impl ForwardedSignals {
    /// Receives the signals from now on, except those that we were started to ignore, for example by
    /// nohup(1). The command ignores these too.
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

    /// Waits for the next signal. Never returns if all signals are ignored.
    pub(super) async fn next(&mut self) -> Signal {
        let Some(signal) = self.coming.recv().await else {
            return future::pending().await; // all signals are ignored
        };
        signal
    }

    /// Sends a signal to the command, which decides what to do.
    pub(super) fn pass_on(&mut self, signal: Signal, command: &Child) {
        self.is_stopping |= ENDING.contains(&signal);
        if OF_TERMINAL.contains(&signal) && are_in_foreground() {
            return; // the terminal has sent it: a second one would cut the command's shutdown short
        }
        let id = command.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(id) = id
            && let Err(error) = kill_process(id, signal)
        {
            tracing::warn!(%error, ?signal, "cannot pass a signal on");
        }
    }

    /// Waits, after the command has ended, for a further signal of [`ENDING`]. A signal within [`LAG`] of
    /// the first one, or of the command's end, counts as the same one.
    pub(super) async fn insist(&mut self) {
        let mut first = self.is_stopping.then(Instant::now);
        loop {
            if !ENDING.contains(&self.next().await) {
                continue;
            }
            match first {
                Some(first) if first.elapsed() > LAG => return,
                Some(_) => {}
                None => first = Some(Instant::now()),
            }
        }
    }
}

/// Returns the ignored signals, one bit each (`SigIgn` of proc(5)); none if the system does not have
/// this file.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default()
}

/// Returns true if this process, and so the command, runs in the foreground of a terminal.
fn are_in_foreground() -> bool {
    let foreground = File::open("/dev/tty").map(tcgetpgrp);
    foreground.is_ok_and(|group| group == Ok(getpgrp()))
}

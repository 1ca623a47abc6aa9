//! Lines on their way to standard error: each is written at once, but for those that can wait for one
//! another. Under a storm of refused polls, a system call for each line was a twentieth of the work.

use std::cell::RefCell;
use std::io::{self, Write};

/// Takes the lines of a thread.
pub(super) struct Lines;

/// What a thread has not written yet.
#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Whether the line that comes next can wait too.
    unhurried: bool,
}

/// While there is one, lines can wait.
struct Unhurried;

thread_local! {
    static WAITING: RefCell<Waiting> = RefCell::default();
}

/// As much waits, in bytes: what a pipe takes in one piece, so that nobody else's output comes between
/// (pipe(7)). A thread that never rests writes some eight lines at a time.
const MOST: usize = 4096;

/// Logs something whose loss would be no harm should the process be killed: the line is written by
/// [`flush`], or with one that cannot wait.
pub fn unhurried(log: impl FnOnce()) {
    let _unhurried = Unhurried::new();
    log();
}

/// Writes what waits on this thread. Whoever logs so calls it when there is nothing else to do.
pub fn flush() {
    WAITING.with_borrow_mut(Waiting::flush);
}

// === impl Unhurried ===

impl Unhurried {
    fn new() -> Self {
        WAITING.with_borrow_mut(|waiting| waiting.unhurried = true);
        Self
    }
}

impl Drop for Unhurried {
    fn drop(&mut self) {
        WAITING.with_borrow_mut(|waiting| waiting.unhurried = false);
    }
}

// === impl Lines ===

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let waits = WAITING.try_with(|waiting| waiting.borrow_mut().take(line));
        // At the end of a thread nothing can wait any more.
        if !waits.unwrap_or(false) {
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Waiting ===

impl Waiting {
    /// Takes a line that can wait; tells whether it does. What waited before goes first.
    fn take(&mut self, line: &[u8]) -> bool {
        let waits = self.unhurried && line.len() <= MOST;
        if !waits || self.lines.len() + line.len() > MOST {
            self.flush();
        }
        if waits {
            self.lines.extend_from_slice(line);
        }
        waits
    }

    fn flush(&mut self) {
        if !self.lines.is_empty() {
            // Nobody is left to be told that this failed.
            let _ = io::stderr().write_all(&self.lines);
            self.lines.clear();
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unhurried_line_waits_and_not_longer_than_a_pipe_takes() {
        let waiting = || WAITING.with_borrow(|waiting| waiting.lines.len());
        let write = |bytes: usize| Lines.write_all(&vec![b'\n'; bytes]).unwrap();
        unhurried(|| write(3));
        assert_eq!(waiting(), 3);
        write(1);
        assert_eq!(waiting(), 0);
        unhurried(|| write(MOST));
        assert_eq!(waiting(), MOST);
        unhurried(|| write(1));
        assert_eq!(waiting(), 1);
        unhurried(|| write(MOST + 1));
        assert_eq!(waiting(), 0);
        let panicked = std::panic::catch_unwind(|| unhurried(|| panic!("while logging")));
        assert!(panicked.is_err());
        write(1);
        assert_eq!(waiting(), 0);
    }
}

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

thread_local! {
    static WAITING: RefCell<Waiting> = RefCell::default();
}

/// As much waits, in bytes: a thread that never rests writes some thirty lines at a time.
const MOST: usize = 16 << 10;

/// Logs something whose loss would be no harm should the process be killed: the line is written when
/// the thread has nothing else to do ([`flush`]), or with one that cannot wait.
pub fn unhurried(log: impl FnOnce()) {
    WAITING.with_borrow_mut(|waiting| waiting.unhurried = true);
    log();
    WAITING.with_borrow_mut(|waiting| waiting.unhurried = false);
}

/// Writes what waits on this thread.
pub fn flush() {
    // Whoever logs has nobody left to tell that this failed.
    let _ = WAITING.with_borrow_mut(Waiting::flush);
}

// === impl Lines ===

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let taken = WAITING.try_with(|waiting| waiting.borrow_mut().take(line));
        // What the end of a thread still has to say is said at once.
        taken.unwrap_or_else(|_| io::stderr().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Waiting ===

impl Waiting {
    fn take(&mut self, line: &[u8]) -> io::Result<()> {
        self.lines.extend_from_slice(line);
        if self.unhurried && self.lines.len() < MOST {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.lines.is_empty() {
            return Ok(());
        }
        let written = io::stderr().write_all(&self.lines);
        self.lines.clear();
        written
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.flush();
    }
}

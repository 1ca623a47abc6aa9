//! The queue of log lines. One thread writes them to standard error, so that a reader that stalls, or a
//! full disk, holds up nothing else.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use memchr::memchr_iter;
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use super::CREATES;

/// The queue of this process.
pub(super) static QUEUE: Queue = Queue::new();

/// Lines that were dropped since the start, because the queue was full or could not be written.
pub(super) static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that wait to be written, within a bound.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Notified when there are lines.
    filled: Condvar,
    /// Notified when lines were written.
    written: Condvar,
}

struct State {
    lines: Vec<u8>,
    /// Whether some are being written.
    is_writing: bool,
    /// Lines that were dropped since the log told so.
    dropped: u64,
    /// Whether lines were dropped and none was written since.
    is_stuck: bool,
}

/// Puts each line into the queue.
pub(super) struct Lines;

/// Puts a line into the queue.
pub(super) struct Line {
    /// Whether to wait for room, for at most [`PATIENCE`].
    is_patient: bool,
}

/// The most that waits, in bytes.
const MOST: usize = 1 << 20;
/// How long the line of a create waits for room. Once that was in vain, none waits before a line is
/// written again.
const PATIENCE: Duration = Duration::from_millis(100);

// === impl Queue ===

impl Queue {
    const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                lines: Vec::new(),
                is_writing: false,
                dropped: 0,
                is_stuck: false,
            }),
            filled: Condvar::new(),
            written: Condvar::new(),
        }
    }

    /// Starts the thread that writes to standard error.
    pub(super) fn start(&'static self) -> io::Result<()> {
        let thread = thread::Builder::new().name("log".to_owned());
        thread.spawn(|| {
            loop {
                let lost = self.write(&mut io::stderr());
                if lost > 0 {
                    tracing::warn!(lost, "log lines were lost: standard error was stuck");
                }
            }
        })?;
        Ok(())
    }

    /// Takes a line, or drops it.
    pub(super) fn push(&self, line: &[u8], is_patient: bool) {
        let mut state = self.lock();
        if is_patient && !state.is_stuck && !state.has_room(line) {
            let waited = self
                .written
                .wait_timeout_while(state, PATIENCE, |state| !state.has_room(line));
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        if state.has_room(line) {
            state.lines.extend_from_slice(line);
            self.filled.notify_one();
        } else {
            state.drop_lines(1);
        }
    }

    /// Waits until everything is written, for at most so long.
    pub(super) fn flush(&self, limit: Duration) {
        let is_busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        let _ = self.written.wait_timeout_while(self.lock(), limit, is_busy);
    }

    /// Returns true if lines were dropped and none was written since.
    pub(super) fn is_stuck(&self) -> bool {
        self.lock().is_stuck
    }

    /// Waits for lines and writes them. Returns how many were lost before, once that can be told.
    fn write(&self, to: &mut impl Write) -> u64 {
        let state = self
            .filled
            .wait_while(self.lock(), |state| state.lines.is_empty());
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut state.lines);
        state.is_writing = true;
        drop(state);
        let outcome = to.write_all(&lines);
        let mut state = self.lock();
        state.is_writing = false;
        let mut lost = 0;
        if outcome.is_ok() {
            state.is_stuck = false;
            lost = std::mem::take(&mut state.dropped);
        } else {
            state.drop_lines(memchr_iter(b'\n', &lines).count() as u64);
        }
        self.written.notify_all();
        lost
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn has_room(&self, line: &[u8]) -> bool {
        self.lines.len() + line.len() <= MOST
    }

    fn drop_lines(&mut self, count: u64) {
        self.dropped += count;
        self.is_stuck = true;
        DROPPED.fetch_add(count, Relaxed);
    }
}

// === impl Lines ===

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line { is_patient: false }
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> Line {
        Line {
            is_patient: metadata.target() == CREATES,
        }
    }
}

// === impl Line ===

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(line, self.is_patient);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes no line, or fails.
    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn full() -> Queue {
        let queue = Queue::new();
        queue.push(&vec![b'\n'; MOST], false);
        assert!(!queue.is_stuck());
        queue
    }

    #[test]
    fn line_beyond_the_bound_is_dropped_and_counted_until_one_is_written() {
        let queue = full();
        queue.push(b"read\n", false);
        assert!(queue.is_stuck());
        let mut written = Vec::new();
        assert_eq!(queue.write(&mut written), 1);
        assert_eq!((written.len(), queue.is_stuck()), (MOST, false));
    }

    #[test]
    fn line_of_a_create_waits_for_room() {
        let queue = full();
        let mut written = Vec::new();
        thread::scope(|scope| {
            let pushed = scope.spawn(|| queue.push(b"create\n", true));
            queue.write(&mut written);
            pushed.join().unwrap();
        });
        queue.write(&mut written);
        assert!(written.ends_with(b"create\n") || queue.is_stuck());
    }

    #[test]
    fn no_line_waits_once_one_has_waited_in_vain() {
        let queue = full();
        queue.push(b"create\n", true);
        assert!(queue.is_stuck());
        // Without a reader: each of these would wait.
        for _ in 0..10_000 {
            queue.push(b"create\n", true);
        }
        assert_eq!(queue.write(&mut Vec::new()), 10_001);
    }

    #[test]
    fn line_that_cannot_be_written_is_counted() {
        let queue = Queue::new();
        queue.push(b"one\ntwo\n", false);
        assert_eq!(queue.write(&mut Broken), 0);
        assert!(queue.is_stuck());
        queue.push(b"three\n", false);
        let mut written = Vec::new();
        assert_eq!(queue.write(&mut written), 2);
        assert_eq!((&*written, queue.is_stuck()), (&b"three\n"[..], false));
    }

    #[test]
    fn flush_ends_although_nothing_is_written() {
        full().flush(Duration::from_millis(1));
        Queue::new().flush(Duration::from_mins(1));
    }
}

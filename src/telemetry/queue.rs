//! The queue of log lines. One thread writes them to standard error, so that a reader that stalls, or a
//! full disk, holds up nothing else.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use memchr::{memchr, memchr_iter, memrchr};
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
    /// Whether a line waited for room in vain, and none was written since.
    was_in_vain: bool,
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

/// As much is written at once, in bytes: what a pipe takes in one piece, so that nobody else's output
/// comes between (pipe(7)).
const PIECE: usize = 4096;
/// How long to wait for a reader of a pipe that does not block.
const MOMENT: Duration = Duration::from_millis(10);

// === impl Queue ===

impl Queue {
    const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                lines: Vec::new(),
                is_writing: false,
                dropped: 0,
                is_stuck: false,
                was_in_vain: false,
            }),
            filled: Condvar::new(),
            written: Condvar::new(),
        }
    }

    /// Starts the thread that writes to standard error.
    pub(super) fn start(&'static self) -> io::Result<()> {
        let thread = thread::Builder::new().name("log".to_owned());
        thread.spawn(|| {
            let mut is_torn = false;
            loop {
                let lost = self.write(&mut io::stderr(), &mut is_torn);
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
        if is_patient && !state.was_in_vain && !state.has_room(line) {
            let waited = self
                .written
                .wait_timeout_while(state, PATIENCE, |state| !state.has_room(line));
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            state.was_in_vain = !state.has_room(line);
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
    /// `is_torn` says that the last line before is not whole.
    fn write(&self, to: &mut impl Write, is_torn: &mut bool) -> u64 {
        let state = self
            .filled
            .wait_while(self.lock(), |state| state.lines.is_empty());
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let lines = std::mem::take(&mut state.lines);
        state.is_writing = true;
        drop(state);
        let unwritten = write_lines(to, &lines, is_torn);
        let mut state = self.lock();
        state.is_writing = false;
        let mut lost = 0;
        state.was_in_vain = false;
        if unwritten.is_empty() {
            state.is_stuck = false;
            lost = std::mem::take(&mut state.dropped);
        } else {
            state.drop_lines(memchr_iter(b'\n', unwritten).count() as u64);
        }
        self.written.notify_all();
        lost
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes whole lines, as many at a time as a pipe takes in one piece. Returns what could not be written.
fn write_lines<'a>(to: &mut impl Write, mut lines: &'a [u8], is_torn: &mut bool) -> &'a [u8] {
    while !lines.is_empty() {
        let most = &lines[..lines.len().min(PIECE)];
        let end = memrchr(b'\n', most).or_else(|| memchr(b'\n', lines));
        let end = end.map_or(lines.len(), |end| end + 1);
        let (mut piece, rest) = lines.split_at(end);
        if *is_torn && to.write_all(b"\n").is_err() {
            return lines;
        }
        *is_torn = false;
        while !piece.is_empty() {
            match to.write(piece) {
                Ok(written) if written > 0 => {
                    piece = &piece[written..];
                    *is_torn = !piece.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another process has made it so. Its reader may be well.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(MOMENT),
                Ok(_) | Err(_) => return &lines[end - piece.len()..],
            }
        }
        lines = rest;
    }
    lines
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

    /// Has room for so many bytes, and then fails.
    struct Broken(Vec<u8>, usize);

    impl Write for Broken {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.1 - self.0.len());
            self.0.extend_from_slice(&bytes[..taken]);
            if taken == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn write(queue: &Queue, to: &mut impl Write) -> u64 {
        queue.write(to, &mut false)
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
        assert_eq!(write(&queue, &mut written), 1);
        assert_eq!((written.len(), queue.is_stuck()), (MOST, false));
    }

    /// Also when others have just been dropped.
    #[test]
    fn line_of_a_create_waits_for_room() {
        let queue = full();
        queue.push(b"read\n", false);
        let mut written = Vec::new();
        thread::scope(|scope| {
            let pushed = scope.spawn(|| queue.push(b"create\n", true));
            // A machine that stalls for longer than a line waits must not fail the test.
            while queue.lock().lines.len() == MOST && !queue.lock().was_in_vain {
                write(&queue, &mut written);
            }
            pushed.join().unwrap();
        });
        let was_in_vain = queue.lock().was_in_vain;
        if !was_in_vain {
            write(&queue, &mut written);
            assert!(written.ends_with(b"create\n"));
        }
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
        assert_eq!(write(&queue, &mut Vec::new()), 10_001);
    }

    #[test]
    fn line_that_cannot_be_written_is_counted() {
        let queue = Queue::new();
        queue.push(b"one\ntwo\nthree\n", false);
        let (mut broken, mut is_torn) = (Broken(Vec::new(), 6), false);
        assert_eq!(queue.write(&mut broken, &mut is_torn), 0);
        assert!(queue.is_stuck());
        broken.1 = 100;
        queue.push(b"four\n", false);
        assert_eq!(queue.write(&mut broken, &mut is_torn), 2);
        // No line is glued to one that was torn.
        let written = String::from_utf8(broken.0).unwrap();
        assert_eq!((&*written, queue.is_stuck()), ("one\ntw\nfour\n", false));
    }

    #[test]
    fn flush_ends_although_nothing_is_written() {
        full().flush(Duration::from_millis(1));
        Queue::new().flush(Duration::from_mins(1));
    }
}

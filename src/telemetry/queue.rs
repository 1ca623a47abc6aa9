//! The queue of log lines. One thread writes them to standard error, so that a stalled reader, or a full
//! disk, does not block the rest of the program.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use memchr::{memchr, memchr_iter, memrchr};
use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

use super::CREATES;

/// The only queue of this process.
pub(super) static QUEUE: LineQueue = LineQueue::new(MOST, PATIENCE);

/// Number of lines dropped since the start, because the queue was full or could not be written.
pub(super) static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that wait to be written, up to a limit.
pub(super) struct LineQueue {
    /// Limit of the lines that wait or are being written, in bytes.
    capacity: usize,
    /// Longest wait for room, for the line of a create.
    patience: Duration,
    state: Mutex<QueueState>,
    /// Notified when a line is added to an empty queue.
    filled: Condvar,
    /// Notified when lines have been written, if a thread waits for that.
    written: Condvar,
}

struct QueueState {
    lines: Vec<u8>,
    /// Bytes that the writer has taken and not written yet.
    taken: usize,
    /// Number of lines dropped since the log last reported such a number.
    dropped: u64,
    /// True while the writer logs the number of dropped lines.
    is_telling: bool,
    /// Cause of lost lines; `None` after a line was written.
    trouble: Option<Trouble>,
    /// Number of threads that wait for lines to be written.
    waiting: usize,
}

/// Cause of lost log lines, for readiness.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// The queue has no room.
    Full,
    /// The queue has no room, and a line has waited for it in vain.
    InVain,
    /// Standard error accepts no bytes.
    Failing,
}

/// Makes a [`QueuedLine`] for each event of the log.
pub(super) struct Lines;

/// Puts one line into the queue.
pub(super) struct QueuedLine {
    /// True to wait for room, for at most [`PATIENCE`].
    is_patient: bool,
}

/// Limit of the lines that wait, in bytes.
const MOST: usize = 1 << 20;
/// Longest wait for room, for the line of a create. After a wait in vain, no line waits until one has
/// been written again.
const PATIENCE: Duration = Duration::from_millis(100);

/// Time after a failure until a line about it is written, if no other line comes before.
const RETRY: Duration = Duration::from_secs(1);

/// Most bytes of one write: a pipe takes them in one piece, so that no output of another process comes
/// between (pipe(7)).
const PIECE: usize = 4096;
/// Wait before a retry, for the reader of a pipe that does not block.
const MOMENT: Duration = Duration::from_millis(10);

// === impl LineQueue ===

impl LineQueue {
    const fn new(capacity: usize, patience: Duration) -> Self {
        Self {
            capacity,
            patience,
            state: Mutex::new(QueueState {
                lines: Vec::new(),
                taken: 0,
                dropped: 0,
                is_telling: false,
                trouble: None,
                waiting: 0,
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
                self.write(&mut io::stderr(), &mut is_torn, |lost| {
                    tracing::warn!(
                        lost,
                        "log lines were lost: standard error did not take them"
                    );
                });
            }
        })?;
        Ok(())
    }

    /// Adds a line to the queue, or drops it if there is no room.
    pub(super) fn push(&self, line: &[u8], is_patient: bool) {
        let has_no_room = |state: &mut QueueState| state.bytes() + line.len() > self.capacity;
        let mut state = self.lock();
        let mut trouble = Trouble::Full;
        if is_patient && state.trouble != Some(Trouble::InVain) && has_no_room(&mut state) {
            state = self.wait_while(state, self.patience, has_no_room);
            trouble = Trouble::InVain;
        }
        if has_no_room(&mut state) {
            state.drop_lines(1);
            if state.trouble != Some(Trouble::InVain) {
                state.trouble = Some(trouble);
            }
            return;
        }
        // Notifying is a system call, even if no thread waits.
        if state.bytes() == 0 {
            self.filled.notify_one();
        }
        state.lines.extend_from_slice(line);
    }

    /// Waits until everything is written, for at most `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let is_busy = |state: &mut QueueState| state.bytes() > 0 || state.is_telling;
        drop(self.wait_while(self.lock(), limit, is_busy));
    }

    /// Returns true if lines were lost and no line was written after that.
    pub(super) fn is_stuck(&self) -> bool {
        self.lock().trouble.is_some()
    }

    /// Waits for lines and writes them. Passes the number of lost lines to `tell` as soon as a line
    /// about them has room too. While writing fails, it calls `tell` each [`RETRY`], since a proxy that
    /// is not ready may have no other line to try with. `is_torn` is true if the last line was written
    /// in part.
    fn write(&self, to: &mut impl Write, is_torn: &mut bool, tell: impl Fn(u64)) {
        let is_empty = |state: &mut QueueState| state.lines.is_empty();
        let state = self.lock();
        let mut state = if state.trouble == Some(Trouble::Failing) {
            let waited = self.filled.wait_timeout_while(state, RETRY, is_empty);
            waited.unwrap_or_else(PoisonError::into_inner).0
        } else {
            let waited = self.filled.wait_while(state, is_empty);
            waited.unwrap_or_else(PoisonError::into_inner)
        };
        if state.lines.is_empty() {
            let lost = state.dropped;
            drop(state);
            tell(lost);
            let mut state = self.lock();
            // No line came of that, because the filter passes no warning; then there are no lines to
            // lose either.
            if state.lines.is_empty() {
                state.trouble = None;
            }
            return;
        }
        let lines = std::mem::take(&mut state.lines);
        state.taken = lines.len();
        drop(state);
        let mut rest = &lines[..];
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(piece(rest));
            let unwritten = write_piece(to, piece, is_torn);
            let lost = self.wrote(piece.len(), memchr_iter(b'\n', unwritten).count() as u64);
            if lost > 0 {
                tell(lost);
                let mut state = self.lock();
                state.is_telling = false;
                self.notify(&state);
            }
            rest = later;
        }
    }

    /// Frees the room of `bytes`, and counts the `dropped` lines among them that could not be written.
    /// Returns the number of lost lines to log now.
    fn wrote(&self, bytes: usize, dropped: u64) -> u64 {
        let mut state = self.lock();
        state.taken -= bytes;
        state.trouble = (dropped > 0).then_some(Trouble::Failing);
        state.drop_lines(dropped);
        let mut lost = 0;
        if dropped == 0 && state.bytes() <= self.capacity / 2 {
            lost = std::mem::take(&mut state.dropped);
            state.is_telling = lost > 0;
        }
        self.notify(&state);
        lost
    }

    fn wait_while<'a>(
        &'a self,
        mut state: MutexGuard<'a, QueueState>,
        limit: Duration,
        condition: impl FnMut(&mut QueueState) -> bool,
    ) -> MutexGuard<'a, QueueState> {
        state.waiting += 1;
        let waited = self.written.wait_timeout_while(state, limit, condition);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waiting -= 1;
        state
    }

    fn notify(&self, state: &QueueState) {
        if state.waiting > 0 {
            self.written.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the length of the whole lines at the beginning that a pipe takes in one piece. It is one line
/// at least.
fn piece(lines: &[u8]) -> usize {
    let most = &lines[..lines.len().min(PIECE)];
    let end = memrchr(b'\n', most).or_else(|| memchr(b'\n', lines));
    end.map_or(lines.len(), |end| end + 1)
}

/// Writes whole lines. Returns the bytes that could not be written.
fn write_piece<'a>(to: &mut impl Write, mut piece: &'a [u8], is_torn: &mut bool) -> &'a [u8] {
    if *is_torn && to.write_all(b"\n").is_err() {
        return piece;
    }
    *is_torn = false;
    while !piece.is_empty() {
        match to.write(piece) {
            Ok(written) if written > 0 => {
                *is_torn = piece[written - 1] != b'\n';
                piece = &piece[written..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process has made the pipe non-blocking. The reader may just be slow.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(MOMENT),
            Ok(_) | Err(_) => break,
        }
    }
    piece
}

// === impl QueueState ===

impl QueueState {
    /// Returns the number of bytes that wait or are being written.
    fn bytes(&self) -> usize {
        self.lines.len() + self.taken
    }

    fn drop_lines(&mut self, count: u64) {
        self.dropped += count;
        DROPPED.fetch_add(count, Relaxed);
    }
}

// === impl Lines ===

impl MakeWriter<'_> for Lines {
    type Writer = QueuedLine;

    fn make_writer(&self) -> QueuedLine {
        QueuedLine { is_patient: false }
    }

    fn make_writer_for(&self, metadata: &Metadata<'_>) -> QueuedLine {
        QueuedLine {
            is_patient: metadata.target() == CREATES,
        }
    }
}

// === impl QueuedLine ===

impl Write for QueuedLine {
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
    use std::cell::Cell;

    use super::*;

    /// Limit for waits that end early; no test takes that long.
    const LONG: Duration = Duration::from_mins(1);
    const SHORT: Duration = Duration::from_millis(1);

    /// Accepts a number of bytes, and then fails.
    struct Broken(Vec<u8>, usize);

    /// Calls a function at each write.
    struct While<F>(F);

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

    impl<F: FnMut(&[u8])> Write for While<F> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Writes the lines that wait, and returns the reported number of lost lines.
    fn write(queue: &LineQueue, to: &mut impl Write) -> u64 {
        let told = Cell::new(0);
        queue.write(to, &mut false, |lost| told.set(told.get() + lost));
        told.get()
    }

    /// Returns a full queue, in which a single line waits.
    fn full(patience: Duration) -> LineQueue {
        let queue = LineQueue::new(5, patience);
        queue.push(b"full\n", false);
        assert!(!queue.is_stuck());
        queue
    }

    #[test]
    fn line_beyond_the_bound_is_dropped_and_counted_until_one_is_written() {
        let queue = full(SHORT);
        queue.push(b"read\n", false);
        assert!(queue.is_stuck());
        let mut written = Vec::new();
        assert_eq!(write(&queue, &mut written), 1);
        assert_eq!((&*written, queue.is_stuck()), (&b"full\n"[..], false));
    }

    /// The line waits even if other lines have just been dropped.
    #[test]
    fn line_of_a_create_waits_for_room() {
        let queue = full(LONG);
        queue.push(b"read\n", false);
        let mut written = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| queue.push(b"paid\n", true));
            while queue.lock().waiting == 0 {
                thread::yield_now();
            }
            write(&queue, &mut written);
        });
        write(&queue, &mut written);
        assert_eq!(written, b"full\npaid\n");
    }

    /// A slow reader may need longer for a whole mebibyte than a line waits.
    #[test]
    fn each_write_makes_room() {
        let line = [&[b'x'; PIECE - 1][..], b"\n"].concat();
        let queue = LineQueue::new(2 * PIECE, LONG);
        queue.push(&line, false);
        queue.push(&line, false);
        let mut room = Vec::new();
        let mut sink = While(|_: &[u8]| room.push(queue.capacity - queue.lock().bytes()));
        write(&queue, &mut sink);
        assert_eq!(room, [0, PIECE]);
    }

    #[test]
    fn no_line_waits_once_one_has_waited_in_vain() {
        let queue = full(SHORT);
        queue.push(b"paid\n", true);
        assert!(queue.is_stuck());
        // There is no reader, so each of these lines would wait.
        for _ in 0..100_000 {
            queue.push(b"paid\n", true);
        }
        assert_eq!(write(&queue, &mut Vec::new()), 100_001);
    }

    /// Without room the number of lost lines would be lost with its line.
    #[test]
    fn lost_lines_are_told_once_there_is_room_for_that() {
        let line = [&[b'x'; PIECE - 1][..], b"\n"].concat();
        let queue = LineQueue::new(4 * PIECE, SHORT);
        for _ in 0..7 {
            queue.push(&line, false);
        }
        let room = Cell::new(0);
        let mut sink = Vec::new();
        queue.write(&mut sink, &mut false, |lost| {
            assert_eq!(lost, 3);
            room.set(queue.capacity - queue.lock().bytes());
        });
        assert_eq!(room.get(), queue.capacity / 2);
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_until_one_can() {
        let queue = LineQueue::new(100, LONG);
        queue.push(b"one\ntwo\nthree\n", false);
        let (mut broken, mut is_torn) = (Broken(Vec::new(), 6), false);
        queue.write(&mut broken, &mut is_torn, |_| panic!("not yet"));
        assert!(queue.is_stuck());
        // No other line comes, so the writer makes one about the failure.
        let told = Cell::new(0);
        queue.write(&mut broken, &mut is_torn, |lost| told.set(lost));
        assert_eq!(told.take(), 2);
        broken.1 = 100;
        queue.push(b"four\n", false);
        queue.write(&mut broken, &mut is_torn, |lost| told.set(lost));
        assert_eq!((told.get(), queue.is_stuck()), (2, false));
        // A line break separates the next line from the torn one.
        assert_eq!(String::from_utf8(broken.0).unwrap(), "one\ntw\nfour\n");
    }

    #[test]
    fn end_waits_for_all_lines_and_for_that_of_the_lost_ones() {
        let queue = full(SHORT);
        queue.flush(SHORT);
        queue.push(b"read\n", false);
        let is_over = Cell::new(false);
        queue.write(&mut Vec::new(), &mut false, |_| {
            let state = queue.lock();
            is_over.set(state.bytes() == 0 && !state.is_telling);
        });
        assert!(!is_over.get());
        queue.flush(LONG);
        LineQueue::new(5, SHORT).flush(LONG);
    }
}

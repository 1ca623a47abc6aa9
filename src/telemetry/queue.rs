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
pub(super) static QUEUE: LineQueue = LineQueue::new(MOST, PATIENCE);

/// Lines that were dropped since the start, because the queue was full or could not be written.
pub(super) static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that wait to be written, within a bound.
pub(super) struct LineQueue {
    /// The most that waits or is being written, in bytes.
    capacity: usize,
    /// How long the line of a create waits for room.
    patience: Duration,
    state: Mutex<QueueState>,
    /// Notified when the first line comes.
    filled: Condvar,
    /// Notified when lines were written, if a thread waits for that.
    written: Condvar,
}

struct QueueState {
    lines: Vec<u8>,
    /// How many bytes the writer has taken and not written yet.
    taken: usize,
    /// Lines that were dropped since the log told so.
    dropped: u64,
    /// Whether the writer is about to log how many were dropped.
    is_telling: bool,
    /// Why lines were lost, if none was written since.
    trouble: Option<Trouble>,
    /// How many threads wait for lines to be written.
    waiting: usize,
}

/// Why lines are lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// There is no room.
    Full,
    /// There is no room, and a line waited for it in vain.
    InVain,
    /// They cannot be written.
    Failing,
}

/// Puts each line into the queue.
pub(super) struct Lines;

/// Puts a line into the queue.
pub(super) struct QueuedLine {
    /// Whether to wait for room, for at most [`PATIENCE`].
    is_patient: bool,
}

/// The most that waits, in bytes.
const MOST: usize = 1 << 20;
/// How long the line of a create waits for room. Once that was in vain, none waits before a line is
/// written again.
const PATIENCE: Duration = Duration::from_millis(100);

/// How long after a failure a line that tells of it is written, if no other comes before.
const RETRY: Duration = Duration::from_secs(1);

/// As much is written at once, in bytes: what a pipe takes in one piece, so that nobody else's output
/// comes between (pipe(7)).
const PIECE: usize = 4096;
/// How long to wait for a reader of a pipe that does not block.
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

    /// Takes a line, or drops it.
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
        // To notify is a system call, whether somebody waits or not.
        if state.bytes() == 0 {
            self.filled.notify_one();
        }
        state.lines.extend_from_slice(line);
    }

    /// Waits until everything is written, for at most so long.
    pub(super) fn flush(&self, limit: Duration) {
        let is_busy = |state: &mut QueueState| state.bytes() > 0 || state.is_telling;
        drop(self.wait_while(self.lock(), limit, is_busy));
    }

    /// Returns true if lines were lost and none was written since.
    pub(super) fn is_stuck(&self) -> bool {
        self.lock().trouble.is_some()
    }

    /// Waits for lines and writes them. Tells how many were lost before, once that line has room too;
    /// and while none can be written, since a proxy that is not ready may have no other line to try
    /// that with. `is_torn` says that the last line before is not whole.
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
            // Nothing is logged any more that could be lost: the filter lets no warning through.
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

    /// Makes room of so many bytes, of which so many lines could not be written. Returns how many
    /// lost lines to tell of.
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

/// Returns the length of the whole lines at the beginning that a pipe takes in one piece.
fn piece(lines: &[u8]) -> usize {
    let most = &lines[..lines.len().min(PIECE)];
    let end = memrchr(b'\n', most).or_else(|| memchr(b'\n', lines));
    end.map_or(lines.len(), |end| end + 1)
}

/// Writes whole lines. Returns what could not be written.
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
            // Another process has made it so. Its reader may be well.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(MOMENT),
            Ok(_) | Err(_) => break,
        }
    }
    piece
}

// === impl QueueState ===

impl QueueState {
    /// Returns how many bytes wait or are being written.
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

    /// No test waits for so long.
    const LONG: Duration = Duration::from_mins(1);
    const SHORT: Duration = Duration::from_millis(1);

    /// Has room for so many bytes, and then fails.
    struct Broken(Vec<u8>, usize);

    /// Does something at each write.
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

    /// Writes what waits, and returns how many lost lines were told of.
    fn write(queue: &LineQueue, to: &mut impl Write) -> u64 {
        let told = Cell::new(0);
        queue.write(to, &mut false, |lost| told.set(told.get() + lost));
        told.get()
    }

    /// A queue without room, though one line waits only.
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

    /// Also when others have just been dropped.
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

    /// The rest of a mebibyte may take a slow reader longer than a line waits.
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
        // Without a reader: each of these would wait.
        for _ in 0..100_000 {
            queue.push(b"paid\n", true);
        }
        assert_eq!(write(&queue, &mut Vec::new()), 100_001);
    }

    /// Else the number would be lost with the line.
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
        // No other line comes, so one is made of the failure.
        let told = Cell::new(0);
        queue.write(&mut broken, &mut is_torn, |lost| told.set(lost));
        assert_eq!(told.take(), 2);
        broken.1 = 100;
        queue.push(b"four\n", false);
        queue.write(&mut broken, &mut is_torn, |lost| told.set(lost));
        assert_eq!((told.get(), queue.is_stuck()), (2, false));
        // No line is glued to one that was torn.
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

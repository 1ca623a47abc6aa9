//! When a file of client tokens counts, at start and when it changes.
//!
//! While a file is being written, half a line of it looks like a token. So what is new counts only once a
//! later read finds the same. A file that was emptied takes all tokens back. One that is wrong or gone may
//! be a mistake: the old tokens hold on, but not for long, since it may also be meant to revoke them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use crate::auth::client_token::{ClientTokens, FileError};
use crate::clock::Clock;
use crate::error::chain;

/// What a file holds counts once it has been so for this long: by then it is written.
const SETTLED: Duration = Duration::from_secs(1);
/// The old tokens hold on for this long while the file is wrong.
const GRACE: Duration = Duration::from_mins(1);
/// A file is read so often at start before it counts as one that goes on changing.
const MOST_READS: usize = 6;

/// The file of client tokens of a running proxy, between two reads.
#[derive(Default)]
pub(super) struct ClientTokensFile {
    /// What the last reads found, if that is not in force, and when the first of them did.
    new: Option<(Content, Instant)>,
    /// When the file was first found wrong, if it has not been right since.
    wrong: Option<Instant>,
}

/// What a read found: tokens, or what is wrong.
type Content = Result<Arc<ClientTokens>, String>;

/// What to do after a read.
pub(super) enum Decision {
    /// It is too early to say.
    Wait,
    /// The tokens in force are those of the file.
    Keep,
    /// Accept these from now on.
    Take(Arc<ClientTokens>),
    /// The file is wrong, and its old tokens still hold.
    Wrong(String),
    /// Accept none from now on.
    Close(String),
}

/// Reads a file of which nothing is in force yet. One that was written just now is read until it stays as
/// it is.
///
/// # Errors
///
/// [`FileError`]
pub(super) fn read(path: &Path, clock: &Arc<dyn Clock>) -> Result<ClientTokens, FileError> {
    let read = || ClientTokens::read(path, Arc::clone(clock));
    let mut found = read();
    if !is_fresh(path, clock) {
        return found;
    }
    for _ in 1..MOST_READS {
        thread::sleep(SETTLED);
        let again = read();
        let is_settled = match (&again, &found) {
            (Ok(again), Ok(found)) => again == found,
            (Err(again), Err(found)) => chain(again) == chain(found),
            _ => false,
        };
        found = again;
        if is_settled {
            return found;
        }
    }
    Err(FileError::Unsettled)
}

// === impl ClientTokensFile ===

impl ClientTokensFile {
    /// Decides what a read of the file means for the tokens in force.
    pub(super) fn judge(
        &mut self,
        read: Result<ClientTokens, FileError>,
        in_force: &ClientTokens,
        now: Instant,
    ) -> Decision {
        let is_empty = matches!(read, Err(FileError::Empty));
        let found = read.map(|tokens| Arc::new(tokens.after(in_force)));
        let found = found.map_err(|error| chain(&error));
        if found.as_deref() == Ok(in_force) {
            *self = Self::default();
            return Decision::Keep;
        }
        let since = match &self.new {
            Some((same, since)) if *same == found => *since,
            _ => now,
        };
        self.new = Some((found.clone(), since));
        let is_settled = now >= since + SETTLED;
        match found {
            Ok(tokens) if is_settled => {
                *self = Self::default();
                Decision::Take(tokens)
            }
            Ok(_) => Decision::Wait,
            Err(problem) => {
                let wrong = *self.wrong.get_or_insert(now);
                if is_empty && is_settled || now >= wrong + GRACE {
                    Decision::Close(problem)
                } else if is_settled {
                    Decision::Wrong(problem)
                } else {
                    Decision::Wait
                }
            }
        }
    }

    /// When to read the file again, if not at the next regular time.
    pub(super) fn next_read(&self, now: Instant) -> Option<Instant> {
        let settled = self.new.as_ref().map(|(_, since)| *since + SETTLED);
        let over = self.wrong.map(|wrong| wrong + GRACE);
        let times = settled.into_iter().chain(over);
        times.filter(|time| *time > now).min()
    }
}

/// Returns true if a file was written so lately that its writer may not be done.
fn is_fresh(path: &Path, clock: &Arc<dyn Clock>) -> bool {
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| {
        // A time to come says nothing, as if it were now.
        let age = clock.now().duration_since(written).unwrap_or_default();
        age < SETTLED
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;
    use crate::auth::trusted_file::TrustedFileError;
    use crate::clock::SystemClock;

    const OLD: &str = "old-token-0123456789\n";
    const NEW: &str = "new-token-0123456789\n";
    /// What there is of it while it is being written.
    const HALF: &str = "new-token-0123456";
    const MISSING: &str = "missing";

    fn read(text: &str) -> Result<ClientTokens, FileError> {
        if text == MISSING {
            let error = io::Error::from(io::ErrorKind::NotFound);
            return Err(FileError::Unreadable(
                PathBuf::from("tokens"),
                TrustedFileError::Io(error),
            ));
        }
        ClientTokens::parse(text, Arc::new(SystemClock))
    }

    /// The decisions after reads at these times, in seconds, where OLD is in force at first.
    fn decisions(reads: &[(u64, &str)]) -> String {
        let begun = Instant::now();
        let mut file = ClientTokensFile::default();
        let mut in_force = Arc::new(read(OLD).unwrap());
        let decided = reads.iter().map(|(seconds, text)| {
            let now = begun + Duration::from_secs(*seconds);
            match file.judge(read(text), &in_force, now) {
                Decision::Wait => "wait",
                Decision::Keep => "keep",
                Decision::Take(tokens) => {
                    assert!(Some(&*tokens) == read(text).ok().as_ref(), "{text}");
                    in_force = tokens;
                    "take"
                }
                Decision::Wrong(_) => "wrong",
                Decision::Close(_) => {
                    in_force = Arc::new(ClientTokens::none(Arc::new(SystemClock)));
                    "close"
                }
            }
        });
        decided.collect::<Vec<_>>().join(" ")
    }

    /// R41.
    #[test]
    fn a_line_that_is_being_written_is_no_token() {
        for (reads, decided) in [
            (&[(0, OLD), (4, OLD)][..], "keep keep"),
            (&[(0, NEW), (1, NEW), (5, NEW)], "wait take keep"),
            (&[(0, HALF), (1, NEW), (2, NEW)], "wait wait take"),
            (
                &[(0, ""), (1, HALF), (2, NEW), (3, NEW)],
                "wait wait wait take",
            ),
            // A signal asks twice at once.
            (&[(0, HALF), (0, HALF), (1, NEW)], "wait wait wait"),
            // It was replaced, and put back.
            (&[(0, NEW), (1, OLD), (2, NEW)], "wait keep wait"),
        ] {
            assert_eq!(decisions(reads), decided, "{reads:?}");
        }
    }

    /// R41.
    #[test]
    fn an_emptied_file_closes_at_once_and_a_wrong_one_after_a_minute() {
        for (reads, decided) in [
            (&[(0, ""), (1, "")][..], "wait close"),
            (&[(0, "# none"), (1, "# none")], "wait close"),
            (
                &[(0, ""), (1, ""), (5, OLD), (6, OLD)],
                "wait close wait take",
            ),
            (
                &[(0, "short"), (1, "short"), (59, "short")],
                "wait wrong wrong",
            ),
            (
                &[(0, "short"), (1, "short"), (60, "short")],
                "wait wrong close",
            ),
            (
                &[(0, MISSING), (1, MISSING), (61, MISSING)],
                "wait wrong close",
            ),
            // Wrong in one way and in another, and never right.
            (
                &[(0, "short"), (59, MISSING), (60, "a b:c")],
                "wait wait close",
            ),
            (&[(0, "short"), (59, NEW), (60, MISSING)], "wait wait close"),
            // Right in between.
            (&[(0, "short"), (59, OLD), (60, "short")], "wait keep wait"),
            (
                &[(0, MISSING), (9, NEW), (10, NEW), (61, MISSING)],
                "wait wait take wait",
            ),
            (
                &[(0, MISSING), (60, MISSING), (61, NEW), (62, NEW)],
                "wait close wait take",
            ),
        ] {
            assert_eq!(decisions(reads), decided, "{reads:?}");
        }
    }

    #[test]
    fn the_next_read_is_when_something_is_decided() {
        let begun = Instant::now();
        let mut file = ClientTokensFile::default();
        let in_force = read(OLD).unwrap();
        let mut next = |seconds: u64, text: &str| {
            let now = begun + Duration::from_secs(seconds);
            file.judge(read(text), &in_force, now);
            file.next_read(now).map(|next| (next - begun).as_secs())
        };
        assert_eq!(next(0, OLD), None);
        assert_eq!(next(4, MISSING), Some(5));
        assert_eq!(next(5, MISSING), Some(64));
        assert_eq!(next(64, MISSING), None);
        assert_eq!(next(68, NEW), Some(69));
    }
}

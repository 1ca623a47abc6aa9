//! Decides at which time the content of a client token file takes effect, at start and after a change.
//!
//! While a file is being written, half a line of it looks like a token. Therefore new content takes
//! effect only once a later read finds the same content. An emptied file revokes all tokens. A file that
//! is wrong or missing may be a mistake, so the old tokens stay valid, but not for long: it may also be
//! meant to revoke them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::time::Instant;

use crate::auth::client_token::{ClientTokens, FileError};
use crate::clock::Clock;
use crate::error::chain;

/// Content takes effect once it has stayed the same for this time: the writer has finished by then.
const SETTLED: Duration = Duration::from_secs(1);
/// Time for which the old tokens stay valid while the file is wrong.
const GRACE: Duration = Duration::from_mins(1);
/// Most reads of a file of which no tokens are in force. If it still changes after these, it is refused.
const MOST_READS: usize = 6;

/// State of the client token file of a running proxy, between two reads.
#[derive(Default)]
pub(super) struct ClientTokensFile {
    /// Content that the last reads found, if it is not in force, and the time of the first of these reads.
    new: Option<(Content, Instant)>,
    /// Time of the first read that found the file wrong, if tokens of the file have not taken effect
    /// since then.
    wrong: Option<Instant>,
}

/// Result of a read: tokens, or a description of the problem.
type Content = Result<Arc<ClientTokens>, String>;

/// The action to take after a read.
pub(super) enum Decision {
    /// Change nothing yet: a later read decides.
    Wait,
    /// Change nothing: the file holds the tokens that are in force.
    Keep,
    /// Accept these tokens from now on.
    Take(Arc<ClientTokens>),
    /// Keep the old tokens, although the file has this problem.
    Wrong(String),
    /// Accept no tokens from now on, because the file has this problem.
    Close(String),
}

/// Reads a file of which no tokens are in force: at start, or after the name of the file has changed. A
/// file that was written just now is read again until two reads find the same content.
///
/// # Errors
///
/// Returns [`FileError::Unsettled`] if the content does not settle, or the [`FileError`] of the last read.
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
    /// Decides if a read of the file changes the tokens in force.
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

    /// Returns the time for an extra read, at which content settles or the grace period ends. `None` if
    /// the regular reads suffice.
    pub(super) fn next_read(&self, now: Instant) -> Option<Instant> {
        let settled = self.new.as_ref().map(|(_, since)| *since + SETTLED);
        let over = self.wrong.map(|wrong| wrong + GRACE);
        let times = settled.into_iter().chain(over);
        times.filter(|time| *time > now).min()
    }
}

/// Returns true if a file was written so recently that its writer may not have finished.
fn is_fresh(path: &Path, clock: &Arc<dyn Clock>) -> bool {
    let written = fs::metadata(path).and_then(|metadata| metadata.modified());
    written.is_ok_and(|written| {
        // A modification time in the future counts as now.
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
    /// The part of [`NEW`] that a read may find while it is being written.
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

    /// Returns the decisions after reads at these times, in seconds. [`OLD`] is in force at first.
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

    /// R41: a half-written line must not become a token.
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
            // A signal can cause two reads at the same time.
            (&[(0, HALF), (0, HALF), (1, NEW)], "wait wait wait"),
            // The file was replaced, and then put back.
            (&[(0, NEW), (1, OLD), (2, NEW)], "wait keep wait"),
        ] {
            assert_eq!(decisions(reads), decided, "{reads:?}");
        }
    }

    /// R41: an empty file revokes all tokens at once, and a wrong or missing one after a minute.
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
            // The file is wrong in different ways, and never right in between.
            (
                &[(0, "short"), (59, MISSING), (60, "a b:c")],
                "wait wait close",
            ),
            (&[(0, "short"), (59, NEW), (60, MISSING)], "wait wait close"),
            // The file is right in between.
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

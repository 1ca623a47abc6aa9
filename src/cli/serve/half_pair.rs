//! Holds back a key pair of which only one half is new.
//!
//! The two files of a key pair change one after the other, and a read may come in between. Such a pair
//! waits for its other half, but not for long.

use std::time::Duration;

use tokio::time::{Instant, Interval, interval_at};

use crate::auth::token::Credential;

/// Time between two regular reads of files. Notifications of the file system do not suffice: they miss
/// the ways in which Kubernetes and Docker replace files.
///
/// The next read finds a change, and the read after that puts half a pair into use. Two intervals are
/// below the 10 s that docs/configuration.md promises, with room for a slow machine.
const INTERVAL: Duration = Duration::from_secs(4);

/// Reason for a read of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadReason {
    /// [`INTERVAL`] has passed since the last regular read.
    Regular,
    /// The process has received a SIGHUP.
    HangUp,
    /// Upstream has refused the credential.
    Refused,
}

/// A pair of which only one half is new, while it waits for the other half.
#[derive(Default)]
pub(super) struct HalfPair(Option<WaitingPair>);

struct WaitingPair {
    pair: Credential,
    /// True if a regular read has found this pair.
    is_seen: bool,
}

/// Returns a timer for the regular reads. The caller resets it after each read, so that [`INTERVAL`] lies
/// between any two, even if files are slow to read.
pub(super) fn ticks() -> Interval {
    interval_at(Instant::now() + INTERVAL, INTERVAL)
}

// === impl HalfPair ===

impl HalfPair {
    /// Returns true if a pair of which only one half is new has to wait.
    ///
    /// It waits until a second regular read finds the same pair: then the change of one half alone was
    /// intended. Other reads do not count, since they may follow one another at once.
    pub(super) fn waits(&mut self, found: &Credential, look: ReadReason) -> bool {
        let is_regular = look == ReadReason::Regular;
        if let Some(waiting) = &mut self.0
            && waiting.pair == *found
        {
            let is_settled = waiting.is_seen && is_regular;
            waiting.is_seen |= is_regular;
            return !is_settled;
        }
        tracing::info!("only one half of the pair is new: waiting for the other");
        self.0 = Some(WaitingPair {
            pair: found.clone(),
            is_seen: is_regular,
        });
        true
    }

    /// Forgets the waiting pair, because the last read did not find a pair that is half new.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::secret::Secret;

    /// Longest time until half a pair is in use, from docs/configuration.md.
    const PROMISE: Duration = Duration::from_secs(10);

    fn pair(access_key: &str, secret_key: &str) -> Credential {
        let [access_key, secret_key] =
            [access_key, secret_key].map(|key| Secret::from(key.to_owned()));
        Credential::Pair {
            access_key,
            secret_key,
        }
    }

    /// Returns the time until half a pair is in use, if it is replaced at the time `after`. Every other
    /// read is `late`.
    fn taken(after: Duration, late: Duration) -> Duration {
        let mut half_new = HalfPair::default();
        let looks = (1_u32..).map(|n| INTERVAL * n + late * n.div_ceil(2));
        let in_use = looks
            .skip_while(|now| *now < after)
            .find(|_| !half_new.waits(&pair("old", "new"), ReadReason::Regular));
        in_use.unwrap().abs_diff(after)
    }

    #[test]
    fn half_that_stays_alone_is_in_use_within_ten_seconds() {
        for late in [0, 5, 1_000] {
            for after in (1..10_000).step_by(499) {
                let [after, late] = [after, late].map(Duration::from_millis);
                let taken = taken(after, late);
                assert!(taken < PROMISE, "after {after:?}, late {late:?}: {taken:?}");
            }
        }
    }

    #[test]
    fn looks_out_of_turn_do_not_count() {
        use ReadReason::{HangUp, Refused, Regular};
        let half_pair = pair("old", "new");
        for looks in [
            &[Regular, Regular][..],
            &[Regular, HangUp, HangUp, Refused, Regular],
            &[HangUp, HangUp, Regular, Refused, Regular],
            &[Refused, Regular, Regular],
        ] {
            let mut half_new = HalfPair::default();
            let (last, others) = looks.split_last().unwrap();
            for look in others {
                assert!(half_new.waits(&half_pair, *look), "{looks:?}");
            }
            assert!(!half_new.waits(&half_pair, *last), "{looks:?}");
        }
    }

    #[test]
    fn another_half_waits_anew() {
        let mut half_new = HalfPair::default();
        for half_pair in [pair("old", "new"), pair("old", "newer")] {
            assert!(half_new.waits(&half_pair, ReadReason::Regular));
        }
        assert!(!half_new.waits(&pair("old", "newer"), ReadReason::Regular));
        half_new.forget();
        assert!(half_new.waits(&pair("old", "newer"), ReadReason::Regular));
    }
}

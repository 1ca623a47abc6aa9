//! How long a slow peer is waited for.

use std::time::Duration;

/// How far a peer is behind: how long it was waited for, less what its bytes have made up for.
///
/// One that moves nothing is given up after a limit, and so is one that moves a byte now and then. One
/// that moves 500 bytes a second (`PER_BYTE`) is waited for without end.
#[derive(Default)]
pub struct Pace {
    behind: Duration,
}

/// What each byte makes up for. Apache's `mod_reqtimeout` wants 500 bytes a second of a body too,
/// unless it is told otherwise.
const PER_BYTE: Duration = Duration::from_millis(2);

// === impl Pace ===

impl Pace {
    /// The peer was waited for so long.
    pub fn waited(&mut self, time: Duration) {
        self.behind += time;
    }

    /// The peer has moved so many bytes.
    pub fn moved(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.behind = self.behind.saturating_sub(PER_BYTE.saturating_mul(bytes));
    }

    /// How long the peer is waited for from now on, if it moves nothing.
    pub fn left(&self, limit: Duration) -> Duration {
        limit.saturating_sub(self.behind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When a peer is given up that moves so many bytes every so often; `None` if not within a day.
    fn given_up(bytes: usize, every: Duration) -> Option<Duration> {
        const LIMIT: Duration = Duration::from_secs(30);
        let (mut pace, mut time) = (Pace::default(), Duration::ZERO);
        while time < Duration::from_hours(24) {
            if pace.left(LIMIT) < every {
                return Some(time + pace.left(LIMIT));
            }
            pace.waited(every);
            time += every;
            pace.moved(bytes);
        }
        None
    }

    #[test]
    fn a_peer_is_given_up_that_keeps_others_waiting_for_little() {
        for (bytes, every, limit) in [
            (0, 1, Some(30)),
            (1, 29, Some(30)),
            (1, 1, Some(30)),
            (100, 1, Some(37)),
            (400, 1, Some(146)),
            (500, 1, None),
            (14_500, 29, None),
            (14_000, 29, Some(86)),
            (1_000_000, 29, None),
            (1_000_000, 31, Some(30)),
        ] {
            let given_up = given_up(bytes, Duration::from_secs(every));
            let seconds = given_up.map(|time| time.as_secs());
            assert_eq!(seconds, limit, "{bytes} bytes every {every} s");
        }
    }
}

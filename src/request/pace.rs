//! Decides how long the proxy waits for a slow peer.

use std::time::Duration;

/// Backlog of a peer: the time that was spent waiting for it, less 2 ms for each byte that it moved.
///
/// A peer that moves nothing is given up after a limit. So is a peer that moves a byte now and then. A peer
/// that moves 500 bytes a second (`PER_BYTE`) is never given up.
#[derive(Default)]
pub struct Pace {
    behind: Duration,
}

/// Waiting time that each byte makes up for: 500 bytes a second. Apache's `mod_reqtimeout` also demands 500
/// bytes a second of a body by default.
const PER_BYTE: Duration = Duration::from_millis(2);

// === impl Pace ===

impl Pace {
    /// Adds time that was spent waiting for the peer.
    pub fn waited(&mut self, time: Duration) {
        self.behind += time;
    }

    /// Subtracts the time that the bytes moved by the peer make up for.
    pub fn moved(&mut self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.behind = self.behind.saturating_sub(PER_BYTE.saturating_mul(bytes));
    }

    /// Returns how long the proxy still waits for the peer if it moves nothing.
    pub fn left(&self, limit: Duration) -> Duration {
        limit.saturating_sub(self.behind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a peer that moves `bytes` bytes at the end of each interval `every`. Returns the time at
    /// which the peer is given up; `None` if that does not happen within a day.
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

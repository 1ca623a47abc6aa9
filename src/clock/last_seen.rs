//! The time at which an event happened last.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// Time of the last event, in whole seconds, or never. All threads read it, and one of them writes it at
/// most once a second.
pub struct LastSeen {
    start: Instant,
    /// Whole seconds after `start`, plus one; 0 for never.
    second: AtomicU64,
}

// === impl LastSeen ===

impl LastSeen {
    /// Starts without an event.
    pub fn never() -> Self {
        Self {
            start: Instant::now(),
            second: AtomicU64::new(0),
        }
    }

    /// Records an event that happens now. Returns true for the first event in this second.
    pub fn note(&self, now: Instant) -> bool {
        let now = self.second(now);
        let is_news = self.second.load(Relaxed) != now;
        if is_news {
            self.second.store(now, Relaxed);
        }
        is_news
    }

    /// Returns the time since the last event, in whole seconds; `None` if there was none.
    pub fn ago(&self) -> Option<Duration> {
        let second = self.second.load(Relaxed);
        // Usually there was no event, and then the clock is not read.
        (second > 0).then(|| {
            let now = self.second(Instant::now());
            Duration::from_secs(now.saturating_sub(second))
        })
    }

    fn second(&self, now: Instant) -> u64 {
        1 + (now - self.start).as_secs()
    }

    /// Makes the last event older by this time.
    #[cfg(test)]
    pub(crate) fn age(&mut self, time: Duration) {
        self.start -= time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_news_once_a_second() {
        let mut last = LastSeen::never();
        assert_eq!(last.ago(), None);
        assert!(last.note(last.start));
        assert!(!last.note(last.start));
        assert_eq!(last.ago(), Some(Duration::ZERO));
        last.age(Duration::from_secs(3));
        assert_eq!(last.ago(), Some(Duration::from_secs(3)));
        assert!(last.note(Instant::now()));
        assert_eq!(last.ago(), Some(Duration::ZERO));
    }
}

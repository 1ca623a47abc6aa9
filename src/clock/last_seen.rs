//! The time at which something happened last.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// A time to the second, or never. All threads read it, and one of them writes it at most once a second.
pub struct LastSeen {
    start: Instant,
    /// Whole seconds after `start`, plus one; 0 for never.
    second: AtomicU64,
}

// === impl LastSeen ===

impl LastSeen {
    /// Starts with an event that has not happened.
    pub fn never() -> Self {
        Self {
            start: Instant::now(),
            second: AtomicU64::new(0),
        }
    }

    /// Records that it happens now. Returns true for the first time in this second.
    pub fn note(&self, now: Instant) -> bool {
        let now = self.second(now);
        let is_news = self.second.load(Relaxed) != now;
        if is_news {
            self.second.store(now, Relaxed);
        }
        is_news
    }

    /// Returns the time since then, in whole seconds; `None` for never.
    pub fn ago(&self) -> Option<Duration> {
        let second = self.second.load(Relaxed);
        // Mostly it has not happened, and the clock need not be read.
        (second > 0).then(|| {
            let now = self.second(Instant::now());
            Duration::from_secs(now.saturating_sub(second))
        })
    }

    fn second(&self, now: Instant) -> u64 {
        1 + (now - self.start).as_secs()
    }

    /// As if so much more time had passed.
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

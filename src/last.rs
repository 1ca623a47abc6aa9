//! When something happened last.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::time::Instant;

/// To the second. Read by all threads, and written by one of them in each second at most.
pub struct Last {
    start: Instant,
    /// After `start`; 0 for never.
    second: AtomicU64,
}

// === impl Last ===

impl Last {
    /// It has not happened.
    pub fn never() -> Self {
        Self {
            start: Instant::now(),
            second: AtomicU64::new(0),
        }
    }

    /// It happens now. Tells whether this is the first time in this second.
    pub fn note(&self, now: Instant) -> bool {
        let now = self.second(now);
        let is_news = self.second.load(Relaxed) != now;
        if is_news {
            self.second.store(now, Relaxed);
        }
        is_news
    }

    /// How long ago that was, in whole seconds; `None` for never.
    pub fn ago(&self) -> Option<Duration> {
        let second = self.second.load(Relaxed);
        // Mostly it has not, and no look at a clock is needed.
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
        let mut last = Last::never();
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

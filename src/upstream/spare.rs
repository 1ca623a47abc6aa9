//! One connection that stays ready for whichever thread has none, so that a client that calls now
//! and then pays one round trip and not the three or four of a new connection.
//!
//! It belongs to the thread that serves no requests, which outlives the others: what they send over
//! it is not cut when one of them ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::pool::Pool;
use crate::last::Last;

/// How often to look whether it is still ready. With [`MOMENT`] and the age at which a pool renews
/// a connection it stays below the age at which one is not used any more.
const INTERVAL: Duration = Duration::from_secs(10);
/// How long to wait for it to come back before another one is made.
const MOMENT: Duration = Duration::from_secs(1);

/// Knows when a connection is worth keeping.
pub(super) struct Spare {
    pool: Arc<Pool>,
    /// Upstream was asked.
    asked: Last,
    /// Told once in a second in which it was.
    news: Notify,
}

// === impl Spare ===

impl Spare {
    pub(super) fn new(pool: Pool) -> Self {
        Self {
            pool: Arc::new(pool),
            asked: Last::never(),
            news: Notify::new(),
        }
    }

    /// Where the connection is.
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Upstream is being asked.
    pub(super) fn note(&self, now: Instant) {
        if self.asked.note(now) {
            self.news.notify_one();
        }
    }

    /// Keeps a connection ready until nobody has asked for this long, and again once somebody does.
    pub(super) async fn keep(&self, warm: Duration) {
        let mut left = Duration::ZERO;
        loop {
            if left.is_zero() {
                self.news.notified().await;
            } else {
                // Both are reasons to look.
                let _ = timeout(left.min(INTERVAL), self.news.notified()).await;
            }
            sleep(MOMENT).await;
            left = self.left(warm);
            if left.is_zero() {
                self.pool.clear();
            } else {
                self.pool.renew().await;
            }
        }
    }

    /// How much longer a connection is worth keeping.
    fn left(&self, warm: Duration) -> Duration {
        let ago = self.asked.ago();
        ago.map_or(Duration::ZERO, |ago| warm.saturating_sub(ago))
    }
}

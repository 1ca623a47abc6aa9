//! One connection that stays ready for any thread that has none. A client that sends a request now and then
//! waits for one round trip, and not for the three or four of a new connection.
//!
//! The connection belongs to the thread that serves no requests. That thread outlives the others, so a
//! request over the connection is not cut when one of them ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::pool::Pool;
use crate::clock::last_seen::LastSeen;

/// Time between checks of the connection. Together with [`MOMENT`] and the age at which a pool renews a
/// connection, it stays below the age at which a connection is not used any more.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time that the connection has to come back before another one is made.
const MOMENT: Duration = Duration::from_secs(1);

/// The pool of the warm connection. The time of the last request decides if the connection is worth keeping.
pub(super) struct WarmConnection {
    pool: Arc<Pool>,
    /// Time of the last request to upstream.
    asked: LastSeen,
    /// Notified once in each second in which a request was sent.
    news: Notify,
}

// === impl WarmConnection ===

impl WarmConnection {
    pub(super) fn new(pool: Pool) -> Self {
        Self {
            pool: Arc::new(pool),
            asked: LastSeen::never(),
            news: Notify::new(),
        }
    }

    /// Returns the pool of the warm connection.
    pub(super) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Records that a request is being sent to upstream.
    pub(super) fn note(&self, now: Instant) {
        if self.asked.note(now) {
            self.news.notify_one();
        }
    }

    /// Keeps a connection ready until no request has come for `warm`, and again after the next request. If an
    /// egress proxy refuses the connection, this waits for the next request, because each attempt may count
    /// against the user of the egress proxy.
    pub(super) async fn keep(&self, warm: Duration) {
        let mut left = Duration::ZERO;
        loop {
            if left.is_zero() {
                self.news.notified().await;
            } else {
                // A request and the end of the interval are both reasons to check.
                let _ = timeout(left.min(INTERVAL), self.news.notified()).await;
            }
            sleep(MOMENT).await;
            left = self.left(warm);
            if left.is_zero() {
                self.pool.clear();
            } else if !self.pool.renew().await {
                left = Duration::ZERO;
            }
        }
    }

    /// Returns how much longer a connection is worth keeping.
    fn left(&self, warm: Duration) -> Duration {
        let ago = self.asked.ago();
        ago.map_or(Duration::ZERO, |ago| warm.saturating_sub(ago))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use http::StatusCode;

    use super::*;
    use crate::clock::SystemClock;
    use crate::error::BoxError;
    use crate::upstream::connect::Connector;
    use crate::upstream::{Dial, Dialing, TunnelError, Versions};

    /// An egress proxy that refuses each tunnel with a status, and counts the attempts.
    struct Refusing(StatusCode, AtomicUsize);

    impl Dial for Refusing {
        fn dial(&self, _: Versions) -> Dialing<'_> {
            Box::pin(async {
                self.1.fetch_add(1, Relaxed);
                Err(BoxError::from(TunnelError::Refused(self.0)))
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn egress_proxy_that_would_refuse_again_is_asked_once() {
        let minutes = Duration::from_mins(10);
        for (status, asked) in [(407, 1..2), (403, 1..2), (502, 60..1_000)] {
            let status = StatusCode::from_u16(status).unwrap();
            let egress = Arc::new(Refusing(status, AtomicUsize::new(0)));
            let origin = "https://kling.test".parse().unwrap();
            let connector = Connector::new(Arc::<Refusing>::clone(&egress), &origin);
            let pool = Pool::new(connector, Duration::from_secs(5), Arc::new(SystemClock));
            let warm = WarmConnection::new(pool.warm());
            for _ in 0..2 {
                warm.note(Instant::now());
                let _ = timeout(minutes, warm.keep(minutes)).await;
            }
            let count = egress.1.load(Relaxed);
            assert!(asked.contains(&count), "{status}: asked {count} times");
        }
    }
}

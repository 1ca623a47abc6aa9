//! Connections kept for the next request.
//!
//! hyper-util's composable pools were looked at first: their types cannot be named, and they give
//! an idle connection to a waiting request without asking how long it was idle, which this needs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use hyper::client::conn::{http1, http2};

use super::connect::{Connection, Connector, Origin};
use crate::clock::Clock;
use crate::error::BoxError;

/// An idle connection is not used again after this. Routers forget a silent connection without a
/// word, mostly after minutes; a create sent into one would be lost until the timeout.
const LONGEST_IDLE: Duration = Duration::from_mins(1);
/// Most idle connections kept.
const MOST_IDLE: usize = 256;

/// The connections of one thread. Its lock is never contended.
pub(super) struct Pool {
    connector: Connector,
    timeout: Duration,
    clock: Arc<dyn Clock>,
    kept: Mutex<Kept>,
    /// Held while connecting, until upstream is known to want a connection for each request.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Kept {
    /// The one used last is used next, so that a burst's connections age. Sorted by time of use.
    idle: Vec<(http1::SendRequest<Body>, SystemTime)>,
    /// One HTTP/2 connection serves all.
    shared: Option<(http2::SendRequest<Body>, Origin, SystemTime)>,
    /// Whether upstream chose HTTP/1.1 last.
    one_at_a_time: bool,
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(connector: Connector, timeout: Duration, clock: Arc<dyn Clock>) -> Self {
        let turn = tokio::sync::Mutex::default();
        let kept = Mutex::default();
        Self {
            connector,
            timeout,
            clock,
            kept,
            turn,
        }
    }

    /// A connection that was open a moment ago.
    pub(super) fn checkout(&self) -> Option<Connection> {
        let now = self.clock.now();
        let mut kept = self.lock();
        if let Some(shared) = kept.shared(now) {
            return Some(shared);
        }
        while let Some((sender, since)) = kept.idle.pop() {
            // One that is not ready is closed, or has not written all of its last request.
            if is_young(since, now) && sender.is_ready() {
                return Some(Connection::Http1(sender));
            }
        }
        None
    }

    /// A new connection.
    ///
    /// # Errors
    ///
    /// Name resolution, TCP or TLS failed, or took too long together.
    pub(super) async fn connect(&self) -> Result<Connection, BoxError> {
        match tokio::time::timeout(self.timeout, self.connect_in_turn()).await {
            Ok(connected) => connected,
            Err(_) => Err(format!("no connection within {:?}", self.timeout).into()),
        }
    }

    async fn connect_in_turn(&self) -> Result<Connection, BoxError> {
        let turn = if self.lock().one_at_a_time {
            None
        } else {
            Some(self.turn.lock().await)
        };
        // Whoever had the turn before may have brought a connection for all.
        if let Some(shared) = self.lock().shared(self.clock.now()) {
            return Ok(shared);
        }
        let connection = self.connector.connect().await?;
        let mut kept = self.lock();
        match &connection {
            Connection::Http1(_) => kept.one_at_a_time = true,
            Connection::Http2(sender, origin) => {
                kept.one_at_a_time = false;
                kept.shared = Some((sender.clone(), origin.clone(), self.clock.now()));
            }
        }
        drop((kept, turn));
        Ok(connection)
    }

    /// Takes a connection back whose exchange is over.
    pub(super) fn checkin(&self, connection: Connection) {
        let Connection::Http1(sender) = connection else {
            return;
        };
        let now = self.clock.now();
        let mut kept = self.lock();
        let aged = kept
            .idle
            .partition_point(|(_, since)| !is_young(*since, now));
        kept.idle.drain(..aged);
        if kept.idle.len() < MOST_IDLE {
            kept.idle.push((sender, now));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Kept ===

impl Kept {
    fn shared(&mut self, now: SystemTime) -> Option<Connection> {
        let (sender, origin, since) = self.shared.as_mut()?;
        if sender.is_closed() || !is_young(*since, now) {
            self.shared = None;
            return None;
        }
        *since = now;
        Some(Connection::Http2(sender.clone(), origin.clone()))
    }
}

/// By the wall clock: others stand still while a laptop sleeps. One that went back says nothing.
fn is_young(since: SystemTime, now: SystemTime) -> bool {
    now.duration_since(since)
        .is_ok_and(|idle| idle < LONGEST_IDLE)
}

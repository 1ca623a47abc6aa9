//! Connections kept for the next request.
//!
//! hyper-util's composable pools were looked at first: their types cannot be named, and they give
//! an idle connection to a waiting request without asking how long it was idle, which this needs.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use hyper::client::conn::{http1, http2};
use tokio::time::Instant;

use super::connect::{Connection, Connector, Origin};
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
    kept: Mutex<Kept>,
    /// Held while connecting, until upstream is known to want a connection for each request.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Kept {
    /// The one used last is used next, so that a burst's connections can age out.
    idle: Vec<(http1::SendRequest<Body>, Instant)>,
    /// One HTTP/2 connection serves all.
    shared: Option<(http2::SendRequest<Body>, Origin)>,
    /// Whether upstream chose HTTP/1.1 last.
    one_at_a_time: bool,
}

// === impl Pool ===

impl Pool {
    pub(super) fn new(connector: Connector, timeout: Duration) -> Self {
        let turn = tokio::sync::Mutex::default();
        Self {
            connector,
            timeout,
            kept: Mutex::default(),
            turn,
        }
    }

    /// A connection that was open a moment ago.
    pub(super) async fn checkout(&self) -> Option<Connection> {
        while let Some(connection) = self.next() {
            let Connection::Http1(mut sender) = connection else {
                return Some(connection);
            };
            // Its last exchange is over, so it is ready at once, or closed.
            if sender.ready().await.is_ok() {
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
        if let Some(shared) = self.lock().shared() {
            return Ok(shared);
        }
        let connection = self.connector.connect().await?;
        let mut kept = self.lock();
        match &connection {
            Connection::Http1(_) => kept.one_at_a_time = true,
            Connection::Http2(sender, origin) => {
                kept.one_at_a_time = false;
                kept.shared = Some((sender.clone(), origin.clone()));
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
        let mut kept = self.lock();
        if kept.idle.len() >= MOST_IDLE {
            kept.idle
                .retain(|(sender, since)| !sender.is_closed() && is_young(*since));
        }
        if kept.idle.len() < MOST_IDLE {
            kept.idle.push((sender, Instant::now()));
        }
    }

    fn next(&self) -> Option<Connection> {
        let mut kept = self.lock();
        if let Some(shared) = kept.shared() {
            return Some(shared);
        }
        let (sender, since) = kept.idle.pop()?;
        if is_young(since) {
            return Some(Connection::Http1(sender));
        }
        // Those below it are older still.
        kept.idle.clear();
        None
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Kept ===

impl Kept {
    fn shared(&mut self) -> Option<Connection> {
        let open = self
            .shared
            .take_if(|(sender, _)| sender.is_closed())
            .is_none();
        let (sender, origin) = self.shared.as_ref().filter(|_| open)?;
        Some(Connection::Http2(sender.clone(), origin.clone()))
    }
}

fn is_young(idle_since: Instant) -> bool {
    idle_since.elapsed() < LONGEST_IDLE
}

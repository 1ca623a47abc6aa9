//! Keeps a listener open to whoever comes next, however many connections are silent.
//!
//! Where health is asked for, a probe must not wait: so the oldest connection is closed once there are
//! too many, and some descriptors are kept for the time when the process has no other left.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

/// Makes room for new connections.
pub struct Evictor {
    most: usize,
    room: Mutex<Room>,
}

struct Room {
    /// The oldest first, among them some that have ended.
    connections: VecDeque<AbortHandle>,
    /// Open for nothing but to be closed when another descriptor is wanted.
    kept: Vec<File>,
}

/// How many descriptors are kept. Between closing one and accepting, another thread may take it.
const KEPT: usize = 8;
/// What is always there to be opened.
const NOTHING: &str = "/dev/null";

// === impl Evictor ===

impl Evictor {
    /// Lets there be as many connections at once.
    pub fn new(most: usize) -> Self {
        let room = Room {
            connections: VecDeque::new(),
            kept: Vec::new(),
        };
        let evictor = Self {
            most,
            room: Mutex::new(room),
        };
        evictor.restock();
        evictor
    }

    /// Counts a connection that begins, and closes the oldest if there are too many.
    pub(super) fn begun(&self, connection: AbortHandle) {
        let mut room = self.lock();
        room.connections.push_back(connection);
        if room.connections.len() > self.most {
            room.connections.retain(|known| !known.is_finished());
        }
        if room.connections.len() > self.most {
            room.evict();
        }
    }

    /// Frees a descriptor: one of those kept, else that of the oldest connection. Returns false if there
    /// is none.
    pub(super) fn make_room(&self) -> bool {
        let mut room = self.lock();
        room.kept.pop().is_some() || room.evict()
    }

    /// Keeps as many descriptors as it should, as far as there are any.
    pub(super) fn restock(&self) {
        let mut room = self.lock();
        while room.kept.len() < KEPT
            && let Ok(file) = File::open(NOTHING)
        {
            room.kept.push(file);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Room ===

impl Room {
    /// Closes the oldest connection. Returns false if there is none.
    fn evict(&mut self) -> bool {
        let mut oldest = std::iter::from_fn(|| self.connections.pop_front());
        let Some(oldest) = oldest.find(|connection| !connection.is_finished()) else {
            return false;
        };
        oldest.abort();
        true
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::task::{JoinHandle, yield_now};

    use super::*;

    fn begin(evictor: &Evictor) -> JoinHandle<()> {
        let connection = tokio::spawn(pending());
        evictor.begun(connection.abort_handle());
        connection
    }

    async fn are_open(connections: &[JoinHandle<()>]) -> Vec<bool> {
        yield_now().await;
        connections.iter().map(|task| !task.is_finished()).collect()
    }

    #[tokio::test]
    async fn oldest_connection_is_closed_once_there_are_too_many() {
        let evictor = Evictor::new(2);
        let mut connections = vec![begin(&evictor), begin(&evictor)];
        assert_eq!(are_open(&connections).await, [true, true]);
        connections.push(begin(&evictor));
        assert_eq!(are_open(&connections).await, [false, true, true]);
        connections[2].abort();
        are_open(&connections).await;
        connections.push(begin(&evictor));
        assert_eq!(are_open(&connections).await, [false, true, false, true]);
    }

    #[tokio::test]
    async fn descriptors_that_are_kept_are_given_before_a_connection_is_closed() {
        let evictor = Evictor::new(2);
        let connections = [begin(&evictor)];
        for _ in 0..KEPT {
            assert!(evictor.make_room());
        }
        assert_eq!(are_open(&connections).await, [true]);
        assert!(evictor.make_room());
        assert_eq!(are_open(&connections).await, [false]);
        assert!(!evictor.make_room(), "nothing is left");
        evictor.restock();
        assert!(evictor.make_room());
    }
}

//! Keeps a listener open to new clients, however many connections are silent.
//!
//! It is for the health endpoints, where a probe must not wait. So the oldest connection is closed if there
//! are too many, and some file descriptors are reserved for a time when the process may open no other.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

/// Closes old connections to make room for new ones.
pub struct Evictor {
    most: usize,
    room: Mutex<Room>,
}

struct Room {
    /// Connections, oldest first. Some of them may have ended.
    connections: VecDeque<AbortHandle>,
    /// Descriptors that stay open only to be closed when another descriptor is needed.
    kept: Vec<File>,
}

/// Reserved descriptors. It is more than one, because another thread may take a descriptor between the
/// close and the accept.
const KEPT: usize = 8;
/// File that can always be opened.
const NOTHING: &str = "/dev/null";

// === impl Evictor ===

impl Evictor {
    /// Allows `most` connections at once.
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

    /// Counts a new connection, and closes the oldest if there are too many.
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

    /// Frees a descriptor: a reserved one if there is one, else that of the oldest connection. Returns
    /// false if there is neither.
    pub(super) fn make_room(&self) -> bool {
        let mut room = self.lock();
        room.kept.pop().is_some() || room.evict()
    }

    /// Reserves descriptors again, up to [`KEPT`], as far as the process may open files.
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

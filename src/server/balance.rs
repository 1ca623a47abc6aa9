//! Spreads connections over workers. The first worker accepts all connections, and assigns each to a
//! worker.
//!
//! A few connections stay together: one busy worker does more in each turn, and is woken less often, than
//! two half-busy workers, which also wait for each other's cores. With 32 connections on two cores, this
//! took 7 % less CPU, and the slowest requests took two thirds of the time. So each worker in turn gets up
//! to [`TOGETHER`] connections, and further connections are spread evenly.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::listener::Socket;

/// Serves connections on a thread of its own.
pub struct Worker {
    pub(super) workers: Arc<Workers>,
    pub(super) accepted: mpsc::Receiver<Accepted>,
}

/// Queues of connections to all workers.
pub(super) struct Workers {
    /// One queue per worker; the first worker is the one that accepts.
    queues: Vec<WorkerQueue>,
}

/// Queue of connections to a worker.
struct WorkerQueue {
    sender: mpsc::Sender<Accepted>,
    /// Connections of the worker, including those in the queue.
    count: Arc<AtomicUsize>,
}

/// Connection that a worker is to serve.
pub(super) struct Accepted {
    pub(super) socket: Socket,
    pub(super) counted: ConnectionCount,
    pub(super) permit: OwnedSemaphorePermit,
}

/// Counts as one connection of a worker until it is dropped.
pub(super) struct ConnectionCount(Arc<AtomicUsize>);

/// Connections that a worker gets before the next worker gets any.
const TOGETHER: usize = 64;
/// Most connections that wait in a worker's queue. A worker whose queue is full gets no more.
const WAITING: usize = 256;

// === impl Worker ===

impl Worker {
    /// Returns a single worker, which serves all connections.
    pub fn alone() -> Self {
        let (queue, accepted) = WorkerQueue::new();
        let workers = Arc::new(Workers {
            queues: vec![queue],
        });
        Self { workers, accepted }
    }

    /// Returns `size` workers that share their connections. Only the first may be run with listeners.
    pub fn group(size: usize) -> Vec<Self> {
        let (queues, accepted): (Vec<_>, Vec<_>) = (0..size).map(|_| WorkerQueue::new()).unzip();
        let workers = Arc::new(Workers { queues });
        let worker = |accepted| Self {
            workers: Arc::clone(&workers),
            accepted,
        };
        accepted.into_iter().map(worker).collect()
    }
}

// === impl Workers ===

impl Workers {
    /// Assigns a connection to a worker. Returns `None` if the first worker has stopped.
    pub(super) async fn assign(&self, socket: Socket, permit: OwnedSemaphorePermit) -> Option<()> {
        let next = self.next()?;
        let counted = ConnectionCount::at(next);
        let accepted = Accepted {
            socket,
            counted,
            permit,
        };
        // The chosen worker may be stuck or may have ended: the first worker gets the connection instead.
        let Err(TrySendError::Full(mut accepted) | TrySendError::Closed(mut accepted)) =
            next.sender.try_send(accepted)
        else {
            return Some(());
        };
        let first = self.queues.first()?;
        accepted.counted = ConnectionCount::at(first);
        first.sender.send(accepted).await.ok()
    }

    /// Finds the worker for the next connection.
    fn next(&self) -> Option<&WorkerQueue> {
        let has_room = |queue: &&WorkerQueue| queue.connections() < TOGETHER;
        let fewest = || self.queues.iter().min_by_key(|queue| queue.connections());
        self.queues.iter().find(has_room).or_else(fewest)
    }
}

// === impl WorkerQueue ===

impl WorkerQueue {
    fn new() -> (Self, mpsc::Receiver<Accepted>) {
        let (sender, accepted) = mpsc::channel(WAITING);
        let count = Arc::default();
        (Self { sender, count }, accepted)
    }

    fn connections(&self) -> usize {
        self.count.load(Relaxed)
    }
}

// === impl ConnectionCount ===

impl ConnectionCount {
    fn at(queue: &WorkerQueue) -> Self {
        queue.count.fetch_add(1, Relaxed);
        Self(Arc::clone(&queue.count))
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::sync::Semaphore;

    use super::*;

    impl WorkerQueue {
        fn with(connections: usize) -> Self {
            let (queue, _) = Self::new();
            queue.count.store(connections, Relaxed);
            queue
        }
    }

    /// Assigns `more` connections. Returns the number that wait for each worker.
    async fn given(more: usize, workers: &[Worker]) -> Vec<usize> {
        let permits = Arc::new(Semaphore::new(more));
        for _ in 0..more {
            let (socket, _) = UnixStream::pair().unwrap();
            let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
            let assigned = workers[0]
                .workers
                .assign(Socket::Unix(socket), permit)
                .await;
            assert!(assigned.is_some());
        }
        workers.iter().map(|worker| worker.accepted.len()).collect()
    }

    #[test]
    fn a_few_connections_stay_together_and_others_are_spread() {
        for (connections, next) in [
            ([0, 0, 0], 0),
            ([1, 0, 0], 0),
            ([1, 1, 0], 0),
            ([TOGETHER - 1, 0, 0], 0),
            ([TOGETHER, 0, 0], 1),
            ([TOGETHER, 1, 0], 1),
            ([TOGETHER, TOGETHER, 0], 2),
            ([TOGETHER, TOGETHER, TOGETHER], 0),
            ([TOGETHER + 1, TOGETHER, TOGETHER], 1),
        ] {
            let queues = connections.map(WorkerQueue::with).into();
            let workers = Workers { queues };
            let chosen = workers.next().unwrap();
            assert!(
                std::ptr::eq(chosen, &raw const workers.queues[next]),
                "{connections:?}"
            );
        }
    }

    #[tokio::test]
    async fn whose_connections_end_gets_the_next() {
        let mut workers = Worker::group(3);
        assert_eq!(given(3 * TOGETHER, &workers).await, [TOGETHER; 3]);
        assert_eq!(given(9, &workers).await, [TOGETHER + 3; 3]);
        while workers[1].accepted.try_recv().is_ok() {}
        assert_eq!(given(3, &workers).await, [TOGETHER + 3, 3, TOGETHER + 3]);
    }

    #[tokio::test]
    async fn a_worker_that_is_stuck_or_has_ended_holds_up_no_other() {
        let mut workers = Worker::group(2);
        let mut served = Vec::new();
        // The second worker takes no connection.
        while served.len() < 2 * WAITING - 1 {
            given(1, &workers).await;
            served.extend(
                workers[0]
                    .accepted
                    .try_recv()
                    .map(|accepted| accepted.counted),
            );
        }
        assert_eq!(given(1, &workers).await, [1, WAITING]);
        drop(workers.pop());
        assert_eq!(given(1, &workers).await, [2]);
    }
}

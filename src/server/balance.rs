//! Spreads connections over workers. The first accepts all, and gives each to the one that is to have
//! it.
//!
//! A few connections stay together: one worker that is busy does more in each turn and is woken less
//! than two that are half busy, which also wait for one another's cores. On two cores 32 connections
//! took 7 % less CPU so, and the slowest of their requests two thirds of the time. So one worker after
//! the other gets as many as [`TOGETHER`], and what comes then is spread evenly.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::listener::Socket;

/// One of those that serve connections, each on a thread of its own.
pub struct Worker {
    pub(super) workers: Arc<Workers>,
    pub(super) accepted: mpsc::Receiver<Accepted>,
}

/// All workers.
pub(super) struct Workers {
    /// What leads to each; the first is the one that accepts.
    queues: Vec<WorkerQueue>,
}

/// What leads to a worker.
struct WorkerQueue {
    sender: mpsc::Sender<Accepted>,
    /// Of its connections, those included that are on their way to it.
    count: Arc<AtomicUsize>,
}

/// A connection that a worker is to serve.
pub(super) struct Accepted {
    pub(super) socket: Socket,
    pub(super) counted: ConnectionCount,
    pub(super) permit: OwnedSemaphorePermit,
}

/// One in the count of a worker's connections, until it is dropped.
pub(super) struct ConnectionCount(Arc<AtomicUsize>);

/// A worker gets this many connections before the next one gets any.
const TOGETHER: usize = 64;
/// Connections that wait for a worker. One that is so far behind gets no more.
const WAITING: usize = 256;

// === impl Worker ===

impl Worker {
    /// One that serves all.
    pub fn alone() -> Self {
        let (queue, accepted) = WorkerQueue::new();
        let workers = Arc::new(Workers {
            queues: vec![queue],
        });
        Self { workers, accepted }
    }

    /// So many that share their connections; the listeners are for the first.
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
    /// Gives a connection to the worker that is to have it. `None` if the first serves no more.
    pub(super) async fn assign(&self, socket: Socket, permit: OwnedSemaphorePermit) -> Option<()> {
        let next = self.next()?;
        let counted = ConnectionCount::at(next);
        let accepted = Accepted {
            socket,
            counted,
            permit,
        };
        // It may be stuck, or have ended.
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

    /// How many connections each has been given after so many more.
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
        // The other one takes none.
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

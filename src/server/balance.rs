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
    pub(super) crew: Arc<Crew>,
    pub(super) arrivals: mpsc::Receiver<Arrival>,
}

/// All workers.
pub(super) struct Crew {
    /// What leads to each; the first is the one that accepts.
    queues: Vec<Queue>,
}

/// What leads to a worker.
struct Queue {
    sender: mpsc::Sender<Arrival>,
    /// Of its connections, those included that are on their way to it.
    count: Arc<AtomicUsize>,
}

/// A connection that a worker is to serve.
pub(super) struct Arrival {
    pub(super) socket: Socket,
    pub(super) place: Place,
    pub(super) permit: OwnedSemaphorePermit,
}

/// One in the count of a worker's connections, until it is dropped.
pub(super) struct Place(Arc<AtomicUsize>);

/// A worker gets this many connections before the next one gets any.
const TOGETHER: usize = 64;
/// Connections that wait for a worker. One that is so far behind gets no more.
const WAITING: usize = 256;

// === impl Worker ===

impl Worker {
    /// One that serves all.
    pub fn alone() -> Self {
        let (queue, arrivals) = Queue::new();
        let crew = Arc::new(Crew {
            queues: vec![queue],
        });
        Self { crew, arrivals }
    }

    /// So many that share their connections; the listeners are for the first.
    pub fn crew(size: usize) -> Vec<Self> {
        let (queues, arrivals): (Vec<_>, Vec<_>) = (0..size).map(|_| Queue::new()).unzip();
        let crew = Arc::new(Crew { queues });
        let worker = |arrivals| Self {
            crew: Arc::clone(&crew),
            arrivals,
        };
        arrivals.into_iter().map(worker).collect()
    }
}

// === impl Crew ===

impl Crew {
    /// Gives a connection to the worker that is to have it. `None` if the first serves no more.
    pub(super) async fn assign(&self, socket: Socket, permit: OwnedSemaphorePermit) -> Option<()> {
        let next = self.next()?;
        let place = Place::at(next);
        let arrival = Arrival {
            socket,
            place,
            permit,
        };
        // It may be stuck, or have ended.
        let Err(TrySendError::Full(mut arrival) | TrySendError::Closed(mut arrival)) =
            next.sender.try_send(arrival)
        else {
            return Some(());
        };
        let first = self.queues.first()?;
        arrival.place = Place::at(first);
        first.sender.send(arrival).await.ok()
    }

    /// Finds the worker for the next connection.
    fn next(&self) -> Option<&Queue> {
        let has_room = |queue: &&Queue| queue.connections() < TOGETHER;
        let fewest = || self.queues.iter().min_by_key(|queue| queue.connections());
        self.queues.iter().find(has_room).or_else(fewest)
    }
}

// === impl Queue ===

impl Queue {
    fn new() -> (Self, mpsc::Receiver<Arrival>) {
        let (sender, arrivals) = mpsc::channel(WAITING);
        let count = Arc::default();
        (Self { sender, count }, arrivals)
    }

    fn connections(&self) -> usize {
        self.count.load(Relaxed)
    }
}

// === impl Place ===

impl Place {
    fn at(queue: &Queue) -> Self {
        queue.count.fetch_add(1, Relaxed);
        Self(Arc::clone(&queue.count))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::sync::Semaphore;

    use super::*;

    impl Queue {
        fn with(connections: usize) -> Self {
            let (queue, _) = Self::new();
            queue.count.store(connections, Relaxed);
            queue
        }
    }

    /// How many connections each has been given after so many more.
    async fn given(more: usize, crew: &[Worker]) -> Vec<usize> {
        let permits = Arc::new(Semaphore::new(more));
        for _ in 0..more {
            let (socket, _) = UnixStream::pair().unwrap();
            let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
            let assigned = crew[0].crew.assign(Socket::Unix(socket), permit).await;
            assert!(assigned.is_some());
        }
        crew.iter().map(|worker| worker.arrivals.len()).collect()
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
            let queues = connections.map(Queue::with).into();
            let crew = Crew { queues };
            let chosen = crew.next().unwrap();
            assert!(
                std::ptr::eq(chosen, &raw const crew.queues[next]),
                "{connections:?}"
            );
        }
    }

    #[tokio::test]
    async fn whose_connections_end_gets_the_next() {
        let mut crew = Worker::crew(3);
        assert_eq!(given(3 * TOGETHER, &crew).await, [TOGETHER; 3]);
        assert_eq!(given(9, &crew).await, [TOGETHER + 3; 3]);
        while crew[1].arrivals.try_recv().is_ok() {}
        assert_eq!(given(3, &crew).await, [TOGETHER + 3, 3, TOGETHER + 3]);
    }

    #[tokio::test]
    async fn a_worker_that_is_stuck_or_has_ended_holds_up_no_other() {
        let mut crew = Worker::crew(2);
        let mut served = Vec::new();
        // The other one takes none.
        while served.len() < 2 * WAITING - 1 {
            given(1, &crew).await;
            served.extend(crew[0].arrivals.try_recv().map(|arrival| arrival.place));
        }
        assert_eq!(given(1, &crew).await, [1, WAITING]);
        drop(crew.pop());
        assert_eq!(given(1, &crew).await, [2]);
    }
}

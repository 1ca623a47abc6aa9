//! Spreads connections over workers. All accept from the same sockets, and whichever is awake first
//! would take all that wait there: a burst of 32 connections was served by one core of two in every
//! third start. So whoever accepts one gives it to the worker that has the fewest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::listener::Socket;

/// One of those that serve connections, each on a thread of its own.
pub struct Worker {
    pub(super) balancer: Balancer,
    pub(super) arrivals: mpsc::Receiver<Arrival>,
}

/// Knows all workers, and belongs to one.
#[derive(Clone)]
pub(super) struct Balancer {
    queues: Arc<[Queue]>,
    own: usize,
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

/// Connections that wait for a worker. One that is so far behind gets no more from others.
const WAITING: usize = 16;

// === impl Worker ===

impl Worker {
    /// One that serves all.
    pub fn alone() -> Self {
        let (queue, arrivals) = Queue::new();
        let queues = Arc::new([queue]);
        Self {
            balancer: Balancer { queues, own: 0 },
            arrivals,
        }
    }

    /// So many that share their connections.
    pub fn crew(size: usize) -> Vec<Self> {
        let (queues, arrivals): (Vec<_>, Vec<_>) = (0..size).map(|_| Queue::new()).unzip();
        let queues: Arc<[_]> = queues.into();
        let workers = arrivals.into_iter().enumerate();
        workers
            .map(|(own, arrivals)| Self {
                balancer: Balancer {
                    queues: Arc::clone(&queues),
                    own,
                },
                arrivals,
            })
            .collect()
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

// === impl Balancer ===

impl Balancer {
    /// Gives a connection to the worker that has the fewest. `None` if this one serves no more.
    pub(super) async fn assign(&self, socket: Socket, permit: OwnedSemaphorePermit) -> Option<()> {
        let own = &self.queues[self.own];
        let fewest = self.queues.iter().min_by_key(|queue| queue.connections());
        // Among equals it stays where it is.
        let other = fewest.filter(|queue| queue.connections() < own.connections());
        let place = Place::at(other.unwrap_or(own));
        let mut arrival = Arrival {
            socket,
            place,
            permit,
        };
        if let Some(other) = other {
            arrival = match other.sender.try_send(arrival) {
                Ok(()) => return Some(()),
                // It is stuck, or has ended.
                Err(TrySendError::Full(arrival) | TrySendError::Closed(arrival)) => arrival,
            };
            arrival.place = Place::at(own);
        }
        own.sender.send(arrival).await.ok()
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

    async fn assign(to: &Worker, permits: &Arc<Semaphore>) {
        let (socket, _) = UnixStream::pair().unwrap();
        let permit = Arc::clone(permits).acquire_owned().await.unwrap();
        let assigned = to.balancer.assign(Socket::Unix(socket), permit).await;
        assert!(assigned.is_some());
    }

    #[tokio::test]
    async fn whoever_accepts_all_have_as_many() {
        let permits = Arc::new(Semaphore::new(9));
        let mut crew = Worker::crew(3);
        for _ in 0..9 {
            assign(&crew[1], &permits).await;
        }
        for worker in &mut crew {
            assert_eq!(worker.arrivals.len(), 3);
        }
        // One whose connections end gets the next ones.
        while crew[2].arrivals.try_recv().is_ok() {}
        assert_eq!(permits.available_permits(), 3);
        for _ in 0..3 {
            assign(&crew[0], &permits).await;
        }
        assert_eq!(crew[2].arrivals.len(), 3);
    }

    #[tokio::test]
    async fn a_connection_stays_where_it_was_accepted_unless_another_has_fewer() {
        let permits = Arc::new(Semaphore::new(2));
        let crew = Worker::crew(2);
        assign(&crew[1], &permits).await;
        assert_eq!(crew[1].arrivals.len(), 1);
        assign(&crew[1], &permits).await;
        assert_eq!(crew[0].arrivals.len(), 1);
    }

    #[tokio::test]
    async fn a_worker_that_is_stuck_or_has_ended_holds_up_no_other() {
        let permits = Arc::new(Semaphore::new(3 * WAITING));
        let mut crew = Worker::crew(2);
        let mut served = Vec::new();
        // The other one takes none.
        while served.len() < 2 * WAITING - 1 {
            assign(&crew[0], &permits).await;
            served.extend(crew[0].arrivals.try_recv());
        }
        assert_eq!(crew[1].arrivals.len(), WAITING);
        drop(crew.pop());
        assign(&crew[0], &permits).await;
        assert_eq!(crew[0].arrivals.len(), 1);
    }
}

//! Spreads connections over workers. All accept from the same sockets, and whichever is awake first
//! would take all that wait there: a burst of 32 connections was served by one core of two in every
//! third start. So whoever accepts one gives it to the worker that has the fewest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

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
    /// Its connections, those included that are on their way to it.
    open: Arc<AtomicUsize>,
}

/// A connection that a worker is to serve.
pub(super) struct Arrival {
    pub(super) socket: Socket,
    pub(super) place: Place,
}

/// Counts a connection until it is dropped.
pub(super) struct Place {
    open: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

/// Connections that wait for a worker that is busy. Beyond, the kernel's queue is as good.
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
        let open = Arc::default();
        (Self { sender, open }, arrivals)
    }

    fn open(&self) -> usize {
        self.open.load(Relaxed)
    }
}

// === impl Balancer ===

impl Balancer {
    /// Gives a connection to the worker that has the fewest. `None` if that serves no more.
    pub(super) async fn assign(&self, socket: Socket, permit: OwnedSemaphorePermit) -> Option<()> {
        let own = &self.queues[self.own];
        let fewest = self.queues.iter().min_by_key(|queue| queue.open());
        // Among equals it stays where it is.
        let queue = fewest.filter(|queue| queue.open() < own.open());
        let queue = queue.unwrap_or(own);
        let place = Place::new(queue, permit);
        queue.sender.send(Arrival { socket, place }).await.ok()
    }
}

// === impl Place ===

impl Place {
    fn new(queue: &Queue, permit: OwnedSemaphorePermit) -> Self {
        let open = Arc::clone(&queue.open);
        open.fetch_add(1, Relaxed);
        Self {
            open,
            _permit: permit,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Relaxed);
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
}

//! The requests that wait: for the end of a task, or for events.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::telemetry::metrics::Metrics;

/// Limits the requests that wait at once (`state.waiting`).
pub struct WaitingRoom {
    /// Most requests that wait at once.
    places: u64,
    taken: Mutex<Taken>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Taken {
    all: u64,
    by_client: HashMap<String, u64>,
}

/// A place in the waiting room, which is free again when this value is dropped.
pub struct WaitingPlace {
    room: Arc<WaitingRoom>,
    client: String,
}

// === impl WaitingRoom ===

impl WaitingRoom {
    /// Makes a room with this number of places.
    pub fn new(places: u64, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            places,
            taken: Mutex::default(),
            metrics,
        })
    }

    /// Returns the number of places.
    pub fn places(&self) -> u64 {
        self.places
    }

    /// Takes a place for a request of this client; `None` if all places are taken, or if the client has half
    /// of them while others wait.
    pub fn enter(self: &Arc<Self>, client: Option<&str>) -> Option<WaitingPlace> {
        let client = client.unwrap_or_default();
        let mut taken = self.lock();
        let own = taken.by_client.get(client).copied().unwrap_or(0);
        let others_wait = taken.all > own;
        if taken.all >= self.places || others_wait && own >= self.places.div_ceil(2) {
            return None;
        }
        taken.all += 1;
        *taken.by_client.entry(client.to_owned()).or_default() += 1;
        drop(taken);
        self.metrics.waits(true);
        Some(WaitingPlace {
            room: Arc::clone(self),
            client: client.to_owned(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl WaitingPlace ===

impl Drop for WaitingPlace {
    fn drop(&mut self) {
        let mut taken = self.room.lock();
        taken.all -= 1;
        if let Some(own) = taken.by_client.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                taken.by_client.remove(&self.client);
            }
        }
        drop(taken);
        self.room.metrics.waits(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(places: u64) -> Arc<WaitingRoom> {
        WaitingRoom::new(places, Arc::new(Metrics::new().unwrap()))
    }

    #[test]
    fn client_has_half_of_the_places_while_others_wait() {
        let room = room(4);
        let alone: Vec<_> = (0..4).map(|_| room.enter(Some("a")).unwrap()).collect();
        assert!(room.enter(Some("a")).is_none());
        assert!(room.enter(Some("b")).is_none());
        drop(alone);
        let other = room.enter(Some("b")).unwrap();
        let own: Vec<_> = (0..4).map_while(|_| room.enter(Some("a"))).collect();
        assert_eq!(own.len(), 2);
        drop(other);
        assert!(room.enter(Some("a")).is_some());
    }

    #[test]
    fn place_is_free_after_the_wait() {
        let room = room(1);
        for _ in 0..3 {
            let place = room.enter(None).unwrap();
            assert!(room.enter(None).is_none());
            drop(place);
        }
        assert!(room.lock().by_client.is_empty());
    }
}

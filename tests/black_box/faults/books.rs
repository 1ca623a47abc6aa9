//! What upstream, its clients and the log say of each request, in the order in which it happened.
//!
//! Two events are in order here only if one is the cause of the other: a request that is read after its
//! client has left may have been sent before. A connection that is accepted after that cannot have
//! carried it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Condvar, Mutex, MutexGuard},
    time::Duration,
};

use super::kling::Fault;
use crate::support::PATIENCE;

#[derive(Default)]
pub(super) struct Books {
    pages: Mutex<Pages>,
    changed: Condvar,
}

#[derive(Default)]
pub(super) struct Pages {
    /// Events so far.
    now: usize,
    /// Connections, by their number.
    pub(super) connections: BTreeMap<usize, Wire>,
    pub(super) requests: BTreeMap<String, Entry>,
    pub(super) faults: BTreeSet<Fault>,
    /// What upstream may not see.
    pub(super) complaints: BTreeSet<String>,
    /// Clients that have left.
    pub(super) left: usize,
    /// Clients that have an answer.
    pub(super) told: usize,
    /// The newest key that upstream knows.
    pub(super) generation: usize,
    /// The newest key that was shown.
    pub(super) shown: usize,
    /// Whether the proxy was told to end.
    pub(super) ending: bool,
}

/// A connection to upstream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire {
    /// When it was accepted. Its handshake comes after that.
    accepted: usize,
    /// It was to end after an answer. What still comes over it is read, and cannot be answered.
    pub(super) ended: bool,
}

/// What was seen of one request, which has a name of its own.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    /// How often it began to arrive.
    pub(super) begun: usize,
    pub(super) refused: usize,
    /// How often it was carried out: tasks, for a create.
    pub(super) done: usize,
    /// The latest thing that went wrong.
    pub(super) fault: Option<Fault>,
    /// Which connection it was last read from.
    pub(super) connection: usize,
    /// Whether its whole success was sent, over a connection that was not to end before.
    pub(super) answered: bool,
    /// When its client had its answer, or had left.
    over: Option<usize>,
    /// It was refused after that.
    pub(super) refused_late: bool,
    /// It was begun although it was over: on a connection that was accepted later, or after it was
    /// refused later.
    pub(super) begun_late: bool,
}

// === impl Books ===

impl Books {
    pub(super) fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap()
    }

    /// Writes down what has happened.
    pub(super) fn note<T>(&self, change: impl FnOnce(&mut Pages) -> T) -> T {
        let mut pages = self.pages();
        pages.now += 1;
        let result = change(&mut pages);
        self.changed.notify_all();
        result
    }

    /// Waits until something has happened, and says whether it has in this time.
    pub(super) fn wait(&self, limit: Duration, happened: impl Fn(&Pages) -> bool) -> bool {
        let pages = self.pages();
        let waited = self
            .changed
            .wait_timeout_while(pages, limit, |pages| !happened(pages));
        !waited.unwrap().1.timed_out()
    }

    /// The same; that it never happens fails the test.
    pub(super) fn expect(&self, what: &str, happened: impl Fn(&Pages) -> bool) {
        assert!(self.wait(PATIENCE, happened), "never happened: {what}");
    }
}

// === impl Pages ===

impl Pages {
    pub(super) fn accept(&mut self, connection: usize) {
        let wire = Wire {
            accepted: self.now,
            ended: false,
        };
        self.connections.insert(connection, wire);
    }

    /// A request begins to arrive over a connection.
    pub(super) fn begin(&mut self, name: &str, connection: usize) -> &mut Entry {
        let accepted = self.connections[&connection].accepted;
        let entry = self.requests.entry(name.to_owned()).or_default();
        entry.begun += 1;
        entry.connection = connection;
        let new = entry.over.is_some_and(|over| over < accepted);
        entry.begun_late |= new || entry.refused_late;
        entry
    }

    /// The client of a request has its answer, or has left without one.
    pub(super) fn end(&mut self, name: &str, left: bool) {
        let count = if left { &mut self.left } else { &mut self.told };
        *count += 1;
        let entry = self.requests.entry(name.to_owned()).or_default();
        entry.over = Some(self.now);
    }
}

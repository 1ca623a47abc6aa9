//! Keeps track of the connections that a thread serves.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::task::{AbortHandle, Id, JoinSet};

use super::head::{Head, Heads};

/// Tasks that serve the connections of a thread.
pub(super) struct Connections {
    /// Memory that the heads of all connections take together.
    heads: Arc<Heads>,
    tasks: JoinSet<()>,
    /// Tasks whose end was not noted yet, each with the head that its client sends.
    known: HashMap<Id, (AbortHandle, Head)>,
}

// === impl Connections ===

impl Connections {
    pub(super) fn new(heads: Arc<Heads>) -> Self {
        Self {
            heads,
            tasks: JoinSet::new(),
            known: HashMap::new(),
        }
    }

    /// Starts a task that serves a connection, on which no byte was received yet.
    pub(super) fn begin<F>(&mut self, serve: impl FnOnce(Head) -> F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let head = Head::new(&self.heads);
        let task = self.tasks.spawn(serve(head.clone()));
        self.known.insert(task.id(), (task.clone(), head));
        task
    }

    /// Waits until a connection has ended, and forgets it. Returns `None` if there is no connection.
    pub(super) async fn ended(&mut self) -> Option<()> {
        let id = match self.tasks.join_next_with_id().await? {
            Ok((id, ())) => id,
            Err(error) => error.id(),
        };
        self.known.remove(&id);
        Some(())
    }

    /// Closes connections that have received a part of their first request head. When hyper ends a
    /// connection, it would wait for the rest of the head. It closes silent connections by itself.
    pub(super) fn close_unfinished(&self) {
        let unfinished = self.known.values().filter(|(_, head)| head.is_unfinished());
        unfinished.for_each(|(task, _)| task.abort());
    }

    /// Returns the number of open connections.
    pub(super) fn count(mut self) -> usize {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.len()
    }
}

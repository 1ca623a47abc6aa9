//! The connections that a thread serves.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::task::{AbortHandle, Id, JoinSet};

use super::head::{Head, Heads};

/// The tasks that serve them.
pub(super) struct Connections {
    /// What the heads of all may take.
    heads: Arc<Heads>,
    tasks: JoinSet<()>,
    /// Those of `tasks` whose end was not noted yet, and what their clients have sent.
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

    /// Starts to serve one, whose first head is to come.
    pub(super) fn begin<F>(&mut self, serve: impl FnOnce(Head) -> F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let head = Head::new(&self.heads);
        let task = self.tasks.spawn(serve(head.clone()));
        self.known.insert(task.id(), (task.clone(), head));
        task
    }

    /// Waits until one has ended, and notes that. `None` if there is none.
    pub(super) async fn ended(&mut self) -> Option<()> {
        let id = match self.tasks.join_next_with_id().await? {
            Ok((id, ())) => id,
            Err(error) => error.id(),
        };
        self.known.remove(&id);
        Some(())
    }

    /// Closes those whose first request has begun to come and is not a request yet: hyper, when it is to
    /// end a connection, would wait for the rest. It closes those that are silent by itself.
    pub(super) fn close_unfinished(&self) {
        let unfinished = self.known.values().filter(|(_, head)| head.is_unfinished());
        unfinished.for_each(|(task, _)| task.abort());
    }

    /// How many there are.
    pub(super) fn count(mut self) -> usize {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.len()
    }
}

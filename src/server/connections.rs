//! The connections that a thread serves.

use std::collections::HashMap;

use tokio::task::{AbortHandle, Id, JoinSet};

use super::head::Head;

/// The tasks that serve them.
#[derive(Default)]
pub(super) struct Connections {
    tasks: JoinSet<()>,
    /// Those of `tasks` whose end was not noted yet, and what their clients have sent.
    known: HashMap<Id, (AbortHandle, Head)>,
}

// === impl Connections ===

impl Connections {
    /// Starts to serve one.
    pub(super) fn begin(
        &mut self,
        head: Head,
        serve: impl Future<Output = ()> + Send + 'static,
    ) -> AbortHandle {
        let task = self.tasks.spawn(serve);
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

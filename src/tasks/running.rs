//! The tasks that have not ended, as far as this process knows. A poll looks here if its answer can bring
//! news.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{TaskRecord, Timestamp};
use super::state::TaskState;

/// All running tasks, by Kling's id and by their external id.
#[derive(Default)]
pub(super) struct RunningTasks(Mutex<HashMap<String, Arc<RunningTask>>>);

/// A task that Kling works on.
pub struct RunningTask {
    pub account: String,
    pub task_id: String,
    pub external_id: Option<String>,
    pub family: Option<String>,
    pub path: String,
    news: Mutex<News>,
}

/// The latest news of a task.
#[derive(Clone, Copy)]
pub struct News {
    pub state: TaskState,
    /// Time of the latest answer from Kling that showed the task.
    pub at: Timestamp,
}

// === impl RunningTasks ===

impl RunningTasks {
    /// Finds a running task by Kling's id, or by its external id.
    pub(super) fn find(&self, id: &str) -> Option<Arc<RunningTask>> {
        self.lock().get(id).cloned()
    }

    /// Returns true if no task runs.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Returns all running tasks.
    pub(super) fn all(&self) -> Vec<Arc<RunningTask>> {
        let by_id = self.lock();
        let tasks = by_id.iter().filter(|(id, task)| **id == task.task_id);
        tasks.map(|(_, task)| Arc::clone(task)).collect()
    }

    /// Takes over the state of a task from its record.
    pub(super) fn update(&self, record: &TaskRecord, now: Timestamp) {
        let Some(task_id) = &record.task_id else {
            return;
        };
        let ids = [Some(task_id), record.external_id.as_ref()];
        let mut by_id = self.lock();
        if !record.state.is_running() {
            for id in ids.into_iter().flatten() {
                // The external id may name a newer task by now.
                if by_id.get(id).is_some_and(|task| task.task_id == *task_id) {
                    by_id.remove(id);
                }
            }
            return;
        }
        if let Some(task) = by_id.get(task_id) {
            task.hear(record.state, now);
            return;
        }
        let task = Arc::new(RunningTask {
            account: record.account.clone(),
            task_id: task_id.clone(),
            external_id: record.external_id.clone(),
            family: record.family.clone(),
            path: record.path.clone(),
            news: Mutex::new(News {
                state: record.state,
                at: now,
            }),
        });
        for id in ids.into_iter().flatten() {
            by_id.insert(id.clone(), Arc::clone(&task));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<RunningTask>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl RunningTask ===

impl RunningTask {
    /// Takes note of an answer that shows the task in this state. Returns true if that is a new state.
    pub(super) fn hear(&self, state: TaskState, at: Timestamp) -> bool {
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        news.at = news.at.max(at);
        let is_new = news.state.accepts(state);
        if is_new {
            news.state = state;
        }
        is_new
    }

    /// Returns the latest news.
    pub fn news(&self) -> News {
        *self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

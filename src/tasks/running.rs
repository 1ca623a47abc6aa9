//! The tasks that have not ended, as far as this process knows. A poll looks here if its answer can bring
//! news.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{TaskRecord, TaskRef, Timestamp};
use super::state::TaskState;

/// All running tasks that this process knows of.
#[derive(Default)]
pub(super) struct RunningTasks(Mutex<Index>);

/// Running tasks by their ids. A client chooses its external ids, so they are apart from Kling's ids: no
/// external id may hide the task of another client.
#[derive(Default)]
struct Index {
    by_id: HashMap<String, Arc<RunningTask>>,
    by_external_id: HashMap<String, Arc<RunningTask>>,
    /// Unknown creates, by their external id.
    lost: HashMap<String, LostCreate>,
}

/// A create whose answer was lost. A poll or a list may show its task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostCreate {
    pub reference: TaskRef,
    pub created_at: Timestamp,
}

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
    /// Finds a running task by Kling's id, or else by its external id.
    pub(super) fn find(&self, id: &str) -> Option<Arc<RunningTask>> {
        let index = self.lock();
        let found = index.by_id.get(id).or_else(|| index.by_external_id.get(id));
        found.cloned()
    }

    /// Finds a running task by Kling's id.
    pub(super) fn find_by_id(&self, id: &str) -> Option<Arc<RunningTask>> {
        self.lock().by_id.get(id).cloned()
    }

    /// Finds an unknown create by its external id.
    pub(super) fn find_lost(&self, external_id: &str) -> Option<LostCreate> {
        self.lock().lost.get(external_id).cloned()
    }

    /// Returns true if there is an unknown create with an external id.
    pub(super) fn has_lost(&self) -> bool {
        !self.lock().lost.is_empty()
    }

    /// Returns true if no task runs, and none may run.
    pub(super) fn is_empty(&self) -> bool {
        let index = self.lock();
        index.by_id.is_empty() && index.lost.is_empty()
    }

    /// Returns all running tasks.
    pub(super) fn all(&self) -> Vec<Arc<RunningTask>> {
        self.lock().by_id.values().cloned().collect()
    }

    /// Takes over the state of a task from its record.
    pub(super) fn update(&self, record: &TaskRecord, now: Timestamp) {
        self.update_lost(record);
        let Some(task_id) = &record.task_id else {
            return;
        };
        if !record.state.is_running() {
            return self.remove(task_id);
        }
        let mut index = self.lock();
        if let Some(task) = index.by_id.get(task_id) {
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
        if let Some(external_id) = &record.external_id {
            let external_id = external_id.clone();
            index.by_external_id.insert(external_id, Arc::clone(&task));
        }
        index.by_id.insert(task_id.clone(), task);
    }

    fn update_lost(&self, record: &TaskRecord) {
        let Some(external_id) = &record.external_id else {
            return;
        };
        let mut index = self.lock();
        if record.state == TaskState::Unknown && record.task_id.is_none() {
            let lost = LostCreate {
                reference: record.reference.clone(),
                created_at: record.created_at,
            };
            index.lost.insert(external_id.clone(), lost);
        } else if let Some(lost) = index.lost.get(external_id)
            && lost.reference == record.reference
        {
            index.lost.remove(external_id);
        }
    }

    /// Removes a task that has ended.
    pub(super) fn remove(&self, task_id: &str) {
        let mut index = self.lock();
        let removed = index.by_id.remove(task_id);
        if let Some(external_id) = removed.and_then(|task| task.external_id.clone()) {
            // The external id may name a newer task by now.
            let named = index.by_external_id.get(&external_id);
            if named.is_some_and(|task| task.task_id == task_id) {
                index.by_external_id.remove(&external_id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
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

    /// Returns the latest state, and the time at which it was heard of.
    pub fn news(&self) -> News {
        *self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn record(task_id: &str, external_id: &str, state: TaskState) -> TaskRecord {
        TaskRecord {
            task_id: Some(task_id.to_owned()),
            external_id: Some(external_id.to_owned()),
            state,
            ..TaskRecord::new("r", "/v1/videos/text2video", NOW)
        }
    }

    #[test]
    fn external_id_of_one_task_hides_no_other_task() {
        let running = RunningTasks::default();
        running.update(&record("1", "a", TaskState::Submitted), NOW);
        running.update(&record("2", "1", TaskState::Submitted), NOW);
        assert_eq!(running.find("1").unwrap().task_id, "1");
        assert_eq!(running.all().len(), 2);
        running.update(&record("2", "1", TaskState::Failed), NOW);
        assert_eq!(running.find("1").unwrap().task_id, "1");
        running.update(&record("1", "a", TaskState::Succeeded), NOW);
        assert!(running.is_empty() && running.find("a").is_none());
    }

    #[test]
    fn lost_create_is_there_until_it_is_settled() {
        let running = RunningTasks::default();
        let mut lost = TaskRecord {
            task_id: None,
            ..record("", "mine", TaskState::Unknown)
        };
        running.update(&lost, NOW);
        assert_eq!(running.find_lost("mine").unwrap().reference, lost.reference);
        assert!(running.has_lost() && !running.is_empty());
        // Another create with the same external id, which was refused.
        running.update(&record("", "mine", TaskState::Rejected), NOW);
        assert!(running.has_lost());
        lost.state = TaskState::Submitted;
        lost.task_id = Some("8".to_owned());
        running.update(&lost, NOW);
        assert!(!running.has_lost());
        assert_eq!(running.find("mine").unwrap().task_id, "8");
    }
}

//! Which tasks the watcher asks for, and when.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::place_of;
use crate::kling::family::{Family, TypedQuery};
use crate::kling::task_answer::TaskPlace;
use crate::tasks::ledger::RunningTask;
use crate::tasks::record::{TaskRecord, Timestamp};

/// Times of the requests for each task.
#[derive(Default)]
pub(super) struct Schedule {
    /// By Kling's id of the task.
    asked: HashMap<String, Asked>,
    /// Number of look-ups of each unknown create, by its reference.
    looked_up: HashMap<String, usize>,
    /// Time of the last look at unknown creates.
    unknown_at: Option<Timestamp>,
}

/// Requests for one task so far.
#[derive(Clone, Copy)]
struct Asked {
    count: u32,
    at: Timestamp,
}

/// A request that is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) target: String,
    pub(super) place: TaskPlace,
}

/// A look-up of an unknown create that is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LookUp {
    /// True if no further one follows.
    pub(super) is_last: bool,
}

/// Time after the latest news of a task until the first request.
const FIRST: Duration = Duration::from_secs(10);
/// Longest time between two requests for a task.
const LONGEST: Duration = Duration::from_mins(1);
/// Most ids of one request (`GET /tasks`, measured by `aself101/kling-api`).
const MOST_IDS: usize = 20;
/// Ages of an unknown create at which it is looked up.
const LOOK_UPS: [Duration; 4] = [
    Duration::from_secs(10),
    Duration::from_mins(1),
    Duration::from_mins(10),
    Duration::from_hours(1),
];
/// Time between two looks at unknown creates.
const UNKNOWN: Duration = Duration::from_secs(2);

// === impl Schedule ===

impl Schedule {
    /// Returns the request that is due, for one task or for several. With an API key, one request reads up to
    /// 20 tasks of all families that `/tasks` knows.
    pub(super) fn due(
        &mut self,
        running: &[Arc<RunningTask>],
        now: Timestamp,
        has_api_key: bool,
    ) -> Option<Due> {
        self.asked
            .retain(|id, _| running.iter().any(|task| task.task_id == *id));
        let mut due: Vec<_> = running
            .iter()
            .filter_map(|task| Some((self.due_at(task), query_of(task)?, task)))
            .filter(|(at, _, _)| *at <= now)
            .collect();
        due.sort_by_key(|(at, _, _)| *at);
        let (_, (family, shared), first) = due.first()?;
        if !has_api_key {
            let target = family.read_by_id(&first.task_id);
            let place = place_of(&target);
            self.ask(&first.task_id.clone(), now);
            return Some(Due { target, place });
        }
        let same = due
            .iter()
            .filter(|(_, (_, path), _)| path == shared)
            .take(MOST_IDS);
        let ids: Vec<_> = same.map(|(_, _, task)| task.task_id.clone()).collect();
        for id in &ids {
            self.ask(id, now);
        }
        Some(Due {
            target: format!("{shared}?task_ids={}", ids.join(",")),
            place: TaskPlace::List,
        })
    }

    /// Returns the time of the next request for a task: some time after the latest news, or after the latest
    /// request that brought none.
    fn due_at(&self, task: &RunningTask) -> Timestamp {
        let news = task.news().at;
        match self.asked.get(&task.task_id) {
            None => news.after(FIRST),
            Some(asked) => {
                let grown = FIRST.mul_f64(1.5_f64.powi(asked.count.min(10).cast_signed()));
                news.max(asked.at).after(grown.min(LONGEST))
            }
        }
    }

    fn ask(&mut self, id: &str, at: Timestamp) {
        let asked = self
            .asked
            .entry(id.to_owned())
            .or_insert(Asked { count: 0, at });
        asked.count = asked.count.saturating_add(1);
        asked.at = at;
    }

    /// Returns true if it is time to look at unknown creates again.
    pub(super) fn is_time_for_unknown(&mut self, now: Timestamp) -> bool {
        let is_time = self.unknown_at.is_none_or(|at| now.since(at) >= UNKNOWN);
        if is_time {
            self.unknown_at = Some(now);
        }
        is_time
    }

    /// Returns the look-up of an unknown create that is due; `None` if none is.
    pub(super) fn next_look_up(&mut self, record: &TaskRecord, now: Timestamp) -> Option<LookUp> {
        let age = now.since(record.ended_at?);
        let passed = LOOK_UPS.iter().filter(|look_up| **look_up <= age).count();
        let done = self
            .looked_up
            .entry(record.reference.as_str().to_owned())
            .or_default();
        if *done >= passed {
            return None;
        }
        *done = passed;
        Some(LookUp {
            is_last: passed == LOOK_UPS.len(),
        })
    }
}

/// Returns the family of a task, and the path that reads several tasks like it; `None` if nothing can read it.
fn query_of(task: &RunningTask) -> Option<(&'static Family, &'static str)> {
    let family = Family::named(task.family.as_deref()?)?;
    if !Family::is_plain_id(&task.task_id) {
        return None;
    }
    let shared = match family.query {
        TypedQuery::Solutions => "/solutions",
        TypedQuery::Path | TypedQuery::PathById | TypedQuery::Tasks => "/tasks",
    };
    Some((family, shared))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kling::task::Order;
    use crate::tasks::record::{DEFAULT_ACCOUNT, TaskRef};
    use crate::tasks::running_for_tests;
    use crate::tasks::state::TaskState;

    const START: Timestamp = Timestamp(1_800_000_000_000);

    fn after(seconds: u64) -> Timestamp {
        START.after(Duration::from_secs(seconds))
    }

    fn record(reference: &str, family: &str, state: TaskState) -> TaskRecord {
        TaskRecord {
            reference: TaskRef::stored(reference.to_owned()),
            change: 1,
            state,
            account: DEFAULT_ACCOUNT.to_owned(),
            client: String::new(),
            request_id: String::new(),
            upstream_request_id: None,
            task_id: state.is_running().then(|| reference.to_owned()),
            external_id: Some("mine".to_owned()),
            family: Some(family.to_owned()),
            path: String::new(),
            order: Order::default(),
            pool: None,
            weight: 1,
            place: None,
            reserved: None,
            units: None,
            request_digest: None,
            key_digest: None,
            created_at: START,
            sent_at: None,
            ended_at: state.is_ended().then_some(START),
            error: None,
            results: Vec::new(),
        }
    }

    fn running(tasks: &[(&str, &str)]) -> Vec<Arc<RunningTask>> {
        let records = tasks
            .iter()
            .map(|(id, family)| record(id, family, TaskState::Processing));
        running_for_tests(&records.collect::<Vec<_>>(), START)
    }

    #[test]
    fn task_is_asked_for_at_growing_intervals() {
        let running = running(&[("8", "videos/text2video")]);
        let mut schedule = Schedule::default();
        let mut asked = Vec::new();
        for second in 0..300 {
            if let Some(due) = schedule.due(&running, after(second), false) {
                assert_eq!(due.target, "/v1/videos/text2video/8");
                assert_eq!(due.place, TaskPlace::Data);
                asked.push(second);
            }
        }
        assert_eq!(asked, [10, 25, 48, 82, 133, 193, 253]);
    }

    #[test]
    fn api_key_reads_many_tasks_in_one_request() {
        let ids: Vec<_> = (0..25).map(|id| id.to_string()).collect();
        let mut tasks: Vec<_> = ids.iter().map(|id| (&**id, "videos/text2video")).collect();
        tasks.push(("30", "solutions/talking_agent"));
        let running = running(&tasks);
        let mut schedule = Schedule::default();
        assert_eq!(schedule.due(&running, after(9), true), None);
        let mut counts = Vec::new();
        while let Some(due) = schedule.due(&running, after(10), true) {
            assert_eq!(due.place, TaskPlace::List);
            let (path, ids) = due.target.split_once("?task_ids=").unwrap();
            counts.push((path.to_owned(), ids.split(',').count()));
        }
        counts.sort();
        let expected = [("/solutions", 1), ("/tasks", 5), ("/tasks", 20)];
        assert_eq!(
            counts,
            expected.map(|(path, count)| (path.to_owned(), count))
        );
    }

    #[test]
    fn unknown_create_is_looked_up_four_times() {
        let record = record("t_1", "videos/text2video", TaskState::Unknown);
        let mut schedule = Schedule::default();
        let mut at = Vec::new();
        for second in 0..10_000 {
            if let Some(look_up) = schedule.next_look_up(&record, after(second)) {
                at.push((second, look_up.is_last));
            }
        }
        assert_eq!(at, [(10, false), (60, false), (600, false), (3600, true)]);
        // A process that starts later looks at once.
        let mut schedule = Schedule::default();
        assert!(schedule.next_look_up(&record, after(700)).is_some());
        assert!(schedule.next_look_up(&record, after(701)).is_none());
    }
}

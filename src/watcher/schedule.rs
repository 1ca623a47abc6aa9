//! The order and the times at which the watcher asks for tasks.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crate::kling::family::{Family, TypedQuery};
use crate::tasks::ledger::RunningTask;
use crate::tasks::record::{TaskRecord, Timestamp};

/// Times of the requests for each task.
#[derive(Default)]
pub(super) struct Schedule {
    /// By Kling's id of the task.
    asked: HashMap<String, Asked>,
    /// Number of look-ups of each unknown create, by its reference.
    looked_up: HashMap<String, usize>,
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
}

/// A look-up of an unknown create that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LookUp {
    pub(super) is_first: bool,
    /// True if no further one follows.
    pub(super) is_last: bool,
    /// Number of look-ups that are done after this one.
    done: usize,
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
    LAST_LOOK_UP,
];
/// Age of an unknown create at which it is looked up for the last time.
pub(super) const LAST_LOOK_UP: Duration = Duration::from_hours(1);
/// Time without news after which Kling probably does not know a task any more.
const LOST: Duration = Duration::from_hours(3);
/// Time between two requests for such a task.
const SELDOM: Duration = Duration::from_hours(1);

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
        let ids: HashSet<_> = running.iter().map(|task| &*task.task_id).collect();
        self.asked.retain(|id, _| ids.contains(&**id));
        let mut due: Vec<_> = running
            .iter()
            .filter_map(|task| Some((self.due_at(task, now), query_of(task)?, task)))
            .filter(|(at, _, _)| *at <= now)
            .collect();
        due.sort_by_key(|(at, _, _)| *at);
        let (_, (family, shared), first) = due.first()?;
        if !has_api_key {
            let target = family.read_by_id(&first.task_id);
            self.ask(&first.task_id.clone(), now);
            return Some(Due { target });
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
        })
    }

    /// Returns the time of the next request for a task: some time after the latest news, or after the latest
    /// request that brought none.
    fn due_at(&self, task: &RunningTask, now: Timestamp) -> Timestamp {
        let news = task.news().at;
        match self.asked.get(&task.task_id) {
            None => news.after(FIRST),
            Some(asked) => {
                let grown = FIRST.mul_f64(1.5_f64.powi(asked.count.min(10).cast_signed()));
                let is_lost = now.since(news) > LOST;
                let interval = if is_lost { SELDOM } else { grown.min(LONGEST) };
                news.max(asked.at).after(interval)
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

    /// Returns the look-up of an unknown create that is due; `None` if none is.
    pub(super) fn next_look_up(&mut self, record: &TaskRecord, now: Timestamp) -> Option<LookUp> {
        let age = now.since(record.ended_at?);
        let passed = LOOK_UPS.iter().filter(|look_up| **look_up <= age).count();
        let done = self
            .looked_up
            .get(record.reference.as_str())
            .copied()
            .unwrap_or(0);
        (done < passed).then(|| LookUp {
            is_first: done == 0,
            is_last: passed == LOOK_UPS.len(),
            done: passed,
        })
    }

    /// Takes note of a look-up that was answered.
    pub(super) fn has_looked_up(&mut self, record: &TaskRecord, look_up: LookUp) {
        let reference = record.reference.as_str().to_owned();
        self.looked_up.insert(reference, look_up.done);
    }

    /// Forgets the look-ups of creates that are not unknown any more.
    pub(super) fn forget_all_but(&mut self, unknown: &[TaskRecord]) {
        let known: HashSet<_> = unknown
            .iter()
            .map(|record| record.reference.as_str())
            .collect();
        self.looked_up
            .retain(|reference, _| known.contains(&**reference));
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
        for second in 0..7200 {
            if let Some(look_up) = schedule.next_look_up(&record, after(second)) {
                // The first request of each look-up has no answer.
                if second % 2 == 0 {
                    continue;
                }
                schedule.has_looked_up(&record, look_up);
                at.push((second, look_up.is_first, look_up.is_last));
            }
        }
        let expected = [
            (11, true, false),
            (61, false, false),
            (601, false, false),
            (3601, false, true),
        ];
        assert_eq!(at, expected);
        // A process that starts later looks at once.
        let mut schedule = Schedule::default();
        let look_up = schedule.next_look_up(&record, after(700)).unwrap();
        schedule.has_looked_up(&record, look_up);
        assert!(schedule.next_look_up(&record, after(701)).is_none());
        schedule.forget_all_but(&[]);
        assert!(schedule.looked_up.is_empty());
    }

    #[test]
    fn task_that_kling_does_not_know_any_more_is_asked_for_seldom() {
        let running = running(&[("8", "videos/text2video")]);
        let mut schedule = Schedule::default();
        let count = |schedule: &mut Schedule, hours: std::ops::Range<u64>| {
            let seconds = hours.start * 3600..hours.end * 3600;
            seconds
                .filter(|at| schedule.due(&running, after(*at), false).is_some())
                .count()
        };
        assert!(count(&mut schedule, 0..3) > 150);
        assert_eq!(count(&mut schedule, 4..7), 3);
    }
}

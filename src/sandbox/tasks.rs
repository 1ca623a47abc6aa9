//! The tasks of the one account; their state follows from their age, so nothing runs in the background.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::order::{Family, Order, Output};
use super::reply::Refusal;
use super::trigger::Ending;

/// The tasks that are remembered.
#[derive(Debug)]
pub(super) struct Tasks {
    /// Oldest first, and so the first to end first, since all take equally long.
    known: VecDeque<Task>,
    ids: Rng,
    task_time: Duration,
    concurrency: usize,
    /// Base of the result URLs, without a slash at its end.
    results: String,
}

#[derive(Debug)]
struct Task {
    id: String,
    family: &'static Family,
    order: Order,
    /// What clients are told, since the epoch.
    created_at: Duration,
    /// What the age is counted from.
    created: Instant,
}

/// With as many, the oldest is forgotten for each new one.
const MOST_TASKS: usize = 10_000;

/// Task ids have 18 digits.
const IDS: RangeInclusive<u64> = 100_000_000_000_000_000..=999_999_999_999_999_999;

/// Measured by `aself101/kling-api`, 2026.
const FAILURE: &str = "Failure to pass the risk control system";

// === impl Tasks ===

impl Tasks {
    pub(super) fn new(seed: u64, task_time: Duration, concurrency: usize, results: String) -> Self {
        Self {
            known: VecDeque::new(),
            ids: Rng::with_seed(seed),
            task_time,
            // Those that run always fit, so only ended ones are forgotten.
            concurrency: concurrency.min(MOST_TASKS),
            results,
        }
    }

    /// Refuses an external id that is in use with 1201.
    pub(super) fn check_unused(&self, external_id: Option<&str>) -> Result<(), Refusal> {
        let is_same = |task: &Task| task.order.external_id.as_deref() == external_id;
        match external_id {
            Some(id) if self.known.iter().any(is_same) => Err(Refusal::parameter(format!(
                "External_task_id {id} already exists"
            ))),
            _ => Ok(()),
        }
    }

    /// Creates a task and describes it; 1303 when it finds too few free slots.
    pub(super) fn create(
        &mut self,
        family: &'static Family,
        order: Order,
        created_at: Duration,
        now: Instant,
    ) -> Result<Value, Refusal> {
        let running = self
            .known
            .iter()
            .rev()
            .take_while(|task| task.age(now) < self.task_time);
        let held: usize = running.map(|task| task.order.count).sum();
        if held + order.count > self.concurrency {
            return Err(Refusal::documented(1303));
        }
        if self.known.len() == MOST_TASKS {
            self.known.pop_front();
        }
        let task = Task {
            id: self.ids.u64(IDS).to_string(),
            family,
            order,
            created_at,
            created: now,
        };
        let answer = task.describe("submitted", Duration::ZERO);
        self.known.push_back(task);
        Ok(answer)
    }

    /// The task with this id or external id; 1201, not 404, where there is none (measured).
    pub(super) fn find(&self, family: &Family, id: &str, now: Instant) -> Result<Value, Refusal> {
        let has_id = |task: &&Task| task.id == id || task.order.external_id.as_deref() == Some(id);
        match self.of(family).find(has_id) {
            Some(task) => Ok(self.report(task, now)),
            None => Err(Refusal::parameter(format!(
                "Task not found by id/external id: {id}"
            ))),
        }
    }

    /// One page of the tasks of a family, newest first.
    pub(super) fn list(&self, family: &Family, skip: usize, take: usize, now: Instant) -> Value {
        let page = self.of(family).rev().skip(skip).take(take);
        page.map(|task| self.report(task, now)).collect()
    }

    fn of(&self, family: &Family) -> impl DoubleEndedIterator<Item = &Task> {
        self.known
            .iter()
            .filter(|task| task.family.path == family.path)
    }

    /// Describes a task as it is `now`, with its result where it has one.
    fn report(&self, task: &Task, now: Instant) -> Value {
        let age = task.age(now);
        let fails = task.order.trigger.ending == Ending::Fail;
        let (status, since) = if age >= self.task_time {
            (if fails { "failed" } else { "succeed" }, self.task_time)
        } else if age >= self.task_time / 3 {
            ("processing", self.task_time / 3)
        } else {
            ("submitted", Duration::ZERO)
        };
        let mut report = task.describe(status, since);
        report["task_status_msg"] = json!(if status == "failed" { FAILURE } else { "" });
        if status == "succeed" {
            report["task_result"] = self.result(task);
        }
        report
    }

    fn result(&self, task: &Task) -> Value {
        let Self { results, .. } = self;
        let Task {
            id, family, order, ..
        } = task;
        match family.output {
            Output::Video => {
                let url = format!("{results}/{id}.mp4");
                json!({ "videos": [{ "id": id, "url": url, "duration": "5" }] })
            }
            Output::Images => {
                let image =
                    |index| json!({ "index": index, "url": format!("{results}/{id}-{index}.png") });
                json!({ "images": (0..order.count).map(image).collect::<Vec<_>>() })
            }
        }
    }
}

// === impl Task ===

impl Task {
    fn age(&self, now: Instant) -> Duration {
        now.duration_since(self.created)
    }

    /// The fields of every answer; `since` is the age at which `status` began.
    fn describe(&self, status: &str, since: Duration) -> Value {
        let info = match &self.order.external_id {
            Some(id) => json!({ "external_task_id": id }),
            None => json!({}),
        };
        json!({
            "task_id": self.id,
            "task_status": status,
            "task_info": info,
            "created_at": milliseconds(self.created_at),
            "updated_at": milliseconds(self.created_at + since),
        })
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::order::FAMILIES;

    const TIME: Duration = Duration::from_secs(3);
    const TEXT: &Family = &FAMILIES[0];
    const IMAGES: &Family = &FAMILIES[3];

    fn tasks() -> Tasks {
        Tasks::new(7, TIME, 3, "http://sandbox/results".to_owned())
    }

    fn create(
        tasks: &mut Tasks,
        family: &'static Family,
        body: &Value,
        now: Instant,
    ) -> Result<Value, Refusal> {
        let order = Order::parse(family, body.to_string().as_bytes())?;
        tasks.create(family, order, Duration::from_secs(1000), now)
    }

    fn id(task: &Value) -> &str {
        task["task_id"].as_str().unwrap()
    }

    #[test]
    fn a_task_is_described_as_the_legacy_api_does() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({ "prompt": "a", "n": 2, "external_task_id": "mine" });
        let created = create(&mut tasks, IMAGES, &body, now).unwrap();
        let id = id(&created);
        let mut expected = json!({
            "task_id": id,
            "task_status": "submitted",
            "task_info": { "external_task_id": "mine" },
            "created_at": 1_000_000,
            "updated_at": 1_000_000,
        });
        assert_eq!(created, expected);
        expected["task_status"] = json!("succeed");
        expected["task_status_msg"] = json!("");
        expected["updated_at"] = json!(1_003_000);
        expected["task_result"] = json!({ "images": [
            { "index": 0, "url": format!("http://sandbox/results/{id}-0.png") },
            { "index": 1, "url": format!("http://sandbox/results/{id}-1.png") },
        ] });
        assert_eq!(tasks.find(IMAGES, "mine", now + TIME), Ok(expected));
    }

    #[test]
    fn a_task_is_processing_after_a_third_of_its_time_and_then_ends() {
        let (mut tasks, now) = (tasks(), Instant::now());
        for (prompt, end, message) in [("a", "succeed", ""), ("sandbox:failed", "failed", FAILURE)]
        {
            let created = create(&mut tasks, TEXT, &json!({ "prompt": prompt }), now).unwrap();
            for (milliseconds, status, message) in [
                (0, "submitted", ""),
                (999, "submitted", ""),
                (1000, "processing", ""),
                (2999, "processing", ""),
                (3000, end, message),
            ] {
                let then = now + Duration::from_millis(milliseconds);
                let found = tasks.find(TEXT, id(&created), then).unwrap();
                assert_eq!(
                    found["task_status"], status,
                    "{prompt} after {milliseconds} ms"
                );
                assert_eq!(
                    found["task_status_msg"], message,
                    "{prompt} after {milliseconds} ms"
                );
                assert_eq!(
                    found.get("task_result").is_some(),
                    status == "succeed",
                    "{found}"
                );
            }
        }
    }

    #[test]
    fn tasks_hold_their_slots_until_they_end() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let (image, video) = (json!({ "prompt": "a", "n": 2 }), json!({ "prompt": "a" }));
        for (family, body, after, fits) in [
            (IMAGES, &image, 0, true),
            (IMAGES, &image, 1, false),
            (TEXT, &video, 1, true),
            (TEXT, &video, 2, false),
            (IMAGES, &image, 3, true),
            (TEXT, &video, 3, false),
            (TEXT, &video, 4, true),
        ] {
            let outcome = create(&mut tasks, family, body, now + Duration::from_secs(after));
            assert_eq!(
                outcome.map_err(|refusal| refusal.code).err(),
                (!fits).then_some(1303),
                "{after} s"
            );
        }
    }

    #[test]
    fn an_external_id_is_unique_among_all_families() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({ "prompt": "a", "external_task_id": "mine" });
        create(&mut tasks, TEXT, &body, now).unwrap();
        let refusal = tasks.check_unused(Some("mine")).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::parameter("External_task_id mine already exists")
        );
        assert_eq!(tasks.check_unused(Some("other")), Ok(()));
        create(&mut tasks, TEXT, &json!({ "prompt": "a" }), now).unwrap();
        assert_eq!(tasks.check_unused(None), Ok(()));
    }

    #[test]
    fn a_task_is_found_in_its_own_family_only() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let created = create(&mut tasks, TEXT, &json!({ "prompt": "a" }), now).unwrap();
        let refusal = tasks.find(IMAGES, id(&created), now).unwrap_err();
        let message = format!("Task not found by id/external id: {}", id(&created));
        assert_eq!(refusal, Refusal::parameter(message));
    }

    #[test]
    fn a_seed_decides_the_ids_which_have_18_digits() {
        let ids = |mut tasks: Tasks| {
            let create = |_| create(&mut tasks, TEXT, &json!({ "prompt": "a" }), Instant::now());
            (0..3)
                .map(create)
                .map(|task| id(&task.unwrap()).to_owned())
                .collect::<Vec<_>>()
        };
        let expected = ids(tasks());
        assert_eq!(ids(tasks()), expected);
        assert!(expected.iter().all(|id| id.len() == 18), "{expected:?}");
        assert_ne!(ids(Tasks::new(8, TIME, 3, String::new())), expected);
    }

    #[test]
    fn a_list_shows_the_newest_first_and_the_oldest_is_forgotten_in_the_end() {
        let mut tasks = Tasks::new(0, Duration::ZERO, 1, String::new());
        let now = Instant::now();
        let mut created = Vec::new();
        for _ in 0..=MOST_TASKS {
            let task = create(&mut tasks, TEXT, &json!({ "prompt": "a" }), now).unwrap();
            created.push(id(&task).to_owned());
        }
        let page = tasks.list(TEXT, 1, 2, now);
        let ids: Vec<_> = page.as_array().unwrap().iter().map(id).collect();
        assert_eq!(ids, [&created[MOST_TASKS - 1], &created[MOST_TASKS - 2]]);
        assert!(tasks.find(TEXT, &created[0], now).is_err());
        assert!(tasks.find(TEXT, &created[1], now).is_ok());
        assert_eq!(tasks.list(IMAGES, 0, 30, now), json!([]));
    }
}

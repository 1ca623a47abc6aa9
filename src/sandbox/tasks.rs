//! Tasks of the only account. Their status follows from their age, so nothing runs in the background.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::create_request::CreateRequest;
use super::endpoints::{Endpoint, Output};
use super::ids::Ids;
use super::reply::Refusal;
use super::task::{Status, Task};

/// Tasks that are remembered. They include immediate responses, which are paid for like tasks.
#[derive(Debug)]
pub(super) struct Tasks {
    /// Oldest first. Tasks also end in this order, because all take equally long or no time.
    known: VecDeque<Task>,
    pub(super) ids: Ids,
    task_time: Duration,
    concurrency: u32,
    /// Units that all tasks have cost, including forgotten tasks.
    pub(super) spent: u32,
}

/// Most tasks that are remembered. Above that, each new task replaces the oldest task that has ended.
const MOST_TASKS: usize = 10_000;

// === impl Tasks ===

impl Tasks {
    pub(super) fn new(seed: u64, task_time: Duration, concurrency: usize) -> Self {
        Self {
            known: VecDeque::new(),
            ids: Ids::new(seed),
            task_time,
            // There is always room for the tasks that run.
            concurrency: u32::try_from(concurrency.min(MOST_TASKS)).unwrap_or(u32::MAX),
            spent: 0,
        }
    }

    /// Refuses an external id that is in use, with 1201.
    pub(super) fn check_unused(&self, external_id: Option<&str>) -> Result<(), Refusal> {
        match external_id {
            Some(id) if self.known.iter().any(|task| task.is_called(id)) => Err(
                Refusal::parameter(format!("External_task_id {id} already exists")),
            ),
            _ => Ok(()),
        }
    }

    /// Creates a task, or refuses it with 1303 if too few slots are free.
    pub(super) fn create(
        &mut self,
        endpoint: &'static Endpoint,
        request: CreateRequest,
        created_at: Duration,
        now: Instant,
    ) -> Result<&Task, Refusal> {
        let is_running = |task: &Task| task.age(now) < task.time;
        if endpoint.has_tasks() {
            let youngest = self.known.iter().rev();
            let held: u32 = youngest
                .take_while(|task| task.age(now) < self.task_time)
                .filter(|task| is_running(task))
                .map(|task| task.request.count)
                .sum();
            if held + request.count > self.concurrency {
                return Err(Refusal::documented(1303));
            }
        }
        if self.known.len() >= MOST_TASKS {
            let oldest = self.known.iter().position(|task| !is_running(task));
            oldest.map(|index| self.known.remove(index));
        }
        let [id, product] = [(); 2].map(|()| self.ids.number());
        let task = Task {
            id,
            product,
            endpoint,
            request,
            created_at,
            created: now,
            time: if endpoint.has_tasks() {
                self.task_time
            } else {
                Duration::ZERO
            },
            spent_before: self.spent,
            is_deleted: false,
        };
        self.spent = self.spent.saturating_add(task.price());
        self.known.push_back(task);
        Ok(&self.known[self.known.len() - 1])
    }

    /// Returns the task of an endpoint with this id, or with this external id if the endpoint allows that.
    /// If there is none, the refusal is 1201, not 404 (measured).
    pub(super) fn find(&self, endpoint: &Endpoint, id: &str) -> Result<&Task, Refusal> {
        let number = id.parse().ok();
        let is_it = |task: &&Task| {
            let name = match endpoint.output {
                // Guessed: an old element has no other id.
                Output::OldElement => task.product,
                _ => task.id,
            };
            number == Some(name) || (endpoint.by_external_id && task.is_called(id))
        };
        self.of(endpoint)
            .find(is_it)
            .ok_or_else(|| Refusal::parameter(format!("Task not found by id/external id: {id}")))
    }

    /// Returns the tasks of an endpoint, oldest first.
    pub(super) fn of(&self, endpoint: &Endpoint) -> impl DoubleEndedIterator<Item = &Task> {
        self.known
            .iter()
            .filter(|task| task.endpoint.path == endpoint.path && !task.is_gone())
    }

    /// Returns all tasks, newest first.
    pub(super) fn newest(&self) -> impl Iterator<Item = &Task> {
        self.known.iter().rev()
    }

    /// Deletes a voice or an element that was made here and is not deleted yet.
    ///
    /// # Errors
    ///
    /// 1201 if there is none, with the message that was measured for voices.
    pub(super) fn delete(&mut self, output: Output, id: &str, now: Instant) -> Result<(), Refusal> {
        let number = id.parse().ok();
        let found = self.known.iter_mut().find(|task| {
            let is_of_sort = task.endpoint.output == output
                || (output, task.endpoint.output) == (Output::OldElement, Output::Element);
            is_of_sort
                && number == Some(task.product)
                && task.status(now) == Status::Succeeded
                && !task.is_deleted
        });
        let sort = match output {
            Output::Voice => "Voice",
            _ => "Element",
        };
        found
            .map(|task| task.is_deleted = true)
            .ok_or_else(|| Refusal::parameter(format!("{sort} id not found")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::sandbox::endpoints::tests::endpoint;

    const TIME: Duration = Duration::from_secs(3);

    fn tasks() -> Tasks {
        Tasks::new(7, TIME, 3)
    }

    fn create<'a>(
        tasks: &'a mut Tasks,
        path: &str,
        body: &Value,
        now: Instant,
    ) -> Result<&'a Task, Refusal> {
        let request = CreateRequest::parse(endpoint(path), body.to_string().as_bytes())?;
        tasks.create(endpoint(path), request, Duration::from_secs(1000), now)
    }

    #[test]
    fn a_task_is_processing_after_a_third_of_its_time_and_then_ends() {
        let (mut tasks, now) = (tasks(), Instant::now());
        for (prompt, end) in [("a", Status::Succeeded), ("sandbox:failed", Status::Failed)] {
            let task = create(&mut tasks, "text2video", &json!({ "prompt": prompt }), now).unwrap();
            for (milliseconds, status) in [
                (0, Status::Submitted),
                (999, Status::Submitted),
                (1000, Status::Processing),
                (2999, Status::Processing),
                (3000, end),
            ] {
                let then = now + Duration::from_millis(milliseconds);
                assert_eq!(
                    task.status(then),
                    status,
                    "{prompt} after {milliseconds} ms"
                );
            }
        }
    }

    #[test]
    fn tasks_hold_their_slots_until_they_end_and_answers_hold_none() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let (image, video) = (
            json!({ "prompt": "a", "n": 2 }),
            json!({ "prompt": "sandbox:failed" }),
        );
        let answer = json!({ "image": "AA" });
        for (path, body, after, fits) in [
            ("generations", &image, 0, true),
            ("generations", &image, 1, false),
            ("text2video", &video, 1, true),
            ("/text-to-video/{model}", &video, 1, false),
            ("image-recognize", &answer, 1, true),
            ("text2video", &video, 2, false),
            ("generations", &image, 3, true),
            ("text2video", &video, 3, false),
            ("text2video", &video, 4, true),
        ] {
            let outcome = create(&mut tasks, path, body, now + Duration::from_secs(after));
            assert_eq!(
                outcome.map_err(|refusal| refusal.code).err(),
                (!fits).then_some(1303),
                "{path} after {after} s"
            );
        }
    }

    #[test]
    fn each_result_costs_a_unit_and_a_failure_nothing() {
        let (mut tasks, mut now) = (tasks(), Instant::now());
        for (path, body, spent) in [
            ("text2video", json!({ "prompt": "a" }), 1),
            ("generations", json!({ "prompt": "a", "n": 3 }), 4),
            ("text2video", json!({ "prompt": "sandbox:failed" }), 4),
            ("identify-face", json!({ "video_id": "1" }), 5),
        ] {
            now += TIME;
            let spent_before = tasks.spent;
            let task = create(&mut tasks, path, &body, now).unwrap();
            assert_eq!(task.spent_before, spent_before, "{path}");
            assert_eq!(tasks.spent, spent, "{path}");
        }
        now += TIME;
        create(
            &mut tasks,
            "generations",
            &json!({ "prompt": "a", "n": 9 }),
            now,
        )
        .unwrap_err();
        assert_eq!(tasks.spent, 5, "a refusal");
    }

    #[test]
    fn an_external_id_is_unique_among_all_families() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({ "prompt": "a", "external_task_id": "mine" });
        create(&mut tasks, "text2video", &body, now).unwrap();
        let refusal = tasks.check_unused(Some("mine")).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::parameter("External_task_id mine already exists")
        );
        assert_eq!(tasks.check_unused(Some("other")), Ok(()));
        create(&mut tasks, "text2video", &json!({ "prompt": "a" }), now).unwrap();
        assert_eq!(tasks.check_unused(None), Ok(()));
    }

    #[test]
    fn a_task_is_found_in_its_own_family_and_by_its_external_id_where_that_is_documented() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({
            "prompt": "a",
            "element_frontal_image": "AA",
            "external_task_id": "mine",
        });
        for (path, by_external_id) in [("text2video", true), ("ai-multi-shot", false)] {
            let id = create(&mut tasks, path, &body, now).unwrap().id.to_string();
            let found = |path, id| {
                tasks
                    .find(endpoint(path), id)
                    .map(|task| task.id.to_string())
            };
            assert_eq!(found(path, &id), Ok(id.clone()), "{path}");
            assert_eq!(found(path, "mine").is_ok(), by_external_id, "{path}");
            let message = format!("Task not found by id/external id: {id}");
            assert_eq!(found("generations", &id), Err(Refusal::parameter(message)));
        }
    }

    #[test]
    fn what_was_made_is_deleted_once_and_by_its_own_path() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({
            "voice_name": "a", "voice_url": "https://a.test/b.mp3",
            "element_name": "a", "element_description": "b", "reference_type": "image_refer",
            "element_image_list": { "frontal_image": "AA" },
            "element_frontal_image": "AA", "element_refer_list": [{ "image_url": "AA" }],
        });
        for (path, listed) in [
            ("custom-voices", 0),
            ("advanced-custom-elements", 1),
            ("/custom-elements", 0),
        ] {
            let output = endpoint(path).output;
            let product = create(&mut tasks, path, &body, now)
                .unwrap()
                .product
                .to_string();
            let other = match output {
                Output::Voice => Output::OldElement,
                _ => Output::Voice,
            };
            tasks.delete(other, &product, now + TIME).unwrap_err();
            assert_eq!(tasks.delete(output, &product, now + TIME), Ok(()), "{path}");
            tasks.delete(output, &product, now + TIME).unwrap_err();
            assert_eq!(tasks.of(endpoint(path)).count(), listed, "{path}");
        }
        let product = create(&mut tasks, "custom-voices", &body, now + TIME)
            .unwrap()
            .product
            .to_string();
        assert_eq!(
            tasks.delete(Output::Voice, &product, now + TIME),
            Err(Refusal::parameter("Voice id not found")),
            "which is not made yet"
        );
    }

    #[test]
    fn the_oldest_is_forgotten_in_the_end() {
        let mut tasks = Tasks::new(0, Duration::ZERO, 1);
        let (now, body) = (Instant::now(), json!({ "prompt": "a" }));
        let mut ids = Vec::new();
        for _ in 0..=MOST_TASKS {
            let task = create(&mut tasks, "text2video", &body, now).unwrap();
            ids.push(task.id.to_string());
        }
        assert!(tasks.find(endpoint("text2video"), &ids[0]).is_err());
        assert!(tasks.find(endpoint("text2video"), &ids[1]).is_ok());
        assert_eq!(tasks.newest().count(), MOST_TASKS);
        assert_eq!(tasks.spent, 10_001);
    }

    #[test]
    fn a_task_that_runs_is_not_forgotten() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let task = create(&mut tasks, "text2video", &json!({ "prompt": "a" }), now).unwrap();
        let id = task.id.to_string();
        for _ in 0..=MOST_TASKS {
            create(
                &mut tasks,
                "image-recognize",
                &json!({ "image": "AA" }),
                now,
            )
            .unwrap();
        }
        assert!(tasks.find(endpoint("text2video"), &id).is_ok());
        assert_eq!(tasks.newest().count(), MOST_TASKS);
    }
}

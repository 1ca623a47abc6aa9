//! Tasks of the only account. Their status follows from their age, so nothing runs in the background.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::Options;
use super::create_request::CreateRequest;
use super::endpoints::{self, Endpoint, Output};
use super::ids::Ids;
use super::packs::Packs;
use super::reply::Refusal;
use super::task::{Status, Task};

/// Tasks that are remembered. They include immediate responses, which are paid for like tasks.
#[derive(Debug)]
pub(super) struct Tasks {
    /// Tasks by their numbers, which count the tasks in the order of their creation.
    known: BTreeMap<u64, Task>,
    next_number: u64,
    /// Ends and numbers of the tasks that will end and are not deducted yet.
    running: BTreeSet<(Instant, u64)>,
    /// Ends and numbers of the tasks that are deducted.
    ended: BTreeSet<(Instant, u64)>,
    pub(super) packs: Packs,
    pub(super) ids: Ids,
    task_time: Duration,
    speed: u32,
}

/// Most tasks that are remembered. Above that, each new task replaces the task that ended first.
const MOST_TASKS: usize = 10_000;

/// Endpoints of the tasks of somebody else: one for each pack.
const FOREIGN: [&str; 2] = ["/v1/videos/text2video", "/v1/images/generations"];

// === impl Tasks ===

impl Tasks {
    pub(super) fn new(options: &Options) -> Self {
        // There is always room for the tasks that run.
        let slots = options.concurrency.min(MOST_TASKS);
        Self {
            known: BTreeMap::new(),
            next_number: 0,
            running: BTreeSet::new(),
            ended: BTreeSet::new(),
            packs: Packs::new(u32::try_from(slots).unwrap_or(u32::MAX)),
            ids: Ids::new(options.seed),
            task_time: options.task_time,
            speed: options.speed.max(1),
        }
    }

    /// Adds tasks of somebody else, which never end: `count` of them to each pack, even if it has fewer
    /// slots.
    pub(super) fn add_foreign(&mut self, count: u32, created_at: Duration, now: Instant) {
        for endpoint in endpoints::all().filter(|endpoint| FOREIGN.contains(&endpoint.path)) {
            for _ in 0..count {
                let request = CreateRequest {
                    count: 1,
                    ..CreateRequest::default()
                };
                self.insert(endpoint, request, Duration::MAX, created_at, now);
            }
        }
    }

    /// Refuses an external id that is in use, with 1201.
    pub(super) fn check_unused(&self, external_id: Option<&str>) -> Result<(), Refusal> {
        match external_id {
            Some(id) if self.known.values().any(|task| task.is_called(id)) => Err(
                Refusal::parameter(format!("External_task_id {id} already exists")),
            ),
            _ => Ok(()),
        }
    }

    /// Creates a task, or refuses it with 1303 if too few slots of its pack are free.
    pub(super) fn create(
        &mut self,
        endpoint: &'static Endpoint,
        request: CreateRequest,
        created_at: Duration,
        now: Instant,
    ) -> Result<&Task, Refusal> {
        self.settle(now);
        let pack = self.packs.of(endpoint.output.pack_type());
        if !pack.has_room(endpoint.slots(request.count)) {
            return Err(Refusal::documented(1303));
        }
        if self.known.len() >= MOST_TASKS {
            // Tasks without slots can all be running.
            let (_, number) = self
                .ended
                .pop_first()
                .ok_or_else(|| Refusal::documented(1303))?;
            self.known.remove(&number);
        }
        let time = if endpoint.has_tasks() {
            request.fault.duration.unwrap_or(self.task_time) / self.speed
        } else {
            Duration::ZERO
        };
        Ok(self.insert(endpoint, request, time, created_at, now))
    }

    /// Adds a task that lasts `time`.
    fn insert(
        &mut self,
        endpoint: &'static Endpoint,
        request: CreateRequest,
        time: Duration,
        created_at: Duration,
        now: Instant,
    ) -> &Task {
        let [id, product] = [(); 2].map(|()| self.ids.number());
        let task = Task {
            id,
            product,
            endpoint,
            request,
            created_at,
            created: now,
            time,
            spent_before: 0,
            is_deleted: false,
        };
        let number = self.next_number;
        self.next_number += 1;
        self.packs.of_mut(task.pack_type()).held += task.slots();
        if let Some(end) = now.checked_add(time) {
            self.running.insert((end, number));
        }
        self.known.entry(number).or_insert(task)
    }

    /// Frees the slots of the tasks that have ended until `now`, and deducts their units, in the order of
    /// their ends. Every access to the tasks begins with this.
    pub(super) fn settle(&mut self, now: Instant) {
        while let Some(&(end, number)) = self.running.first().filter(|(end, _)| *end <= now) {
            self.running.pop_first();
            let Some(task) = self.known.get_mut(&number) else {
                continue;
            };
            let pack = self.packs.of_mut(task.pack_type());
            pack.held -= task.slots();
            task.spent_before = pack.spent;
            pack.spent = pack.spent.saturating_add(task.price());
            self.ended.insert((end, number));
        }
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
            .values()
            .filter(|task| task.endpoint.path == endpoint.path && !task.is_gone())
    }

    /// Returns all tasks, newest first.
    pub(super) fn newest(&self) -> impl Iterator<Item = &Task> {
        self.known.values().rev()
    }

    /// Returns the tasks that are deducted, the one that ended last first.
    pub(super) fn deducted(&self) -> impl Iterator<Item = &Task> {
        let newest = self.ended.iter().rev();
        newest.filter_map(|(_, number)| self.known.get(number))
    }

    /// Deletes a voice or an element that was made here and is not deleted yet.
    ///
    /// # Errors
    ///
    /// 1201 if there is none, with the message that was measured for voices.
    pub(super) fn delete(&mut self, output: Output, id: &str, now: Instant) -> Result<(), Refusal> {
        let number = id.parse().ok();
        let found = self.known.values_mut().find(|task| {
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
    use crate::sandbox::tests::options;

    const TIME: Duration = Duration::from_secs(3);

    fn tasks() -> Tasks {
        Tasks::new(&Options {
            task_time: TIME,
            ..options()
        })
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
    fn tasks_hold_slots_of_their_pack_until_they_end() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let (image, video) = (
            json!({ "prompt": "a", "n": 2, "human_image": "AA" }),
            json!({ "prompt": "sandbox:failed" }),
        );
        let other = json!({
            "image": "AA", "prompt": "a", "duration": 1, "voice_name": "a", "voice_url": "a",
        });
        for (path, body, after, fits) in [
            ("generations", &image, 0, true),
            ("generations", &image, 0, false),
            ("kolors-virtual-try-on", &image, 0, true),
            ("kolors-virtual-try-on", &image, 0, false),
            ("text2video", &video, 1, true),
            ("text2video", &video, 1, true),
            ("/text-to-video/{model}", &video, 1, true),
            ("/text-to-video/{model}", &video, 1, false),
            ("text2video", &video, 1, false),
            ("image-recognize", &other, 1, true),
            ("text-to-audio", &other, 1, true),
            ("custom-voices", &other, 1, true),
            ("generations", &image, 2, false),
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
    fn a_task_of_somebody_else_holds_a_slot_of_each_pack_for_ever() {
        let (mut tasks, now) = (tasks(), Instant::now());
        tasks.add_foreign(2, Duration::from_secs(1000), now);
        let later = now + Duration::from_hours(24 * 365);
        for (path, body) in [
            ("text2video", json!({ "prompt": "a" })),
            ("generations", json!({ "prompt": "a" })),
        ] {
            let foreign = tasks.of(endpoint(path));
            let states: Vec<_> = foreign.map(|task| task.status(later)).collect();
            assert_eq!(states, [Status::Submitted; 2], "{path}");
            create(&mut tasks, path, &body, later).unwrap();
            let refusal = create(&mut tasks, path, &body, later).unwrap_err();
            assert_eq!(refusal.code, 1303, "{path}");
        }
    }

    #[test]
    fn a_task_lasts_as_long_as_its_prompt_says_divided_by_the_speed() {
        for (speed, prompt, milliseconds) in [
            (1, "a", 3000),
            (10, "a", 300),
            (1, "sandbox:duration=40s", 40_000),
            (100, "sandbox:duration=40s", 400),
            (1, "sandbox:duration=0s", 0),
        ] {
            let mut tasks = Tasks::new(&Options {
                task_time: TIME,
                speed,
                ..options()
            });
            let now = Instant::now();
            let task = create(&mut tasks, "text2video", &json!({ "prompt": prompt }), now).unwrap();
            let end = now + Duration::from_millis(milliseconds);
            assert_eq!(task.status(end), Status::Succeeded, "{prompt} at {speed}");
            if let Some(before) = end
                .checked_sub(Duration::from_millis(1))
                .filter(|at| *at >= now)
            {
                assert_eq!(
                    task.status(before),
                    Status::Processing,
                    "{prompt} at {speed}"
                );
            }
        }
    }

    #[test]
    fn each_result_costs_a_unit_of_its_pack_and_a_failure_nothing() {
        let (mut tasks, mut now) = (tasks(), Instant::now());
        let element = json!({
            "element_name": "a", "element_description": "b", "reference_type": "image_refer",
            "element_image_list": { "frontal_image": "AA" },
        });
        for (path, body, spent) in [
            ("text2video", json!({ "prompt": "a" }), [1, 0]),
            ("generations", json!({ "prompt": "a", "n": 3 }), [1, 3]),
            ("text2video", json!({ "prompt": "sandbox:failed" }), [1, 3]),
            ("identify-face", json!({ "video_id": "1" }), [2, 3]),
            (
                "tts",
                json!({ "text": "a", "voice_id": "1", "voice_language": "en" }),
                [3, 3],
            ),
            ("advanced-custom-elements", element, [3, 3]),
        ] {
            create(&mut tasks, path, &body, now).unwrap();
            now += TIME;
            tasks.settle(now);
            let Packs { video, image } = &tasks.packs;
            assert_eq!([video.spent, image.spent], spent, "{path}");
        }
        let body = json!({ "prompt": "a", "n": 9 });
        create(&mut tasks, "generations", &body, now).unwrap_err();
        tasks.settle(now + TIME);
        assert_eq!(tasks.packs.image.spent, 3, "a refusal");
    }

    #[test]
    fn units_are_deducted_at_the_end_of_a_task_in_the_order_of_the_ends() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let mut ids = Vec::new();
        for seconds in [40, 20, 30] {
            let body = json!({ "prompt": format!("sandbox:duration={seconds}s") });
            ids.push(create(&mut tasks, "text2video", &body, now).unwrap().id);
        }
        for (seconds, deducted) in [
            (19, &[][..]),
            (20, &[(1, 0)]),
            (39, &[(2, 1), (1, 0)]),
            (40, &[(0, 2), (2, 1), (1, 0)]),
        ] {
            tasks.settle(now + Duration::from_secs(seconds));
            let rows: Vec<_> = tasks
                .deducted()
                .map(|task| (task.id, task.spent_before))
                .collect();
            let expected: Vec<_> = deducted
                .iter()
                .map(|&(index, before): &(usize, u32)| (ids[index], before))
                .collect();
            assert_eq!(rows, expected, "after {seconds} s");
            assert_eq!(tasks.packs.video.spent as usize, rows.len());
        }
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
        let mut tasks = Tasks::new(&options());
        let (now, body) = (Instant::now(), json!({ "prompt": "a" }));
        let mut ids = Vec::new();
        for _ in 0..=MOST_TASKS {
            let task = create(&mut tasks, "text2video", &body, now).unwrap();
            ids.push(task.id.to_string());
        }
        assert!(tasks.find(endpoint("text2video"), &ids[0]).is_err());
        assert!(tasks.find(endpoint("text2video"), &ids[1]).is_ok());
        assert_eq!(tasks.newest().count(), MOST_TASKS);
        tasks.settle(now);
        assert_eq!(tasks.packs.video.spent, 10_001);
        assert_eq!(tasks.deducted().count(), MOST_TASKS);
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

    #[test]
    fn a_task_is_refused_if_all_that_are_remembered_run() {
        let (mut tasks, now) = (tasks(), Instant::now());
        let body = json!({ "prompt": "a", "duration": 1 });
        for _ in 0..MOST_TASKS {
            create(&mut tasks, "text-to-audio", &body, now).unwrap();
        }
        let refusal = create(&mut tasks, "text-to-audio", &body, now).unwrap_err();
        assert_eq!(refusal.code, 1303);
        create(&mut tasks, "text-to-audio", &body, now + TIME).unwrap();
    }
}

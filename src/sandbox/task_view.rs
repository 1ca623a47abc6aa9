//! Views of a task, in the words of the legacy API or of the new standard.

use std::time::Duration;

use serde_json::{Value, json};

use super::END_OF_TIME;
use super::endpoints::{EndpointKind, Output};
use super::files::{Files, LIFE};
use super::task::{Status, Task};

/// View of a task at some moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct TaskView<'a> {
    pub(super) task: &'a Task,
    pub(super) status: Status,
    /// URLs of the task's result files.
    pub(super) files: &'a Files,
}

/// Message of a failed task (measured by `aself101/kling-api`, 2026).
const FAILURE: &str = "Failure to pass the risk control system";

/// Owner of everything made here. The owner of Kling's own elements and voices is `kling`.
const CREATOR: &str = "100000001";

// === impl TaskView ===

impl TaskView<'_> {
    /// Returns the response to the create request.
    pub(super) fn created(&self) -> Value {
        let endpoint = self.task.endpoint;
        match endpoint.kind {
            EndpointKind::Immediate => self.answer(),
            EndpointKind::NewTasks | EndpointKind::Solutions => {
                let mut head = self.standard_head();
                if endpoint.is_hybrid {
                    head["task_id"] = head["id"].take();
                    head.as_object_mut().map(|head| head.remove("id"));
                }
                head
            }
            _ if endpoint.output == Output::OldElement => self.old_element(),
            _ => self.legacy_head(),
        }
    }

    /// Returns the response to a query below the endpoint's own path.
    pub(super) fn legacy(&self) -> Value {
        if self.task.endpoint.output == Output::OldElement {
            return self.old_element();
        }
        let mut task_view = self.legacy_head();
        task_view["task_status_msg"] = json!(self.message());
        if self.status == Status::Succeeded {
            task_view["task_result"] = self.result();
        }
        if self.has_ended() && !self.is_preset() {
            self.add_deduction(&mut task_view);
        }
        task_view
    }

    /// Returns the response to a query at `/tasks` or `/solutions`.
    pub(super) fn standard(&self) -> Value {
        let mut task_view = self.standard_head();
        task_view["message"] = json!(self.message());
        task_view["outputs"] = match self.status {
            Status::Succeeded => self.outputs(),
            _ => json!([]),
        };
        task_view["billing"] = match self.task.price() {
            price if price > 0 && self.has_ended() => json!([{
                "charge_type": "unit",
                "amount": price.to_string(),
                "package_type": self.task.pack_type().name(),
            }]),
            _ => json!([]),
        };
        task_view
    }

    fn legacy_head(&self) -> Value {
        let [created_at, updated_at] = self.times();
        let mut head = json!({
            "task_id": self.task.id.to_string(),
            "task_status": self.word("succeed"),
            "created_at": created_at,
            "updated_at": updated_at,
        });
        if self.task.endpoint.has_tasks() {
            head["task_info"] = self.info();
        }
        head
    }

    fn info(&self) -> Value {
        let echo = &self.task.request.echo;
        let mut info = json!({});
        if let Some(id) = &self.task.request.external_id {
            info["external_task_id"] = json!(id);
        }
        if let Output::ChildVideo | Output::VideoSound = self.task.endpoint.output {
            let id = echo.get("video_id").cloned();
            let url = echo.get("video_url").cloned();
            info["parent_video"] = json!({
                "id": id.unwrap_or_else(|| json!("")),
                "url": url.unwrap_or_else(|| json!(self.file(".mp4"))),
                "duration": "2",
            });
        }
        info
    }

    fn standard_head(&self) -> Value {
        let [create_time, update_time] = self.times();
        json!({
            "id": self.task.id.to_string(),
            "status": self.word(if self.task.endpoint.is_hybrid { "succeed" } else { "succeeded" }),
            "create_time": create_time,
            "update_time": update_time,
            "external_id": self.task.request.external_id.as_deref().unwrap_or_default(),
        })
    }

    /// Adds the cost of the task: units of a resource pack, and no money.
    pub(super) fn add_deduction(&self, task_view: &mut Value) {
        task_view["final_unit_deduction"] = json!(self.task.price().to_string());
        task_view["final_balance_deduction"] = json!({ "quota": "0", "list_price": "0" });
    }

    /// Returns the creation time, and the time at which the current status began, in ms.
    fn times(&self) -> [u64; 2] {
        let since = match self.status {
            Status::Submitted => Duration::ZERO,
            Status::Processing => self.task.time / 3,
            Status::Succeeded | Status::Failed => self.task.time,
        };
        let created_at = self.task.created_at;
        [created_at, created_at + since].map(milliseconds)
    }

    fn word(&self, success: &'static str) -> &'static str {
        match self.status {
            Status::Succeeded => success,
            status => status.name(),
        }
    }

    fn message(&self) -> &'static str {
        match self.status {
            Status::Failed => FAILURE,
            _ => "",
        }
    }

    fn has_ended(&self) -> bool {
        matches!(self.status, Status::Succeeded | Status::Failed)
    }

    fn is_preset(&self) -> bool {
        self.task.endpoint.kind == EndpointKind::Presets
    }

    pub(super) fn owner(&self) -> &'static str {
        if self.is_preset() { "kling" } else { CREATOR }
    }

    /// Returns the URL of a file of this task. Files of presets are never deleted.
    pub(super) fn file(&self, end: &str) -> String {
        let until = if self.is_preset() {
            END_OF_TIME
        } else {
            self.task.ended_at().saturating_add(LIFE)
        };
        self.files.url(until, &format!("{}{end}", self.task.id))
    }
}

pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::sandbox::create_request::CreateRequest;
    use crate::sandbox::endpoints::tests::endpoint;
    use crate::sandbox::tasks::Tasks;
    use crate::sandbox::tests::options;
    use crate::sandbox::{Options, Results};

    /// Returns the view of a task at its creation, and its two views after its end: legacy, then new
    /// standard.
    fn told(path: &str, body: &Value) -> [Value; 3] {
        let files = Files::new("http://sandbox/", Results::Link);
        let mut tasks = Tasks::new(&Options {
            task_time: Duration::from_secs(3),
            concurrency: 9,
            ..options()
        });
        let now = Instant::now();
        let request = CreateRequest::parse(endpoint(path), body.to_string().as_bytes()).unwrap();
        let created_at = Duration::from_secs(1000);
        let task = tasks
            .create(endpoint(path), request, created_at, now)
            .unwrap();
        let at = |status| TaskView {
            task,
            status,
            files: &files,
        };
        let created = if endpoint(path).has_tasks() {
            Status::Submitted
        } else {
            task.status(now)
        };
        let later = at(task.status(now + task.time));
        [at(created).created(), later.legacy(), later.standard()]
    }

    #[test]
    fn a_task_is_told_as_the_legacy_api_does() {
        let body = json!({ "prompt": "a", "n": 2, "external_task_id": "mine" });
        let [created, ended, _] = told("generations", &body);
        let id = created["task_id"].as_str().unwrap();
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
        // The file is deleted 30 days after its end at 1003 s.
        expected["task_result"] = json!({ "images": [
            { "index": 0, "url": format!("http://sandbox/results/{id}-0.png?Expires=2593003") },
            { "index": 1, "url": format!("http://sandbox/results/{id}-1.png?Expires=2593003") },
        ] });
        expected["final_unit_deduction"] = json!("2");
        expected["final_balance_deduction"] = json!({ "quota": "0", "list_price": "0" });
        assert_eq!(ended, expected);
    }

    #[test]
    fn a_task_is_told_as_the_new_standard_does_whichever_path_created_it() {
        let body = json!({
            "prompt": "a",
            "external_task_id": "mine",
            "options": { "external_task_id": "mine" },
        });
        for path in ["text2video", "/text-to-video/{model}"] {
            let [created, _, ended] = told(path, &body);
            let id = ended["id"].as_str().unwrap();
            let video = ended["outputs"][0]["id"].as_str().unwrap();
            let expected = json!({
                "id": id,
                "status": "succeeded",
                "message": "",
                "create_time": 1_000_000,
                "update_time": 1_003_000,
                "external_id": "mine",
                "outputs": [{
                    "type": "video",
                    "id": video,
                    "url": format!("http://sandbox/results/{id}.mp4?Expires=2593003"),
                    "duration": "2",
                }],
                "billing": [{ "charge_type": "unit", "amount": "1", "package_type": "video" }],
            });
            assert_eq!(ended, expected, "{path}");
            assert_ne!(video, id, "{path}");
            if path.starts_with('/') {
                let expected = json!({
                    "id": id,
                    "status": "submitted",
                    "create_time": 1_000_000,
                    "update_time": 1_000_000,
                    "external_id": "mine",
                });
                assert_eq!(created, expected);
            }
        }
    }

    #[test]
    fn a_hybrid_is_created_by_one_name_and_queried_by_another() {
        let body = json!({ "contents": [
            { "type": "product_image", "url": "https://a.test/b.png" },
            { "type": "person_image", "url": "https://a.test/c.png" },
        ] });
        let [created, _, ended] = told("/solutions/virtual_try_on", &body);
        assert_eq!(created.get("id"), None, "{created}");
        assert_eq!(created["task_id"], ended["id"]);
        assert_eq!(ended["status"], "succeed");
        assert_eq!(ended["billing"][0]["package_type"], "image");
    }

    #[test]
    fn a_failure_has_a_message_and_neither_result_nor_price() {
        let body = json!({ "prompt": "sandbox:failed" });
        let [_, legacy, standard] = told("text2video", &body);
        assert_eq!(legacy["task_status"], "failed");
        assert_eq!(legacy["task_status_msg"], FAILURE);
        assert_eq!(legacy.get("task_result"), None);
        assert_eq!(legacy["final_unit_deduction"], "0");
        let told = ["status", "message", "outputs", "billing"].map(|name| standard[name].clone());
        assert_eq!(
            told,
            [json!("failed"), json!(FAILURE), json!([]), json!([])]
        );
    }

    #[test]
    fn an_answer_without_a_task_can_find_nothing() {
        for (path, body, place, found) in [
            (
                "identify-face",
                json!({ "video_id": "1" }),
                "/face_data",
                json!([]),
            ),
            (
                "image-recognize",
                json!({ "image": "AA" }),
                "/task_result/images/0/is_contain",
                json!(false),
            ),
            (
                "init-selection",
                json!({ "video_id": "1" }),
                "/status",
                json!(1),
            ),
            (
                "tts",
                json!({ "text": "a", "voice_id": "1", "voice_language": "en" }),
                "/task_status",
                json!("failed"),
            ),
        ] {
            let [expected, mut failing] = [false, true].map(|fails| {
                let mut body = body.clone();
                if fails {
                    body["callback_url"] = json!("https://a.test/sandbox:failed");
                }
                told(path, &body)[0].take()
            });
            assert_ne!(expected.pointer(place), Some(&found), "{path}");
            assert_eq!(
                failing.pointer_mut(place).map(Value::take),
                Some(found),
                "{path}"
            );
        }
    }
}

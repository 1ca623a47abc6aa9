//! Reads the tasks in an answer while its body passes: one task, or a page of a list, in either generation of
//! the API.

use std::borrow::Cow;

use memchr::memchr2;
use serde::Deserialize;
use serde_json::Value;

/// Place of the tasks in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskPlace {
    /// `data` is the task, as in the answer to a legacy query.
    Data,
    /// `data` is an array of tasks.
    List,
    /// `data.result` is an array of tasks, as in the answer to `POST /tasks`.
    Result,
}

/// A task as an answer shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnsweredTask {
    /// Kling's id of the task.
    pub id: String,
    pub external_id: Option<String>,
    /// Kling's word for the state.
    pub status: String,
    /// Reason for a failure, as Kling puts it; empty or missing otherwise.
    pub message: Option<String>,
    /// Time of the create, in milliseconds since 1970.
    pub created_at: Option<i64>,
    /// Units of resource packs that the task cost, as decimal numbers to be added up.
    pub units: Vec<String>,
    pub files: Vec<ResultFile>,
}

/// The JSON text of one task in an answer.
#[derive(Clone, Copy)]
pub struct TaskText<'a>(&'a [u8]);

/// Id and state of a task in an answer.
#[derive(Deserialize)]
pub struct TaskBrief<'a> {
    #[serde(borrow, alias = "task_id")]
    pub id: Cow<'a, str>,
    /// Kling's word for the state.
    #[serde(borrow, alias = "task_status")]
    pub status: Cow<'a, str>,
}

/// A file that a task made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultFile {
    /// `video`, `image` or `audio`.
    pub kind: &'static str,
    /// Place among the results of the task.
    pub index: usize,
    pub url: String,
    /// True for the copy with a watermark.
    pub watermarked: bool,
}

/// Splits a JSON text into its tasks. Each is kept until it is whole, and no longer.
pub struct TaskSplitter {
    /// Depth of objects and arrays at which a task stands.
    depth_of_tasks: usize,
    depth: usize,
    state: TextState,
    /// The task that is being read.
    task: Vec<u8>,
    /// True while a task is being read.
    is_inside: bool,
    /// True if the task is too large, or the text is no JSON.
    is_skipped: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TextState {
    OutsideStrings,
    InString,
    Escaped,
}

/// Largest task that is read, in bytes. One with nine signed addresses has about 6 KiB.
const LARGEST: usize = 32 << 10;
/// Longest member that is taken over, in bytes.
const LONGEST: usize = 4096;
/// Most files of one task.
const MOST_FILES: usize = 64;

// === impl TaskPlace ===

impl TaskPlace {
    /// Returns the place of tasks in the answer to a read of single tasks with this target: a query by ids is
    /// answered with a list.
    pub fn of_target(target: &str) -> Self {
        if target.contains('?') {
            Self::List
        } else {
            Self::Data
        }
    }
}

// === impl TaskSplitter ===

impl TaskSplitter {
    /// Makes a splitter for an answer that has its tasks at this place.
    pub fn new(place: TaskPlace) -> Self {
        let depth_of_tasks = match place {
            TaskPlace::Data => 2,
            TaskPlace::List => 3,
            TaskPlace::Result => 4,
        };
        Self {
            depth_of_tasks,
            depth: 0,
            state: TextState::OutsideStrings,
            task: Vec::new(),
            is_inside: false,
            is_skipped: false,
        }
    }

    /// Reads the next chunk of the text, and calls `found` with each task that ends in it.
    pub fn push(&mut self, bytes: &[u8], mut found: impl FnMut(TaskText<'_>)) {
        let mut at = 0;
        // Begin of the part of a task that is not kept yet.
        let mut from = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            match self.state {
                TextState::InString => {
                    at += memchr2(b'"', b'\\', rest).map_or(rest.len(), |index| index + 1);
                    self.state = match bytes[at - 1] {
                        b'"' => TextState::OutsideStrings,
                        b'\\' => TextState::Escaped,
                        _ => TextState::InString,
                    };
                }
                TextState::Escaped => {
                    at += 1;
                    self.state = TextState::InString;
                }
                TextState::OutsideStrings => {
                    at += 1;
                    match rest[0] {
                        b'"' => self.state = TextState::InString,
                        byte @ (b'{' | b'[') => {
                            self.depth += 1;
                            if byte == b'{' && self.depth == self.depth_of_tasks {
                                self.task.clear();
                                self.is_inside = true;
                                self.is_skipped = false;
                                from = at - 1;
                            }
                        }
                        b'}' | b']' => {
                            if self.is_inside && self.depth == self.depth_of_tasks {
                                self.keep(&bytes[from..at]);
                                self.is_inside = false;
                                if !self.is_skipped {
                                    found(TaskText(&self.task));
                                }
                            }
                            self.depth = self.depth.saturating_sub(1);
                        }
                        _ => {}
                    }
                }
            }
        }
        if self.is_inside {
            self.keep(&bytes[from..]);
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.is_skipped {
            return;
        }
        if self.task.len() + bytes.len() > LARGEST {
            self.is_skipped = true;
            self.task = Vec::new();
        } else {
            self.task.extend_from_slice(bytes);
        }
    }
}

// === impl TaskText ===

impl<'a> TaskText<'a> {
    /// Reads only id and state, which is cheap; `None` if they are not plain.
    pub fn brief(&self) -> Option<TaskBrief<'a>> {
        serde_json::from_slice(self.0).ok()
    }

    /// Reads the whole task; `None` if the JSON shows no task.
    pub fn read(&self) -> Option<AnsweredTask> {
        AnsweredTask::read(self.0)
    }
}

// === impl AnsweredTask ===

impl AnsweredTask {
    /// Returns true if the task is not known to be older than this time, in milliseconds since 1970.
    pub fn is_since(&self, earliest: i64) -> bool {
        self.created_at
            .is_none_or(|created_at| created_at >= earliest)
    }

    /// Reads one task; `None` if the JSON shows no task.
    fn read(json: &[u8]) -> Option<Self> {
        let task: Value = serde_json::from_slice(json).ok()?;
        let id = text(&task["task_id"]).or_else(|| text(&task["id"]))?;
        let status = text(&task["task_status"]).or_else(|| text(&task["status"]))?;
        let external_id = text(&task["task_info"]["external_task_id"])
            .or_else(|| text(&task["external_id"]))
            .filter(|id| !id.is_empty());
        let message = text(&task["task_status_msg"]).or_else(|| text(&task["message"]));
        let mut files = Vec::new();
        for (list, kind) in [
            ("videos", "video"),
            ("images", "image"),
            ("audios", "audio"),
        ] {
            read_files(&task["task_result"][list], |_| Some(kind), &mut files);
        }
        read_files(&task["outputs"], kind_of_output, &mut files);
        files.truncate(MOST_FILES);
        let created_at = task["created_at"]
            .as_i64()
            .or_else(|| task["create_time"].as_i64());
        Some(Self {
            units: units(&task),
            created_at,
            id,
            external_id,
            status,
            message,
            files,
        })
    }
}

/// Returns the units of a task: the whole deduction, or one part from each pack.
fn units(task: &Value) -> Vec<String> {
    if let Some(units) = text(&task["final_unit_deduction"]) {
        return vec![units];
    }
    let parts = task["billing"].as_array().into_iter().flatten();
    let in_units = parts.filter(|part| part["charge_type"] == "unit");
    in_units.filter_map(|part| text(&part["amount"])).collect()
}

fn kind_of_output(output: &Value) -> Option<&'static str> {
    let kind = output["type"].as_str()?;
    ["video", "image", "audio"]
        .into_iter()
        .find(|known| *known == kind)
}

fn read_files(
    list: &Value,
    kind: impl Fn(&Value) -> Option<&'static str>,
    files: &mut Vec<ResultFile>,
) {
    for (index, file) in list.as_array().into_iter().flatten().enumerate() {
        let Some(kind) = kind(file) else {
            continue;
        };
        let mut add = |names: &[&str], watermarked| {
            let urls = names.iter().filter_map(|name| text(&file[*name]));
            if let Some(url) = urls.into_iter().find(|url| !url.is_empty()) {
                files.push(ResultFile {
                    kind,
                    index,
                    url,
                    watermarked,
                });
            }
        };
        add(&["url", "url_mp3", "url_wav", "audio_url"], false);
        add(&["watermark_url"], true);
    }
}

/// Returns a text or a number as text; `None` for other values, and for long texts.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if text.len() <= LONGEST => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(place: TaskPlace, text: &str, size: usize) -> Vec<AnsweredTask> {
        let mut splitter = TaskSplitter::new(place);
        let mut tasks = Vec::new();
        for piece in text.as_bytes().chunks(size) {
            splitter.push(piece, |task| tasks.extend(task.read()));
        }
        tasks
    }

    fn file(kind: &'static str, index: usize, url: &str, watermarked: bool) -> ResultFile {
        ResultFile {
            kind,
            index,
            url: url.to_owned(),
            watermarked,
        }
    }

    #[test]
    fn task_is_read_in_both_generations_of_the_api() {
        let legacy = json!({
            "task_id": "8", "task_status": "succeed", "task_status_msg": "", "created_at": 7,
            "task_info": { "external_task_id": "mine", "parent_video": { "id": "7" } },
            "task_result": { "videos": [
                { "id": "70", "url": "https://a/v.mp4", "watermark_url": "https://a/w.mp4", "duration": "5" },
            ] },
            "final_unit_deduction": "2.5", "final_balance_deduction": { "quota": "0" },
        });
        let standard = json!({
            "id": 8, "status": "succeeded", "message": "", "external_id": "mine", "create_time": 7,
            "outputs": [
                { "type": "text", "text": "a" },
                { "type": "image", "url": "https://a/i.png" },
            ],
            "billing": [
                { "charge_type": "unit", "amount": "2.4", "package_type": "video" },
                { "charge_type": "cash", "amount": "9" },
            ],
        });
        let failed = json!({ "id": "9", "status": "failed", "message": "risk", "external_id": "" });
        let legacy_read = AnsweredTask {
            id: "8".to_owned(),
            external_id: Some("mine".to_owned()),
            status: "succeed".to_owned(),
            message: Some(String::new()),
            created_at: Some(7),
            units: vec!["2.5".to_owned()],
            files: vec![
                file("video", 0, "https://a/v.mp4", false),
                file("video", 0, "https://a/w.mp4", true),
            ],
        };
        let standard_read = AnsweredTask {
            status: "succeeded".to_owned(),
            units: vec!["2.4".to_owned()],
            files: vec![file("image", 1, "https://a/i.png", false)],
            ..legacy_read.clone()
        };
        let failed_read = AnsweredTask {
            id: "9".to_owned(),
            status: "failed".to_owned(),
            message: Some("risk".to_owned()),
            ..AnsweredTask::default()
        };
        for (place, answer, tasks) in [
            (
                TaskPlace::Data,
                json!({ "code": 0, "data": legacy }),
                vec![legacy_read],
            ),
            (
                TaskPlace::List,
                json!({ "code": 0, "data": [standard, failed] }),
                vec![standard_read, failed_read.clone()],
            ),
            (
                TaskPlace::Result,
                json!({ "data": { "result": [failed], "has_more": false } }),
                vec![failed_read],
            ),
            (
                TaskPlace::Data,
                json!({ "code": 1201, "data": null }),
                Vec::new(),
            ),
            (
                TaskPlace::Data,
                json!({ "data": { "task_id": "8" } }),
                Vec::new(),
            ),
        ] {
            for size in [1, 2, 7, 10_000] {
                assert_eq!(
                    read(place, &answer.to_string(), size),
                    tasks,
                    "{answer} by {size}"
                );
            }
        }
    }

    #[test]
    fn brief_look_agrees_with_the_whole_task() {
        for (task, has_brief) in [
            (
                json!({ "task_id": "8", "task_status": "processing", "task_result": {} }),
                true,
            ),
            (
                json!({ "id": "8\"", "status": "failed", "message": "a" }),
                true,
            ),
            // Both names, or a number: the whole task decides.
            (
                json!({ "task_id": "8", "id": "7", "status": "failed" }),
                false,
            ),
            (json!({ "id": 8, "status": "failed" }), false),
        ] {
            let json = task.to_string();
            let text = TaskText(json.as_bytes());
            let brief = text.brief();
            assert_eq!(brief.is_some(), has_brief, "{task}");
            let whole = text.read().unwrap();
            if let Some(brief) = brief {
                assert_eq!(
                    (&*brief.id, &*brief.status),
                    (&*whole.id, &*whole.status),
                    "{task}"
                );
            }
        }
    }

    #[test]
    fn large_task_is_skipped_and_the_next_one_is_read() {
        let task =
            |id: &str, message: String| json!({ "id": id, "status": "failed", "message": message });
        let answer =
            json!({ "data": [task("1", "{".repeat(LARGEST)), task("2", "\\\"}".to_owned())] });
        let tasks = read(TaskPlace::List, &answer.to_string(), 100);
        let ids: Vec<_> = tasks.iter().map(|task| &*task.id).collect();
        assert_eq!(ids, ["2"]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_splitter_panic(bytes: Vec<u8>, size in 1_usize..9) {
            for place in [TaskPlace::Data, TaskPlace::List, TaskPlace::Result] {
                let mut splitter = TaskSplitter::new(place);
                for piece in bytes.chunks(size) {
                    splitter.push(piece, |_| {});
                }
            }
        }

        #[test]
        fn task_is_found_whatever_its_texts_hold(message in ".{0,40}", size in 1_usize..30) {
            let answer = json!({ "data": [{ "id": "1", "status": "failed", "message": message }] });
            let tasks = read(TaskPlace::List, &answer.to_string(), size);
            prop_assert_eq!(tasks.len(), 1);
            prop_assert_eq!(tasks[0].message.as_deref(), Some(&*message));
        }
    }
}

//! The ids of a task, and what its create orders. A task is paid for, and can be found again only by its
//! ids.

use std::io;

use memchr::memchr2;
use serde_json::Number;

/// Ids of a task in a request or a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Id that Kling gave the task.
    pub id: Option<String>,
    /// Id that the client gave the task, unique in the account.
    pub external_id: Option<String>,
    /// Kling's id of the request, from the envelope of the answer.
    pub request_id: Option<String>,
    /// Kling's word for the state of the task.
    pub status: Option<String>,
}

/// Members of a create's body that decide its price, as the client wrote them. A member is left out unless
/// it is a word of letters, digits, `.`, `_` and `-`, so no prompt and no picture can get in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order {
    pub model: Option<String>,
    /// Length of the video, in seconds.
    pub duration: Option<String>,
    pub resolution: Option<String>,
    pub mode: Option<String>,
    /// Number of images, or `auto`.
    pub n: Option<String>,
    /// `on` or `true` for a video with sound.
    pub audio: Option<String>,
}

/// Reads the ids of a task from a JSON text that arrives in chunks of any size, while it passes. From the body
/// of a create it also reads the [`Order`].
///
/// It keeps only these members, and is lenient: ids before a cut or an error count. An id of an unexpected
/// type does not hide the other one, and if there are two, the first counts.
#[derive(Default)]
pub struct TaskReader {
    root: Root,
    state: TextState,
    /// Number of objects and arrays that are open.
    depth: usize,
    /// Members around the current value, outermost first, down to the depth of the deepest id.
    path: [Member; DEEPEST],
    /// The current string or number, as its JSON text.
    token: Vec<u8>,
    token_is_string: bool,
    /// Ids found so far, one slot for each member that may hold one, in the order of preference.
    ids: [Option<String>; 2],
    external_ids: [Option<String>; 3],
    request_id: Option<String>,
    status: Option<String>,
    /// Members of the order found so far.
    order: Order,
    series_amount: Option<String>,
    is_complete: bool,
}

/// Kind of text, which decides where the ids are.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Root {
    /// Body of a create, which has the ids at the top level.
    #[default]
    Request,
    /// Response to a create, which has the ids in `data`.
    Answer,
}

/// State of the reader before the next byte.
#[derive(Clone, Copy, Default)]
enum TextState {
    #[default]
    OutsideStrings,
    InString,
    /// After a backslash in a string.
    Escaped,
}

/// Members that may hold an id, or lead to one.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Member {
    Data,
    TaskId,
    Id,
    ExternalTaskId,
    ExternalId,
    TaskInfo,
    Options,
    RequestId,
    Status,
    Settings,
    Model,
    Duration,
    Resolution,
    Mode,
    Count,
    SeriesAmount,
    Audio,
    #[default]
    Other,
}

/// Depth of the deepest id: `data.task_info.external_task_id`.
const DEEPEST: usize = 3;
/// Longest id that is read, in bytes of JSON; longer ones are ignored.
const LONGEST: usize = 1024;
/// Longest member of an order, in bytes.
const LONGEST_WORD: usize = 64;

// === impl TaskReader ===

impl TaskReader {
    /// Makes a reader for the body of a create, in either generation of the API.
    pub fn of_request() -> Self {
        Self::default()
    }

    /// Makes a reader for the response to a create, in either generation of the API.
    pub fn of_answer() -> Self {
        Self {
            root: Root::Answer,
            ..Self::default()
        }
    }

    /// Reads the next chunk of the text.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while let (Some((&first, rest)), false) = (bytes.split_first(), self.is_complete) {
            bytes = match self.state {
                TextState::OutsideStrings => {
                    self.read(first);
                    rest
                }
                TextState::InString => self.read_string(bytes),
                TextState::Escaped => {
                    self.keep(&[first]);
                    self.state = TextState::InString;
                    rest
                }
            };
        }
    }

    /// Returns the ids that were read so far.
    pub fn task(&self) -> Task {
        Task {
            id: self.ids.iter().flatten().next().cloned(),
            external_id: self.external_id().map(str::to_owned),
            request_id: self.request_id.clone(),
            status: self.status.clone(),
        }
    }

    /// Returns the external id, if it was read already.
    pub fn external_id(&self) -> Option<&str> {
        self.external_ids
            .iter()
            .flatten()
            .next()
            .map(String::as_str)
    }

    /// Returns the order, as far as it was read.
    pub fn order(&self) -> Order {
        let mut order = self.order.clone();
        // The length of a series is the number of its images.
        order.n = self.series_amount.clone().or(order.n);
        order
    }

    /// Returns true if the rest of the text holds no further id.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Reads up to the end of a string, or of the chunk. Returns the rest of the chunk.
    fn read_string<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let end = memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len());
        let (text, rest) = bytes.split_at(end);
        self.keep(text);
        match rest.split_first() {
            Some((b'\\', rest)) => {
                self.keep(b"\\");
                self.state = TextState::Escaped;
                rest
            }
            Some((_, rest)) => {
                self.state = TextState::OutsideStrings;
                rest
            }
            None => rest,
        }
    }

    fn read(&mut self, byte: u8) {
        match byte {
            b'"' => {
                self.token.clear();
                self.token_is_string = true;
                self.state = TextState::InString;
            }
            b'{' | b'[' => {
                self.depth += 1;
                self.enter(Member::Other);
            }
            b':' => self.enter(Member::named(&self.token)),
            b',' => {
                self.end_value();
                self.enter(Member::Other);
            }
            b'}' | b']' => {
                self.end_value();
                self.enter(Member::Other);
                self.depth = self.depth.saturating_sub(1);
                let data_ended = self.depth == 1 && self.path[0] == Member::Data;
                self.is_complete = self.root == Root::Answer && data_ended;
            }
            b' ' | b'\t' | b'\n' | b'\r' => {}
            _ => self.keep(&[byte]),
        }
    }

    /// Goes on to a member of the innermost object, or to the next value of the innermost array.
    fn enter(&mut self, member: Member) {
        self.token.clear();
        self.token_is_string = false;
        let innermost = self.depth.checked_sub(1);
        if let Some(place) = innermost.and_then(|index| self.path.get_mut(index)) {
            *place = member;
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = (LONGEST + 1).saturating_sub(self.token.len());
        self.token
            .extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// Ends a string or a number, and stores it if it is an id.
    fn end_value(&mut self) {
        use Member::{
            Audio, Count, Data, Duration, ExternalId, ExternalTaskId, Id, Mode, Model, Options,
            RequestId, Resolution, SeriesAmount, Settings, Status, TaskId, TaskInfo,
        };
        let Some(path) = self.path.get(..self.depth) else {
            return;
        };
        let order = &mut self.order;
        let (place, is_word) = match (self.root, path) {
            (Root::Answer, [RequestId]) => (&mut self.request_id, false),
            (Root::Answer, [Data, Status]) => (&mut self.status, false),
            (Root::Request, [TaskId]) | (Root::Answer, [Data, TaskId]) => (&mut self.ids[0], false),
            (Root::Request, [Id]) | (Root::Answer, [Data, Id]) => (&mut self.ids[1], false),
            (Root::Request, [ExternalTaskId]) | (Root::Answer, [Data, ExternalTaskId]) => {
                (&mut self.external_ids[0], false)
            }
            (Root::Request, [ExternalId]) | (Root::Answer, [Data, ExternalId]) => {
                (&mut self.external_ids[1], false)
            }
            (Root::Request, [TaskInfo | Options, ExternalTaskId])
            | (Root::Answer, [Data, TaskInfo | Options, ExternalTaskId]) => {
                (&mut self.external_ids[2], false)
            }
            (Root::Request, [Model]) => (&mut order.model, true),
            (Root::Request, [Duration] | [Settings, Duration]) => (&mut order.duration, true),
            (Root::Request, [Resolution] | [Settings, Resolution]) => (&mut order.resolution, true),
            (Root::Request, [Mode] | [Settings, Mode]) => (&mut order.mode, true),
            (Root::Request, [Count] | [Settings, Count]) => (&mut order.n, true),
            (Root::Request, [SeriesAmount] | [Settings, SeriesAmount]) => {
                (&mut self.series_amount, true)
            }
            (Root::Request, [Audio] | [Settings, Audio]) => (&mut order.audio, true),
            _ => return,
        };
        if place.is_some() || self.token.len() > LONGEST {
            return;
        }
        *place = if is_word {
            word(&self.token)
        } else if self.token_is_string {
            unescape(&self.token)
        } else {
            // A number counts as its text.
            let number = serde_json::from_slice::<Number>(&self.token).ok();
            number.map(|number| number.to_string())
        };
    }
}

/// Returns a member of an order; `None` if it is no short word.
pub fn word(token: &[u8]) -> Option<String> {
    let is_word = (1..=LONGEST_WORD).contains(&token.len())
        && token != b"null"
        && token
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
    let text = || String::from_utf8_lossy(token).into_owned();
    is_word.then(text)
}

/// Receives the output of a decoder.
impl io::Write for TaskReader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        // A result of 0 stops the decoder: the reader needs no more.
        Ok(if self.is_complete { 0 } else { bytes.len() })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Member ===

impl Member {
    fn named(token: &[u8]) -> Self {
        let unescaped;
        let name = if token.contains(&b'\\') {
            unescaped = unescape(token).unwrap_or_default();
            unescaped.as_bytes()
        } else {
            token
        };
        match name {
            b"data" => Self::Data,
            b"task_id" => Self::TaskId,
            b"id" => Self::Id,
            b"external_task_id" => Self::ExternalTaskId,
            b"external_id" => Self::ExternalId,
            b"task_info" => Self::TaskInfo,
            b"options" => Self::Options,
            b"request_id" => Self::RequestId,
            b"task_status" | b"status" => Self::Status,
            b"settings" => Self::Settings,
            b"model_name" | b"model" => Self::Model,
            b"duration" => Self::Duration,
            b"resolution" => Self::Resolution,
            b"mode" => Self::Mode,
            b"n" => Self::Count,
            b"series_amount" => Self::SeriesAmount,
            b"sound" | b"audio" => Self::Audio,
            _ => Self::Other,
        }
    }
}

/// Unescapes the text of a JSON string, given without its quotes.
fn unescape(token: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(token);
    if text.contains('\\') {
        serde_json::from_str(&format!("\"{text}\"")).ok()
    } else {
        Some(text.into_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// Returns the ids that are read from a text in chunks of this size.
    fn read(mut reader: TaskReader, text: &[u8], size: usize) -> [String; 2] {
        for piece in text.chunks(size) {
            reader.push(piece);
        }
        let Task {
            id, external_id, ..
        } = reader.task();
        [id, external_id].map(Option::unwrap_or_default)
    }

    #[test]
    fn names_are_found_where_each_generation_of_the_api_puts_them() {
        for (answer, names) in [
            (
                r#"{"code":0,"data":{"task_id":"8","task_status":"submitted"}}"#,
                ["8", ""],
            ),
            (
                r#"{"data":{"task_id":"8","task_info":{"external_task_id":"mine"}}}"#,
                ["8", "mine"],
            ),
            (r#"{"data":{"id":"8","external_id":"mine"}}"#, ["8", "mine"]),
            (
                r#"{"data":{"id":7,"task_id":"8","task_info":null}}"#,
                ["8", ""],
            ),
            (r#"{"data":{"id":7,"external_id":{}}}"#, ["7", ""]),
            (r#"{"data":{"id":null,"x":[{"id":1}]}}"#, ["", ""]),
            (r#"{"data":[{"task_id":"8"}]}"#, ["", ""]),
            (r#"{"task_id":"8"}"#, ["", ""]),
            (r#"{"data":null}"#, ["", ""]),
            (r#"{"message":"\"data\":{","data":{"id":"8"}}"#, ["8", ""]),
            (
                r#"{"d\u0061ta" : { "task_id" : "\u0038\"" } }"#,
                ["8\"", ""],
            ),
            ("{\"message\":\"\u{fffd}\",\"data\":{\"id\":\"8\"", ["", ""]),
            ("{\"data\":{\"id\":\"8\",\"x", ["8", ""]),
            ("<html>", ["", ""]),
            ("\u{feff}{\"data\":{\"id\":\"8\"}}", ["8", ""]),
        ] {
            for size in [1, 2, 3, 7, answer.len()] {
                let found = read(TaskReader::of_answer(), answer.as_bytes(), size);
                assert_eq!(found, names, "{answer} by {size}");
            }
        }
        for request in [
            r#"{"prompt":"a cat","external_task_id":"mine"}"#,
            r#"{"prompt":"a cat","options":{"external_task_id":"mine"}}"#,
        ] {
            let [_, external_id] = read(TaskReader::of_request(), request.as_bytes(), 5);
            assert_eq!(external_id, "mine", "{request}");
        }
    }

    #[test]
    fn order_is_read_and_nothing_else_of_the_body() {
        let word = |word: &str| Some(word.to_owned());
        let order = Order {
            model: word("kling-v2-6"),
            duration: word("5"),
            resolution: word("1080p"),
            mode: word("pro"),
            n: word("2"),
            audio: word("on"),
        };
        for (body, expected) in [
            (
                r#"{"model_name":"kling-v2-6","mode":"pro","duration":"5","n":2,"sound":"on",
                    "resolution":"1080p","prompt":"{\"mode\":\"x\"}"}"#,
                order.clone(),
            ),
            (
                r#"{"settings":{"duration":5,"resolution":"1080p","audio":true},"options":{"mode":"x"}}"#,
                Order {
                    duration: word("5"),
                    resolution: word("1080p"),
                    audio: word("true"),
                    ..Order::default()
                },
            ),
            (
                r#"{"n":1,"series_amount":"auto"}"#,
                Order {
                    n: word("auto"),
                    ..Order::default()
                },
            ),
            (
                r#"{"mode":"a secret text","duration":null,"n":[2],"model_name":"","resolution":{"mode":"y"}}"#,
                Order::default(),
            ),
        ] {
            for size in [1, 3, body.len()] {
                let mut reader = TaskReader::of_request();
                for piece in body.as_bytes().chunks(size) {
                    reader.push(piece);
                }
                assert_eq!(reader.order(), expected, "{body}");
            }
        }
    }

    #[test]
    fn request_id_and_state_are_read() {
        let mut reader = TaskReader::of_answer();
        let answer =
            br#"{"code":0,"request_id":"r","data":{"task_id":"8","request_id":"x","task_status":"succeed"}}"#;
        reader.push(answer);
        assert_eq!(reader.task().request_id.as_deref(), Some("r"));
        assert_eq!(reader.task().status.as_deref(), Some("succeed"));
    }

    #[test]
    fn message_that_is_not_utf_8_hides_no_name() {
        let answer = b"{\"message\":\"\xff\xfe\",\"data\":{\"task_id\":\"8\"}}";
        assert_eq!(read(TaskReader::of_answer(), answer, 4), ["8", ""]);
    }

    #[test]
    fn nothing_is_read_behind_the_data() {
        let mut reader = TaskReader::of_answer();
        reader.push(br#"{"data":{"id":"8"}"#);
        assert!(reader.is_complete());
        assert!(!TaskReader::of_answer().is_complete());
    }

    #[test]
    fn overlong_name_is_ignored() {
        let answer = json!({ "data": { "task_id": "8".repeat(LONGEST + 1), "id": "7" } });
        let found = read(TaskReader::of_answer(), answer.to_string().as_bytes(), 100);
        assert_eq!(found, ["7", ""]);
    }

    /// Generates any JSON, in which some members have names that the reader looks for.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        let names = prop_oneof![
            Just("data"),
            Just("task_id"),
            Just("id"),
            Just("external_task_id"),
            Just("external_id"),
            Just("task_info"),
            Just("options"),
            Just("x"),
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            let names = names.clone().prop_map(str::to_owned);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(names, inner, 0..6).prop_map(Value::from_iter),
            ]
        })
    }

    /// Finds the ids in a complete value, for comparison.
    fn expected(data: &Value) -> [String; 2] {
        let text = |value: &Value| match value {
            Value::String(text) if serde_json::to_string(text).unwrap().len() <= LONGEST => {
                Some(text.clone())
            }
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        let id = ["task_id", "id"].iter().find_map(|name| text(&data[name]));
        let external = ["external_task_id", "external_id"];
        let nested = ["task_info", "options"].map(|name| &data[name]["external_task_id"]);
        let external_id = external
            .iter()
            .find_map(|name| text(&data[name]))
            .or_else(|| nested.into_iter().find_map(text));
        [id, external_id].map(Option::unwrap_or_default)
    }

    proptest! {
        #[test]
        fn pieces_are_read_like_the_whole(data in value(), pretty: bool, size in 1_usize..50) {
            let answer = json!({ "code": 0, "data": data });
            let text = if pretty {
                serde_json::to_string_pretty(&answer).unwrap()
            } else {
                answer.to_string()
            };
            // `task_info` and `options` share one slot: the reader takes the first in the text,
            // `expected` takes `task_info`.
            let both = !answer["data"]["task_info"]["external_task_id"].is_null()
                && !answer["data"]["options"]["external_task_id"].is_null();
            prop_assume!(!both);
            let found = read(TaskReader::of_answer(), text.as_bytes(), size);
            prop_assert_eq!(found, expected(&answer["data"]));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, size in 1_usize..9) {
            read(TaskReader::of_answer(), &bytes, size);
            read(TaskReader::of_request(), &bytes, size);
        }
    }
}

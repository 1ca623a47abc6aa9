//! The ids of a task. A task is paid for, and can be found again only by its ids.

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
}

/// Reads the ids of a task from a JSON text that arrives in chunks of any size, while it passes.
///
/// It keeps only the ids, and is lenient: ids before a cut or an error count. An id of an unexpected
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
    #[default]
    Other,
}

/// Depth of the deepest id: `data.task_info.external_task_id`.
const DEEPEST: usize = 3;
/// Longest id that is read, in bytes of JSON; longer ones are ignored.
const LONGEST: usize = 1024;

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
            external_id: self.external_ids.iter().flatten().next().cloned(),
        }
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
        use Member::{Data, ExternalId, ExternalTaskId, Id, Options, TaskId, TaskInfo};
        let Some(path) = self.path.get(..self.depth) else {
            return;
        };
        let path = match (self.root, path) {
            (Root::Request, path) | (Root::Answer, [Data, path @ ..]) => path,
            (Root::Answer, _) => return,
        };
        let place = match path {
            [TaskId] => &mut self.ids[0],
            [Id] => &mut self.ids[1],
            [ExternalTaskId] => &mut self.external_ids[0],
            [ExternalId] => &mut self.external_ids[1],
            [TaskInfo | Options, ExternalTaskId] => &mut self.external_ids[2],
            _ => return,
        };
        if place.is_none() && self.token.len() <= LONGEST {
            *place = if self.token_is_string {
                unescape(&self.token)
            } else {
                // A number counts as its text.
                let number = serde_json::from_slice::<Number>(&self.token).ok();
                number.map(|number| number.to_string())
            };
        }
    }
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
        let Task { id, external_id } = reader.task();
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

//! The names of a task, which is what is paid for: by them it is found again.

use serde::Deserialize;
use serde_json::Value;

/// What a request or an answer calls a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Kling's name.
    pub id: Option<String>,
    /// The client's own, unique in the account.
    pub external_id: Option<String>,
}

/// Where the names may be, in whichever generation of the API. A member of another type than
/// expected hides no other.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Members {
    task_id: Value,
    id: Value,
    external_task_id: Value,
    external_id: Value,
    task_info: Value,
    options: Value,
}

/// An answer's envelope.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    data: Value,
}

// === impl Task ===

impl Task {
    /// The names in the JSON of a create; none if it is something else.
    pub fn ordered(request: &[u8]) -> Self {
        serde_json::from_slice::<Members>(request)
            .unwrap_or_default()
            .into()
    }

    /// The names in the JSON of an answer to a create; none if it is something else.
    pub fn answered(answer: &[u8]) -> Self {
        let Answer { data } = serde_json::from_slice(answer).unwrap_or_default();
        serde_json::from_value::<Members>(data)
            .unwrap_or_default()
            .into()
    }
}

impl From<Members> for Task {
    fn from(members: Members) -> Self {
        let nested = [&members.task_info, &members.options];
        let nested = nested.map(|object| &object["external_task_id"]);
        Self {
            id: text(&members.task_id).or_else(|| text(&members.id)),
            external_id: text(&members.external_task_id)
                .or_else(|| text(&members.external_id))
                .or_else(|| nested.into_iter().find_map(text)),
        }
    }
}

/// A name is a text, or a number that stands for one.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                r#"{"data":{"task_id":"8","id":7,"task_info":null}}"#,
                ["8", ""],
            ),
            (r#"{"data":{"id":7,"external_id":{}}}"#, ["7", ""]),
            (r#"{"data":[{"task_id":"8"}]}"#, ["", ""]),
            (r#"{"data":null}"#, ["", ""]),
            ("<html>", ["", ""]),
        ] {
            let Task {
                id, external_id, ..
            } = Task::answered(answer.as_bytes());
            let found = [id, external_id].map(Option::unwrap_or_default);
            assert_eq!(found, names, "{answer}");
        }
        for request in [
            r#"{"prompt":"a cat","external_task_id":"mine"}"#,
            r#"{"prompt":"a cat","options":{"external_task_id":"mine"}}"#,
        ] {
            let ordered = Task::ordered(request.as_bytes());
            assert_eq!(ordered.external_id.as_deref(), Some("mine"), "{request}");
        }
    }
}

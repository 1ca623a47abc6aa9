//! The names of a task, which is what is paid for: by them it is found again.

use serde::Deserialize;

/// What a request or an answer calls a task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Task {
    /// Kling's name. Paths of the new standard call it `id`.
    #[serde(rename = "task_id", alias = "id")]
    pub id: Option<String>,
    /// The client's own, unique in the account.
    #[serde(rename = "external_task_id", alias = "external_id")]
    pub external_id: Option<String>,
    /// Where legacy paths put the client's name.
    #[serde(rename = "task_info")]
    info: Info,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Info {
    external_task_id: Option<String>,
}

/// An answer's envelope.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    data: Task,
}

// === impl Task ===

impl Task {
    /// The names in the JSON of a create; none if it is something else.
    pub fn ordered(request: &[u8]) -> Self {
        serde_json::from_slice(request).unwrap_or_default()
    }

    /// The names in the JSON of an answer to a create; none if it is something else.
    pub fn answered(answer: &[u8]) -> Self {
        let Answer { data } = serde_json::from_slice(answer).unwrap_or_default();
        Self {
            external_id: data.external_id.or(data.info.external_task_id),
            id: data.id,
            info: Info::default(),
        }
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
        let ordered = Task::ordered(br#"{"prompt":"a cat","external_task_id":"mine"}"#);
        assert_eq!(ordered.external_id.as_deref(), Some("mine"));
    }
}

//! Elements and voices that Kling provides to everyone. All except their shape is guessed.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::create_request::CreateRequest;
use super::endpoints::Endpoint;
use super::task::Task;

/// Ids of 18 digits, with names.
const PRESETS: &[(u64, &str)] = &[
    (829_836_802_793_406_551, "Sandbox 1"),
    (829_836_802_793_406_552, "Sandbox 2"),
];

/// Creation time of all presets: the first day of 2026.
const CREATED_AT: Duration = Duration::from_hours(24 * 20_454);

/// Returns the elements or voices that an endpoint lists.
pub(super) fn of(endpoint: &'static Endpoint, now: Instant) -> Vec<Task> {
    let preset = |&(id, name): &(u64, &str)| {
        let fields = ["element_name", "element_description", "voice_name"];
        let request = CreateRequest {
            echo: fields
                .map(|field| (field.to_owned(), json!(name)))
                .into_iter()
                .collect(),
            ..CreateRequest::default()
        };
        Task::preset(endpoint, id, request, CREATED_AT, now)
    };
    PRESETS.iter().map(preset).collect()
}

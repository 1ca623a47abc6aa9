//! A task as `/_proxy/tasks`, events and the command `tasks` show it.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde::{Serialize, Serializer};

use super::record::{RefusedCreate, TaskError, TaskRecord, TaskResult, Timestamp};
use super::state::TaskState;
use super::store::{Cursor, ListQuery, Page};
use crate::kling::service_code;

/// One task. The members and their order are a public interface, which `docs/tasks.md` describes.
#[derive(Serialize)]
pub struct TaskView<'a> {
    r#ref: &'a str,
    id: Option<&'a str>,
    external_id: Option<&'a str>,
    request_id: &'a str,
    upstream_request_id: Option<&'a str>,
    account: &'a str,
    client: Option<&'a str>,
    path: &'a str,
    model: Option<&'a str>,
    #[serde(serialize_with = "as_text")]
    status: TaskState,
    /// Place in the queue. Creates do not wait for slots yet.
    queue: Option<QueueView>,
    error: Option<ErrorView<'a>>,
    units: Option<String>,
    estimated_units: Option<String>,
    #[serde(serialize_with = "as_text")]
    created_at: Timestamp,
    #[serde(serialize_with = "maybe_as_text")]
    sent_at: Option<Timestamp>,
    #[serde(serialize_with = "maybe_as_text")]
    ended_at: Option<Timestamp>,
    results: Vec<ResultView<'a>>,
}

/// A page of a list.
#[derive(Serialize)]
pub struct PageView<'a> {
    tasks: Vec<TaskView<'a>>,
    next_cursor: Option<String>,
}

#[derive(Serialize)]
struct QueueView {
    position: u64,
    eta_seconds: u64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum ErrorView<'a> {
    Refused(RefusedView<'a>),
    Failed { message: &'a str },
}

/// The members of `error` in an error response, with code and message.
#[derive(Serialize)]
struct RefusedView<'a> {
    code: i64,
    message: &'a str,
    r#type: &'a str,
    source: &'static str,
    upstream_status: Option<u16>,
    definition: &'static str,
    explanation: &'static str,
    solution: &'static str,
    retryable: bool,
    attempts: u32,
}

#[derive(Serialize)]
struct ResultView<'a> {
    kind: &'a str,
    index: u32,
    url: &'a str,
    #[serde(serialize_with = "maybe_as_text")]
    expires_at: Option<Timestamp>,
    /// Path of the proxy's own copy. Results are not stored yet.
    stored: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    watermarked: bool,
}

/// Error for a query that is not understood. The text names the parameter.
#[derive(Debug, PartialEq, Eq)]
pub struct BadQuery(pub &'static str);

/// Tasks of a page, if the query names no number.
const USUAL_LIMIT: usize = 50;
/// Most tasks of a page.
pub const MOST: usize = 500;

// === impl TaskView ===

impl<'a> From<&'a TaskRecord> for TaskView<'a> {
    fn from(record: &'a TaskRecord) -> Self {
        Self {
            r#ref: record.reference.as_str(),
            id: record.task_id.as_deref(),
            external_id: record.external_id.as_deref(),
            request_id: &record.request_id,
            upstream_request_id: record.upstream_request_id.as_deref(),
            account: &record.account,
            client: Some(&*record.client).filter(|client| !client.is_empty()),
            path: &record.path,
            model: record.order.model.as_deref(),
            status: record.state,
            queue: None,
            error: record.error.as_ref().map(ErrorView::from),
            units: record.units.map(|units| units.to_string()),
            estimated_units: record.reserved.map(|units| units.to_string()),
            created_at: record.created_at,
            sent_at: record.sent_at,
            ended_at: record.ended_at,
            results: record.results.iter().map(ResultView::from).collect(),
        }
    }
}

// === impl PageView ===

impl PageView<'_> {
    /// Returns a page without tasks.
    pub fn empty() -> Self {
        Self {
            tasks: Vec::new(),
            next_cursor: None,
        }
    }
}

impl<'a> From<&'a Page> for PageView<'a> {
    fn from(page: &'a Page) -> Self {
        Self {
            tasks: page.tasks.iter().map(TaskView::from).collect(),
            next_cursor: page.next.map(|Cursor(place)| place.to_string()),
        }
    }
}

impl<'a> From<&'a TaskError> for ErrorView<'a> {
    fn from(error: &'a TaskError) -> Self {
        match error {
            TaskError::Failed { message } => Self::Failed { message },
            TaskError::Refused(refusal) => Self::Refused(RefusedView::from(&**refusal)),
        }
    }
}

impl<'a> From<&'a RefusedCreate> for RefusedView<'a> {
    fn from(refusal: &'a RefusedCreate) -> Self {
        let row = service_code::find(refusal.code)
            .unwrap_or_else(|| service_code::sent_by_kling(refusal.code));
        Self {
            code: refusal.code,
            message: &refusal.message,
            r#type: &refusal.kind,
            source: row.source(),
            upstream_status: refusal.upstream_status,
            definition: row.definition,
            explanation: row.explanation,
            solution: row.solution,
            retryable: refusal.retryable,
            attempts: refusal.attempts,
        }
    }
}

impl<'a> From<&'a TaskResult> for ResultView<'a> {
    fn from(result: &'a TaskResult) -> Self {
        Self {
            kind: &result.kind,
            index: result.index,
            url: &result.url,
            expires_at: result.expires_at,
            stored: None,
            watermarked: result.watermarked,
        }
    }
}

// === impl ListQuery ===

impl ListQuery {
    /// Reads the query of `GET /_proxy/tasks`. Ages are counted back from `now`.
    ///
    /// # Errors
    ///
    /// A parameter is unknown, is there twice, or has a value that is not valid.
    pub fn of_request(query: &str, now: Timestamp) -> Result<Self, BadQuery> {
        let mut read = Self {
            limit: USUAL_LIMIT,
            ..Self::default()
        };
        let mut names = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if names.contains(&name) {
                return Err(BadQuery("a parameter is there twice"));
            }
            names.push(name);
            let value = decode(value).ok_or(BadQuery("a value is not UTF-8"))?;
            if value.is_empty() {
                continue;
            }
            let text = || Some(value.clone().into_owned());
            match name {
                "status" => {
                    let state = TaskState::from_word(&value);
                    read.state = Some(state.ok_or(BadQuery("status: no such state"))?);
                }
                "model" => read.model = text(),
                "client" => read.client = text(),
                "account" => read.account = text(),
                "request_id" => read.request_id = text(),
                "since" => read.since = Some(time(&value, now).ok_or(BadQuery(SINCE))?),
                "until" => read.until = Some(time(&value, now).ok_or(BadQuery(UNTIL))?),
                "limit" => {
                    let limit = value
                        .parse()
                        .ok()
                        .filter(|limit| (1..=MOST).contains(limit));
                    read.limit = limit.ok_or(BadQuery("limit: want 1 to 500"))?;
                }
                "cursor" => {
                    let place = value
                        .parse()
                        .map_err(|_| BadQuery("cursor: not one of ours"))?;
                    read.cursor = Some(Cursor(place));
                }
                _ => return Err(BadQuery("a parameter is unknown")),
            }
        }
        Ok(read)
    }
}

const SINCE: &str = "since: want a time such as 2026-11-30T20:00:00Z, or an age such as 24h";
const UNTIL: &str = "until: want a time such as 2026-11-30T20:00:00Z, or an age such as 24h";

/// Reads a time in RFC 3339, or an age.
pub fn time(text: &str, now: Timestamp) -> Option<Timestamp> {
    if let Ok(age) = humantime::parse_duration(text) {
        return Some(now.before(age));
    }
    let time: jiff::Timestamp = text.parse().ok()?;
    Some(Timestamp(time.as_millisecond()))
}

/// Decodes a value of a query.
fn decode(value: &str) -> Option<Cow<'_, str>> {
    let spaced = value.replace('+', " ");
    let decoded = percent_decode_str(&spaced).decode_utf8().ok()?;
    Some(Cow::Owned(decoded.into_owned()))
}

fn as_text<S: Serializer>(value: &impl std::fmt::Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

#[expect(clippy::ref_option, reason = "the form that serde asks for")]
fn maybe_as_text<S: Serializer>(value: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => to.collect_str(value),
        None => to.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::kling::task::Order;
    use crate::tasks::record::TaskRef;
    use crate::tasks::units::Units;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn record() -> TaskRecord {
        TaskRecord {
            reference: TaskRef::stored("t_1".to_owned()),
            change: 7,
            state: TaskState::Succeeded,
            account: "default".to_owned(),
            client: String::new(),
            request_id: "r".to_owned(),
            upstream_request_id: Some("u".to_owned()),
            task_id: Some("8".to_owned()),
            external_id: None,
            family: Some("text-to-video/*".to_owned()),
            path: "/text-to-video/kling-3.0".to_owned(),
            order: Order {
                model: Some("kling-3.0".to_owned()),
                ..Order::default()
            },
            pool: None,
            weight: 1,
            place: None,
            reserved: None,
            units: Some(Units(2_500_000)),
            request_digest: Some(vec![1]),
            key_digest: Some(vec![2]),
            created_at: NOW,
            sent_at: Some(NOW),
            ended_at: None,
            error: None,
            results: vec![TaskResult {
                kind: "video".to_owned(),
                index: 0,
                url: "https://a/v.mp4".to_owned(),
                expires_at: Some(NOW),
                watermarked: false,
            }],
        }
    }

    #[test]
    fn task_is_shown_with_all_its_members() {
        let shown = serde_json::to_value(TaskView::from(&record())).unwrap();
        let expected = json!({
            "ref": "t_1", "id": "8", "external_id": null, "request_id": "r", "upstream_request_id": "u",
            "account": "default", "client": null, "path": "/text-to-video/kling-3.0", "model": "kling-3.0",
            "status": "succeeded", "queue": null, "error": null, "units": "2.5", "estimated_units": null,
            "created_at": "2027-01-15T08:00:00Z", "sent_at": "2027-01-15T08:00:00Z", "ended_at": null,
            "results": [{
                "kind": "video", "index": 0, "url": "https://a/v.mp4",
                "expires_at": "2027-01-15T08:00:00Z", "stored": null,
            }],
        });
        assert_eq!(shown, expected);
    }

    #[test]
    fn refused_create_shows_the_advice_of_its_code() {
        let refusal = RefusedCreate {
            code: 1102,
            kind: "resource_pack_depleted".to_owned(),
            message: "Account balance not enough".to_owned(),
            upstream_status: Some(429),
            retryable: false,
            attempts: 1,
        };
        let error = TaskError::Refused(Box::new(refusal));
        let shown = serde_json::to_value(ErrorView::from(&error)).unwrap();
        assert_eq!(shown["code"], 1102);
        assert_eq!(shown["source"], "upstream");
        assert_eq!(
            shown["solution"],
            service_code::sent_by_kling(1102).solution
        );
        let failed = TaskError::Failed {
            message: "risk".to_owned(),
        };
        let shown = serde_json::to_value(ErrorView::from(&failed)).unwrap();
        assert_eq!(shown, json!({ "message": "risk" }));
    }

    #[test]
    fn query_of_a_list_is_read() {
        let usual = ListQuery {
            limit: 50,
            ..ListQuery::default()
        };
        for (query, read) in [
            ("", Ok(usual.clone())),
            (
                "status=failed&model=kling%2Dv2&client=a+b&limit=500&cursor=9",
                Ok(ListQuery {
                    state: Some(TaskState::Failed),
                    model: Some("kling-v2".to_owned()),
                    client: Some("a b".to_owned()),
                    limit: 500,
                    cursor: Some(Cursor(9)),
                    ..usual.clone()
                }),
            ),
            (
                "since=24h&until=2027-01-15T08:00:00Z&account=default&request_id=r",
                Ok(ListQuery {
                    since: Some(NOW.before(Duration::from_hours(24))),
                    until: Some(NOW),
                    account: Some("default".to_owned()),
                    request_id: Some("r".to_owned()),
                    ..usual.clone()
                }),
            ),
            (
                "until=2027-01-15T16:00:00%2B08:00",
                Ok(ListQuery {
                    until: Some(NOW),
                    ..usual.clone()
                }),
            ),
            ("status=&model=", Ok(usual)),
            ("status=done", Err(BadQuery("status: no such state"))),
            ("limit=0", Err(BadQuery("limit: want 1 to 500"))),
            ("limit=501", Err(BadQuery("limit: want 1 to 500"))),
            ("since=yesterday", Err(BadQuery(SINCE))),
            ("cursor=x", Err(BadQuery("cursor: not one of ours"))),
            (
                "model=a&model=b",
                Err(BadQuery("a parameter is there twice")),
            ),
            ("model=%ff", Err(BadQuery("a value is not UTF-8"))),
            ("page=2", Err(BadQuery("a parameter is unknown"))),
        ] {
            assert_eq!(ListQuery::of_request(query, NOW), read, "{query}");
        }
    }
}

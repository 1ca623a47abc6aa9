//! Query of a list with cursors.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::create_request::invalid;
use super::listing::{Filtered, Listing};
use super::reply::Refusal;
use super::task::Task;
use super::task_view::milliseconds;
use super::tasks::Tasks;

/// Time range, cursor, limit and filters of one page.
#[derive(Debug)]
pub(super) struct ListQuery<'a> {
    /// Range of creation times, in ms. The end is excluded.
    pub(super) times: (u64, u64),
    pub(super) after: Option<&'a str>,
    pub(super) limit: usize,
    filters: Vec<(Filtered, &'a [Value])>,
}

const LARGEST_LIMIT: u64 = 500;

const DEFAULT_SPAN: Duration = Duration::from_hours(30 * 24);

// === impl ListQuery ===

impl<'a> ListQuery<'a> {
    /// Reads the query in a body. `time` is the time by the sandbox's clock.
    ///
    /// # Errors
    ///
    /// 1201 if a value is missing or illegal.
    pub(super) fn read(
        listing: &Listing,
        body: &'a Value,
        time: Duration,
    ) -> Result<Self, Refusal> {
        let after = match &body["cursor"] {
            Value::Null => None,
            Value::String(cursor) => Some(cursor.as_str()).filter(|cursor| !cursor.is_empty()),
            value => return Err(invalid("cursor", value)),
        };
        let times = match after {
            Some(_) => (0, u64::MAX),
            None => times(listing, body, time)?,
        };
        let limit = match number(body, "limit")? {
            None => listing.default_limit,
            Some(limit) if limit <= LARGEST_LIMIT => usize::try_from(limit).unwrap_or(1).max(1),
            Some(_) => return Err(invalid("limit", &body["limit"])),
        };
        Ok(Self {
            times,
            after,
            limit,
            filters: filters(listing, body)?,
        })
    }

    /// Returns true if the task matches a value of each filter. A filter without values matches every task, as
    /// in Kling's example. `succeed`, the word of solutions, also matches success.
    pub(super) fn passes(&self, tasks: &Tasks, task: &Task, now: Instant) -> bool {
        self.filters.iter().all(|(filtered, values)| {
            let actual = filtered(tasks, task, now);
            let is_it =
                |value: &Value| value == actual || (actual == "succeeded" && value == "succeed");
            values.is_empty() || values.iter().any(is_it)
        })
    }
}

fn times(listing: &Listing, body: &Value, time: Duration) -> Result<(u64, u64), Refusal> {
    let required = |name: &str, default: u64| match number(body, name)? {
        Some(time) => Ok(time),
        None if listing.is_ledger => Err(Refusal::parameter(format!("{name} is required"))),
        None => Ok(default),
    };
    // Tasks created in this very millisecond are included.
    let end = required("end_time", milliseconds(time) + 1)?;
    let start = required("start_time", end.saturating_sub(milliseconds(DEFAULT_SPAN)))?;
    if start >= end {
        return Err(Refusal::parameter(
            "start_time must be earlier than end_time",
        ));
    }
    Ok((start, end))
}

fn filters<'a>(
    listing: &Listing,
    body: &'a Value,
) -> Result<Vec<(Filtered, &'a [Value])>, Refusal> {
    let filters = match &body["filters"] {
        Value::Null => &[][..],
        Value::Array(filters) => filters,
        value => return Err(invalid("filters", value)),
    };
    let read = |filter: &'a Value| {
        let (key, values) = (&filter["key"], &filter["values"]);
        let known = listing.filters.iter().find(|(name, _)| key == name);
        let (_, filtered) = known.ok_or_else(|| invalid("filters.key", key))?;
        let values = values
            .as_array()
            .ok_or_else(|| invalid("filters.values", values))?;
        Ok((*filtered, values.as_slice()))
    };
    filters.iter().map(read).collect()
}

/// Returns an optional whole number, which clients also send as text (measured).
fn number(body: &Value, name: &str) -> Result<Option<u64>, Refusal> {
    let value = &body[name];
    let number = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.parse().ok(),
        // Documented for the limit: a number below the minimum counts as the minimum.
        value => value.as_u64().or_else(|| value.as_i64().map(|_| 0)),
    };
    number.map(Some).ok_or_else(|| invalid(name, value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox::listing::{BALANCE, PACKAGE, SOLUTIONS, TASKS};

    #[test]
    fn an_illegal_page_is_refused_with_1201_and_named() {
        for (listing, body, message) in [
            (
                &TASKS,
                json!({ "limit": 501 }),
                "limit value '501' is invalid",
            ),
            (
                &TASKS,
                json!({ "limit": "many" }),
                "limit value 'many' is invalid",
            ),
            (
                &TASKS,
                json!({ "start_time": 1.5 }),
                "start_time value '1.5' is invalid",
            ),
            (
                &TASKS,
                json!({ "cursor": 1 }),
                "cursor value '1' is invalid",
            ),
            (
                &TASKS,
                json!({ "start_time": 2, "end_time": 2 }),
                "start_time must be earlier than end_time",
            ),
            (
                &TASKS,
                json!({ "filters": {} }),
                "filters value '{}' is invalid",
            ),
            (
                &TASKS,
                json!({ "filters": [{ "key": "model", "values": [] }] }),
                "filters.key value 'model' is invalid",
            ),
            (
                &SOLUTIONS,
                json!({ "filters": [{ "key": "status", "values": "failed" }] }),
                "filters.values value 'failed' is invalid",
            ),
            (&PACKAGE, json!({ "start_time": 1 }), "end_time is required"),
            (&BALANCE, json!({ "end_time": 1 }), "start_time is required"),
        ] {
            let refusal = ListQuery::read(listing, &body, Duration::from_secs(1)).unwrap_err();
            assert_eq!(refusal, Refusal::parameter(message), "{body}");
        }
    }
}

//! Serves the lists of the new standard: tasks by their ids, or page by page from a cursor.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::create_request::invalid;
use super::list_query::ListQuery;
use super::listing::Listing;
use super::reply::Refusal;
use super::task::Task;
use super::task_view::milliseconds;
use super::tasks::Tasks;

/// Page of a list of tasks.
#[derive(Debug)]
pub(super) struct Page<'a> {
    pub(super) tasks: Vec<&'a Task>,
    /// Id of the last task on the page; empty on the last page.
    pub(super) next_cursor: String,
    pub(super) has_more: bool,
}

/// Most ids in a query. Measured, like the refusal of more; documented for `/solutions`.
const MOST_IDS: usize = 20;

// === impl Listing ===

impl Listing {
    /// Returns the tasks that a query names, in its order. Unknown ids are left out (measured).
    ///
    /// # Errors
    ///
    /// 1201 unless the query has ids of exactly one kind, and at most 20.
    pub(super) fn by_ids<'a>(
        &self,
        tasks: &'a Tasks,
        parameters: &HashMap<String, String>,
    ) -> Result<Vec<&'a Task>, Refusal> {
        let ids = |name| {
            parameters
                .get(name)
                .map(String::as_str)
                .filter(|ids| !ids.is_empty())
        };
        let (ids, is_it): (&str, fn(&Task, &str) -> bool) =
            match (ids("task_ids"), ids("external_task_ids")) {
                (Some(ids), None) => (ids, |task, id| id.parse() == Ok(task.id)),
                (None, Some(ids)) => (ids, Task::is_called),
                _ => {
                    let message = "exactly one of task_ids and external_task_ids is required";
                    return Err(Refusal::parameter(message));
                }
            };
        if ids.split(',').count() > MOST_IDS {
            let message = "task_ids and external_task_ids cannot exceed 20 in total";
            return Err(Refusal::parameter(message));
        }
        let find = |id: &str| {
            let mut tasks = tasks.newest().filter(|task| (self.includes)(task));
            tasks.find(|task| is_it(task, id.trim()))
        };
        Ok(ids.split(',').filter_map(find).collect())
    }

    /// Returns the page that a body asks for, newest first (guessed). `time` is the time by the
    /// sandbox's clock, and ages are counted up to `now`.
    ///
    /// # Errors
    ///
    /// 1201 if a value is missing or illegal.
    pub(super) fn page<'a>(
        &self,
        tasks: &'a Tasks,
        body: &Value,
        time: Duration,
        now: Instant,
    ) -> Result<Page<'a>, Refusal> {
        let query = ListQuery::read(self, body, time)?;
        let (start, end) = query.times;
        let mut rest: Box<dyn Iterator<Item = &Task>> = if self.is_ledger {
            Box::new(tasks.deducted())
        } else {
            Box::new(tasks.newest())
        };
        if let Some(cursor) = query.after {
            let id = cursor.parse().ok();
            // The next page begins after this task, even if tasks were created since.
            rest.find(|task| Some(task.id) == id)
                .ok_or_else(|| invalid("cursor", &body["cursor"]))?;
        }
        let mut found = rest.filter(|task| {
            (self.includes)(task)
                && (start..end).contains(&milliseconds(task.created_at))
                && query.passes(tasks, task, now)
        });
        let tasks: Vec<_> = found.by_ref().take(query.limit).collect();
        let has_more = found.next().is_some();
        let last = tasks.last().filter(|_| has_more);
        Ok(Page {
            next_cursor: last.map(|task| task.id.to_string()).unwrap_or_default(),
            tasks,
            has_more,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::sandbox::Options;
    use crate::sandbox::create_request::CreateRequest;
    use crate::sandbox::endpoints::tests::endpoint;
    use crate::sandbox::listing::{BALANCE, PACKAGE, SOLUTIONS, TASKS};
    use crate::sandbox::tests::options;

    const TIME: Duration = Duration::from_hours(500_000);

    /// Creates one task per second on these endpoints, the last one at `TIME`. Also returns the instant of
    /// `TIME`.
    fn tasks(paths: &[&str]) -> (Tasks, Instant) {
        let mut tasks = Tasks::new(&Options {
            task_time: Duration::from_secs(1),
            concurrency: 10,
            ..options()
        });
        let now = Instant::now();
        for (index, path) in paths.iter().enumerate() {
            let body = json!({
                "prompt": if index == 0 { "sandbox:failed" } else { "a" },
                "human_image": "AA",
                "external_task_id": format!("mine-{index}"),
                "options": { "external_task_id": format!("mine-{index}") },
                "contents": [
                    { "type": "avatar_id", "text": "a" },
                    { "type": "speech_script", "text": "a" },
                ],
            });
            let request =
                CreateRequest::parse(endpoint(path), body.to_string().as_bytes()).unwrap();
            let age = Duration::from_secs((paths.len() - 1 - index) as u64);
            let created = now.checked_sub(age).unwrap();
            tasks
                .create(
                    endpoint(path),
                    request,
                    TIME.checked_sub(age).unwrap(),
                    created,
                )
                .unwrap();
        }
        tasks.settle(now);
        (tasks, now)
    }

    fn names<'a>(tasks: impl IntoIterator<Item = &'a &'a Task>) -> Vec<&'a str> {
        let name = |task: &&'a Task| task.request.external_id.as_deref().unwrap();
        tasks.into_iter().map(name).collect()
    }

    const ALL: &[&str] = &[
        "text2video",
        "generations",
        "/text-to-video/{model}",
        "talking_agent",
        "kolors-virtual-try-on",
    ];

    #[test]
    fn tasks_are_found_by_ids_of_one_sort_and_at_most_20() {
        let (tasks, _) = tasks(ALL);
        let ask = |listing: &Listing, pairs: &[(&str, &str)]| {
            let owned = pairs
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()));
            let found = listing.by_ids(&tasks, &owned.collect());
            found
                .map(|tasks| names(&tasks).join(","))
                .map_err(|refusal| refusal.message)
        };
        let id = tasks.newest().nth(4).unwrap().id.to_string();
        let most = vec!["1"; 20].join(",");
        let one_too_many = vec!["1"; 21].join(",");
        let which = Err("exactly one of task_ids and external_task_ids is required".to_owned());
        let too_many = Err("task_ids and external_task_ids cannot exceed 20 in total".to_owned());
        for (listing, parameters, expected) in [
            (
                &TASKS,
                &[("external_task_ids", "mine-2,mine-0")][..],
                Ok("mine-2,mine-0".to_owned()),
            ),
            (&TASKS, &[("task_ids", &id)], Ok("mine-0".to_owned())),
            (&TASKS, &[("task_ids", "mine-0")], Ok(String::new())),
            (&TASKS, &[("task_ids", &most)], Ok(String::new())),
            (
                &TASKS,
                &[("external_task_ids", "mine-3")],
                Ok(String::new()),
            ),
            (
                &SOLUTIONS,
                &[("external_task_ids", "mine-3,mine-0")],
                Ok("mine-3".to_owned()),
            ),
            (&TASKS, &[("task_ids", &one_too_many)], too_many),
            (&TASKS, &[], which.clone()),
            (&TASKS, &[("task_ids", "")], which.clone()),
            (
                &TASKS,
                &[("task_ids", "1"), ("external_task_ids", "1")],
                which,
            ),
        ] {
            assert_eq!(ask(listing, parameters), expected, "{parameters:?}");
        }
    }

    #[test]
    fn a_page_is_what_was_created_in_the_time_and_passes_the_filters() {
        let (tasks, now) = tasks(ALL);
        let at = |seconds: u64| 1000 * (TIME.as_secs() - seconds);
        for (listing, body, expected) in [
            (
                &TASKS,
                json!({}),
                &["mine-4", "mine-2", "mine-1", "mine-0"][..],
            ),
            (&SOLUTIONS, json!({}), &["mine-3"]),
            (
                &TASKS,
                json!({ "start_time": at(2) }),
                &["mine-4", "mine-2"],
            ),
            (
                &TASKS,
                json!({ "end_time": at(2).to_string() }),
                &["mine-1", "mine-0"],
            ),
            (
                &TASKS,
                json!({ "start_time": at(4), "end_time": at(3) }),
                &["mine-0"],
            ),
            (&TASKS, json!({ "limit": 1 }), &["mine-4"]),
            (&TASKS, json!({ "limit": -1 }), &["mine-4"]),
            (
                &TASKS,
                json!({ "filters": [{ "key": "status", "values": ["failed"] }] }),
                &["mine-0"],
            ),
            (
                &TASKS,
                json!({ "filters": [{ "key": "product_type", "values": ["image", "try_on"] }] }),
                &["mine-4", "mine-1"],
            ),
            (
                &TASKS,
                json!({ "filters": [
                    { "key": "product_type", "values": ["video"] },
                    { "key": "status", "values": ["succeeded"] },
                ] }),
                &["mine-2"],
            ),
            (
                &TASKS,
                json!({ "filters": [
                    { "key": "product_type", "values": ["video"] },
                    { "key": "status", "values": [] },
                ] }),
                &["mine-2", "mine-0"],
            ),
            (
                &SOLUTIONS,
                json!({ "filters": [{ "key": "status", "values": ["succeed"] }] }),
                &["mine-3"],
            ),
            (
                &PACKAGE,
                json!({ "start_time": 0, "end_time": at(0), "filters": [
                    { "key": "product_type", "values": ["video", "try-on"] },
                ] }),
                &["mine-3", "mine-2"],
            ),
            (
                &PACKAGE,
                json!({ "start_time": 0, "end_time": at(0), "filters": [
                    { "key": "package_name", "values": ["Trial-Image-1000000Units-10Con-12Months"] },
                ] }),
                &["mine-1"],
            ),
            (
                &TASKS,
                json!({ "filters": [
                    { "key": "status", "values": ["submitted", "processing"] },
                    { "key": "product_type", "values": ["try_on"] },
                ] }),
                &["mine-4"],
            ),
            (&BALANCE, json!({ "start_time": 0, "end_time": at(0) }), &[]),
        ] {
            let page = listing.page(&tasks, &body, TIME, now).unwrap();
            assert_eq!(names(&page.tasks), expected, "{} {body}", listing.path);
        }
    }

    #[test]
    fn a_cursor_goes_on_where_its_page_ended() {
        let (tasks, now) = tasks(&["text2video"; 5]);
        let mut body = json!({ "limit": 2, "start_time": 0 });
        let mut pages = Vec::new();
        loop {
            let page = TASKS.page(&tasks, &body, TIME, now).unwrap();
            pages.push(names(&page.tasks).join(","));
            if !page.has_more {
                assert_eq!(page.next_cursor, "");
                break;
            }
            body["cursor"] = json!(page.next_cursor);
            body["start_time"] = json!("not looked at");
        }
        assert_eq!(pages, ["mine-4,mine-3", "mine-2,mine-1", "mine-0"]);
        let refusal = TASKS.page(&tasks, &json!({ "cursor": "1" }), TIME, now);
        assert_eq!(
            refusal.unwrap_err(),
            Refusal::parameter("cursor value '1' is invalid")
        );
    }
}

//! Lists of tasks that Kling has: paths, contents and filters.

use tokio::time::Instant;

use super::endpoints::EndpointKind;
use super::task::Task;
use super::tasks::Tasks;

/// List of tasks at a path.
pub(super) struct Listing {
    pub(super) path: &'static str,
    pub(super) includes: fn(&Task) -> bool,
    pub(super) filters: &'static [(&'static str, Filtered)],
    pub(super) default_limit: usize,
    /// True for a list of deductions, which has a task from its end on. Its first page needs a time range. The
    /// default of other lists is the last 30 days.
    pub(super) is_ledger: bool,
}

/// Returns the value that a filter compares.
pub(super) type Filtered = for<'a> fn(&'a Tasks, &'a Task, Instant) -> &'a str;

/// Kling's pages "Query Task" of the models and "查询任务" of the solutions. Guessed: neither list has tasks of
/// the other, and immediate results are in no list.
pub(super) static TASKS: Listing = Listing {
    path: "/tasks",
    includes: |task| {
        let kind = task.endpoint.kind;
        task.endpoint.has_tasks() && matches!(kind, EndpointKind::Tasks | EndpointKind::NewTasks)
    },
    filters: &[
        ("status", |_, task, now| task.status(now).name()),
        ("product_type", |_, task, _| task.endpoint.output.product()),
    ],
    default_limit: 100,
    is_ledger: false,
};

pub(super) static SOLUTIONS: Listing = Listing {
    path: "/solutions",
    includes: |task| task.endpoint.kind == EndpointKind::Solutions,
    filters: &[("status", |_, task, now| task.status(now).name())],
    default_limit: 500,
    ..TASKS
};

/// Kling's page "Unit Deduction Detail".
pub(super) static PACKAGE: Listing = Listing {
    path: "/account/billing/package",
    includes: |task| task.price() > 0,
    filters: &[
        ("api_key_name", |_, _, _| API_KEY_NAME),
        ("product_type", |_, task, _| product_type(task)),
        ("package_name", |tasks, task, _| {
            &tasks.packs.of(task.pack_type()).name
        }),
        ("package_id", |tasks, task, _| {
            tasks.packs.of(task.pack_type()).id
        }),
    ],
    default_limit: 500,
    is_ledger: true,
};

/// Kling's page "Balance Deduction Detail". The list is empty, because everything here is paid from a pack.
pub(super) static BALANCE: Listing = Listing {
    path: "/account/billing/balance",
    includes: |_| false,
    filters: &[("api_key_name", |_, _, _| API_KEY_NAME)],
    ..PACKAGE
};

pub(super) const API_KEY_NAME: &str = "sandbox";

/// Returns the product type of a task in the words of the ledger: the type of a pack, or `try-on`.
pub(super) fn product_type(task: &Task) -> &'static str {
    match task.endpoint.output.product() {
        "try_on" => "try-on",
        _ => task.pack_type().name(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::sandbox::create_request::CreateRequest;
    use crate::sandbox::endpoints::tests::endpoint;
    use crate::sandbox::tests::options;

    #[test]
    fn the_ledger_names_the_pack_that_paid_or_try_on() {
        let body = json!({
            "prompt": "a", "human_image": "AA", "text": "a", "voice_id": "1", "voice_language": "en",
        });
        for (path, expected) in [
            ("text2video", "video"),
            ("generations", "image"),
            ("kolors-virtual-try-on", "try-on"),
            ("tts", "video"),
        ] {
            let mut tasks = Tasks::new(&options());
            let request =
                CreateRequest::parse(endpoint(path), body.to_string().as_bytes()).unwrap();
            let task = tasks
                .create(endpoint(path), request, Duration::ZERO, Instant::now())
                .unwrap();
            assert_eq!(product_type(task), expected, "{path}");
        }
    }
}

//! Lists of tasks that Kling has: paths, contents and filters.

use tokio::time::Instant;

use super::endpoints::EndpointKind;
use super::task::Task;

/// List of tasks at a path.
pub(super) struct Listing {
    pub(super) path: &'static str,
    pub(super) includes: fn(&Task) -> bool,
    pub(super) filters: &'static [(&'static str, Filtered)],
    pub(super) default_limit: usize,
    /// True if the first page needs a time range. The default of lists other than the ledgers is the last
    /// 30 days.
    pub(super) needs_times: bool,
}

/// Returns the value that a filter compares.
pub(super) type Filtered = fn(&Task, Instant) -> &'static str;

/// Kling's pages "Query Task" of the models and "查询任务" of the solutions. Guessed: neither list has tasks of
/// the other, and immediate results are in no list.
pub(super) static TASKS: Listing = Listing {
    path: "/tasks",
    includes: |task| {
        let kind = task.endpoint.kind;
        task.endpoint.has_tasks() && matches!(kind, EndpointKind::Tasks | EndpointKind::NewTasks)
    },
    filters: &[
        ("status", |task, now| task.status(now).name()),
        ("product_type", |task, _| task.endpoint.output.product()),
    ],
    default_limit: 100,
    needs_times: false,
};

pub(super) static SOLUTIONS: Listing = Listing {
    path: "/solutions",
    includes: |task| task.endpoint.kind == EndpointKind::Solutions,
    filters: &[("status", |task, now| task.status(now).name())],
    default_limit: 500,
    ..TASKS
};

/// Kling's page "Unit Deduction Detail".
pub(super) static PACKAGE: Listing = Listing {
    path: "/account/billing/package",
    includes: |task| task.price() > 0,
    filters: &[
        ("api_key_name", |_, _| API_KEY_NAME),
        ("product_type", |task, _| product_type(task)),
        ("package_name", |_, _| PACK_NAME),
        ("package_id", |_, _| PACK_ID),
    ],
    default_limit: 500,
    needs_times: true,
};

/// Kling's page "Balance Deduction Detail". The list is empty, because everything here is paid from a pack.
pub(super) static BALANCE: Listing = Listing {
    path: "/account/billing/balance",
    includes: |_| false,
    filters: &[("api_key_name", |_, _| API_KEY_NAME)],
    ..PACKAGE
};

pub(super) const API_KEY_NAME: &str = "sandbox";
pub(super) const PACK_NAME: &str = "Sandbox";
pub(super) const PACK_ID: &str = "00000000000000000000000000000000";

/// Returns the product type of a task in the words of the ledger.
pub(super) fn product_type(task: &Task) -> &'static str {
    match task.endpoint.output.product() {
        "try_on" => "try-on",
        product => product,
    }
}

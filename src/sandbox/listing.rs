//! The lists of tasks that Kling has: paths, contents, filters.

use tokio::time::Instant;

use super::endpoints::EndpointKind;
use super::task::Task;

/// A path that lists tasks.
pub(super) struct Listing {
    pub(super) path: &'static str,
    pub(super) includes: fn(&Task) -> bool,
    pub(super) filters: &'static [(&'static str, Filtered)],
    pub(super) default_limit: usize,
    /// Whether a first page must say of which time; all but the ledgers take the last 30 days then.
    pub(super) needs_times: bool,
}

/// What a filter looks at.
pub(super) type Filtered = fn(&Task, Instant) -> &'static str;

/// Pages "Query Task" of the models and "查询任务" of the solutions. Guessed: that neither shows the other's, and
/// that what is answered at once is in none.
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

/// Page "Unit Deduction Detail".
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

/// Page "Balance Deduction Detail". Everything here is paid from a pack.
pub(super) static BALANCE: Listing = Listing {
    path: "/account/billing/balance",
    includes: |_| false,
    filters: &[("api_key_name", |_, _| API_KEY_NAME)],
    ..PACKAGE
};

pub(super) const API_KEY_NAME: &str = "sandbox";
pub(super) const PACK_NAME: &str = "Sandbox";
pub(super) const PACK_ID: &str = "00000000000000000000000000000000";

/// How the ledger calls the sort of product.
pub(super) fn product_type(task: &Task) -> &'static str {
    match task.endpoint.output.product() {
        "try_on" => "try-on",
        product => product,
    }
}

//! The memory of the proxy: each create, its task, and what became of it.
//!
//! | file | holds |
//! | --- | --- |
//! | `state.rs` | the states of a task and the steps between them |
//! | `record.rs` | the record of one create |
//! | `store.rs` | the interface of a store; each method is one transaction |
//! | `sqlite/` | the store in SQLite |
//! | `place.rs` | the choice of the store, from `state.url` |
//! | `ledger.rs` | the queue of writes, and the thread that owns the store |
//! | `running.rs` | the tasks that run now, for the path of a poll |
//! | `view.rs` | a task as users see it |
//! | `waiting.rs` | the limit of the requests that wait |
//! | `create.rs` | the record of a create while its request is in flight |

pub mod create;
pub mod ledger;
pub mod place;
pub mod record;
mod running;
pub mod sqlite;
pub mod state;
pub mod store;
pub mod units;
pub mod view;
pub mod waiting;

/// Returns running tasks with these records, for tests.
#[cfg(test)]
pub fn running_for_tests(
    records: &[record::TaskRecord],
    now: record::Timestamp,
) -> Vec<std::sync::Arc<ledger::RunningTask>> {
    let running = running::RunningTasks::default();
    for record in records {
        running.update(record, now);
    }
    running.all()
}

//! The interface of the task store. Each method is one transaction.

use std::collections::BTreeMap;

use super::record::{TaskRecord, TaskRef, TaskResult, Timestamp};
use super::state::TaskState;
use super::units::Units;
use crate::kling::task_answer::AnsweredTask;

/// Remembers tasks. The methods block, so one thread of its own calls them all.
///
/// Every write may be repeated: the second time it changes nothing. So a write whose confirmation was lost
/// is simply written again.
pub trait Store: Send {
    /// Writes all entries, in order, in one transaction.
    ///
    /// # Errors
    ///
    /// Nothing was written, or the confirmation was lost. The same entries can be written later.
    fn write(&mut self, entries: &[Entry], now: Timestamp) -> Result<(), StoreError>;

    /// Writes something that changes nothing, to find out if the store takes writes.
    ///
    /// # Errors
    ///
    /// It does not.
    fn probe(&mut self) -> Result<(), StoreError>;

    /// Extends the leases of this process. Takes creates whose owner has not done so in time out of their
    /// state: `queued` becomes `canceled`, and `sending` becomes `unknown`.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    fn keep_leases(&mut self, now: Timestamp) -> Result<(), StoreError>;

    /// Gives the lease of an account's watcher to this process, unless another one holds it. Returns true
    /// if this process has it until the next call, which must come within [`LEASE`].
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    fn watch(&mut self, account: &str, now: Timestamp) -> Result<bool, StoreError>;

    /// Deletes tasks that ended before this time. Running tasks stay. Deletes a part at a time, and returns
    /// true if there is more to delete.
    ///
    /// # Errors
    ///
    /// Nothing was deleted.
    fn forget(&mut self, ended_before: Timestamp) -> Result<bool, StoreError>;

    /// Returns tasks whose last change is later than `change`, in the order of their changes, at most
    /// `limit`.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn changes_since(&mut self, change: u64, limit: usize) -> Result<Vec<TaskRecord>, StoreError>;

    /// Returns the number before the first change of this store. An earlier number is one of another store.
    fn oldest_change(&self) -> u64;

    /// Returns the number of the last change.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn newest_change(&mut self) -> Result<u64, StoreError>;

    /// Returns the task with this id: the proxy's own reference, else Kling's task id, else the external id.
    /// Of several tasks with one external id, it is the newest. `client` limits the search to one client.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn find(&mut self, id: &str, client: Option<&str>) -> Result<Option<TaskRecord>, StoreError>;

    /// Returns one page of a list, newest first.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn list(&mut self, query: &ListQuery) -> Result<Page, StoreError>;

    /// Returns the creates that became `unknown` since this time, newest first, at most `limit`.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn unknown(&mut self, since: Timestamp, limit: usize) -> Result<Vec<TaskRecord>, StoreError>;

    /// Returns the tasks that have not ended, and the creates that are `unknown`, oldest first, at most
    /// `limit`.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn unsettled(&mut self, limit: usize) -> Result<Vec<TaskRecord>, StoreError>;

    /// Counts tasks by state, and adds up their units. `client` limits this to one client.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn totals(&mut self, client: Option<&str>) -> Result<Totals, StoreError>;

    /// Returns true if other processes may use the same store.
    fn is_shared(&self) -> bool;
}

/// Longest time between two extensions of a lease, by the clock of the store.
pub const LEASE: std::time::Duration = std::time::Duration::from_secs(15);

/// One write to the store, which may be repeated.
#[derive(Clone, Debug)]
pub enum Entry {
    /// All that this process knows of one of its creates.
    Report(Box<TaskRecord>),
    /// News of a task in an answer from Kling.
    Seen(Box<Observation>),
    /// A task that was made without this proxy, as far as is known.
    Adopted(Box<TaskRecord>),
}

/// News of a task, as one of Kling's answers tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Name of the account that was asked.
    pub account: String,
    /// Kling's id of the task.
    pub task_id: String,
    pub external_id: Option<String>,
    /// The create that was looked up, if its answer was lost: it gets the task.
    pub of_create: Option<TaskRef>,
    pub state: TaskState,
    /// Reason for a failure.
    pub message: Option<String>,
    pub units: Option<Units>,
    pub results: Vec<TaskResult>,
    /// Time of the answer.
    pub at: Timestamp,
}

// === impl Entry ===

impl Entry {
    /// Returns the proxy's own id of the create, if the entry has it.
    pub fn reference(&self) -> Option<&str> {
        match self {
            Self::Report(record) | Self::Adopted(record) => Some(record.reference.as_str()),
            Self::Seen(_) => None,
        }
    }

    /// Returns Kling's id of the task, if the entry has it.
    pub fn task_id(&self) -> Option<&str> {
        match self {
            Self::Report(record) | Self::Adopted(record) => record.task_id.as_deref(),
            Self::Seen(seen) => Some(&seen.task_id),
        }
    }
}

// === impl Observation ===

impl Observation {
    /// Makes an observation of a task that an answer shows; `None` if its state is not one that is known.
    pub fn of(task: AnsweredTask, account: &str, at: Timestamp) -> Option<Self> {
        let state = TaskState::from_kling(&task.status)?;
        let parts: Result<Vec<Units>, _> = task.units.iter().map(|units| units.parse()).collect();
        let units = parts.ok().filter(|parts| !parts.is_empty());
        Some(Self {
            account: account.to_owned(),
            task_id: task.id,
            external_id: task.external_id,
            of_create: None,
            state,
            message: task.message.filter(|message| !message.is_empty()),
            units: units.map(|parts| Units(parts.iter().map(|units| units.0).sum())),
            results: task.files.into_iter().map(TaskResult::from).collect(),
            at,
        })
    }
}

/// Choice of tasks for a list. An empty choice takes all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    pub state: Option<TaskState>,
    pub model: Option<String>,
    pub client: Option<String>,
    pub account: Option<String>,
    pub request_id: Option<String>,
    pub key_digest: Option<Vec<u8>>,
    /// Earliest time of creation.
    pub since: Option<Timestamp>,
    /// Latest time of creation.
    pub until: Option<Timestamp>,
    /// Most tasks of the page.
    pub limit: usize,
    /// Place after which the page begins, from the page before.
    pub cursor: Option<Cursor>,
}

/// Place in the list of all tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(pub i64);

/// One page of a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub tasks: Vec<TaskRecord>,
    /// Place where the next page begins; `None` after the last one.
    pub next: Option<Cursor>,
}

/// Sums over all tasks, or over those of one client.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub by_state: BTreeMap<TaskState, u64>,
    /// Units that the tasks cost.
    pub units: Units,
}

/// Ways in which a store fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A newer version of the program has changed the store so that this one must not write to it.
    #[error(
        "{place} was made by a newer version of kling-proxy: version {found} of the store, and this \
         program knows {known}"
    )]
    TooNew {
        place: String,
        found: i64,
        known: i64,
    },
    /// The file is a database of another program.
    #[error("{0} is not a task store of kling-proxy")]
    NotOurs(String),
    /// The file is damaged, or is no database.
    #[error("{0} is damaged, or is no SQLite file")]
    Broken(String),
    /// The file or its folder must not be used.
    #[error("{0}")]
    Untrusted(String),
    /// The file or its folder cannot be opened.
    #[error("{place} cannot be opened: {cause}")]
    Closed { place: String, cause: String },
    /// The database failed while it ran, for example because the disk is full.
    #[error(transparent)]
    Failed(#[from] rusqlite::Error),
}

// === impl StoreError ===

impl StoreError {
    /// Returns true if the file itself is at fault: it is too new, damaged or not the proxy's.
    pub fn is_about_the_file(&self) -> bool {
        matches!(
            self,
            Self::TooNew { .. } | Self::NotOurs(_) | Self::Broken(_)
        )
    }
}

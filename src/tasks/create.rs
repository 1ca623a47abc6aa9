//! The record of a create while its request is in flight.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ledger::Ledger;
use super::record::{RefusedCreate, TaskError, TaskRecord, TaskRef};
use super::state::TaskState;
use crate::kling::family::{Family, Weight};
use crate::kling::task::{Order, Task, word};

/// Tells the store of one create: before it is sent, and when its outcome is known.
///
/// Of a create whose path is not in the family table, nothing is recorded before Kling answers with a task.
pub struct CreateRecord {
    ledger: Ledger,
    family: Option<&'static Family>,
    record: Mutex<TaskRecord>,
}

/// Slots of an image task whose number of images is not known.
const MOST_IMAGES: u32 = 9;

// === impl CreateRecord ===

impl CreateRecord {
    /// Starts the record of a create that has just arrived. Nothing is stored yet.
    pub fn new(ledger: Ledger, request_id: &str, path: &str) -> Self {
        let record = TaskRecord::new(request_id, path, ledger.now());
        Self {
            ledger,
            family: Family::of_create(path),
            record: Mutex::new(record),
        }
    }

    /// Returns the proxy's own id of the create; `None` if the path is not in the family table.
    pub fn reference(&self) -> Option<TaskRef> {
        self.family.map(|_| self.lock().reference.clone())
    }

    /// Records the create before its first byte is sent, and waits until the store has it. A store that
    /// fails delays a create for 500 ms at most, and does not stop it.
    pub async fn admit(&self, client: Option<&str>, order: Order, external_id: Option<&str>) {
        let number = {
            let mut record = self.lock();
            client.unwrap_or_default().clone_into(&mut record.client);
            record.external_id = external_id.map(str::to_owned);
            record.weight = self.family.map_or(1, |family| weight(family, &order));
            record.order = order;
            if let Some(model) = self.family.and_then(|family| family.model(&record.path)) {
                record.order.model = word(model.as_bytes());
            }
            if self.family.is_none() {
                return;
            }
            self.ledger.report(&record)
        };
        self.ledger.written(number).await;
    }

    /// Fills in what the rest of the body has shown.
    pub fn learn(&self, order: Order, external_id: Option<&str>) {
        let mut record = self.lock();
        if record.external_id.is_none() {
            record.external_id = external_id.map(str::to_owned);
        }
        record.weight = self.family.map_or(1, |family| weight(family, &order));
        let model = record.order.model.take();
        record.order = Order {
            model: model.or(order.model),
            ..order
        };
    }

    /// Records the time of the first byte.
    pub fn begin_sending(&self) {
        let now = self.ledger.now();
        self.lock().sent_at.get_or_insert(now);
    }

    /// Records the task that Kling has made.
    pub fn submitted(&self, task: &Task) {
        if task.id.is_none() {
            return self.unknown();
        }
        let status = task.status.as_deref().and_then(TaskState::from_kling);
        self.end(status.unwrap_or(TaskState::Submitted), None, |record| {
            record.task_id.clone_from(&task.id);
            record.upstream_request_id.clone_from(&task.request_id);
            if task.external_id.is_some() {
                record.external_id.clone_from(&task.external_id);
            }
        });
    }

    /// Records that there is no task: Kling refused the create, or nothing of it was sent.
    pub fn rejected(&self, refusal: RefusedCreate) {
        let error = TaskError::Refused(Box::new(refusal));
        self.end(TaskState::Rejected, Some(error), |_| {});
    }

    /// Records that the create was given up before it was sent.
    pub fn canceled(&self) {
        self.end(TaskState::Canceled, None, |_| {});
    }

    /// Records that a task may exist.
    pub fn unknown(&self) {
        self.end(TaskState::Unknown, None, |_| {});
    }

    fn end(&self, state: TaskState, error: Option<TaskError>, fill: impl FnOnce(&mut TaskRecord)) {
        let now = self.ledger.now();
        let mut record = self.lock();
        if !record.state.accepts(state) {
            return;
        }
        record.state = state;
        record.error = error;
        record.ended_at = state.is_ended().then_some(now);
        fill(&mut record);
        if self.family.is_some() || record.task_id.is_some() {
            self.ledger.report(&record);
        }
    }

    fn lock(&self) -> MutexGuard<'_, TaskRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the number of slots that a task takes.
fn weight(family: &Family, order: &Order) -> u32 {
    match (family.weight, &order.n) {
        (Weight::One, _) | (Weight::Images, None) => 1,
        (Weight::Images, Some(n)) => match n.parse() {
            Ok(n) if (1..=MOST_IMAGES).contains(&n) => n,
            _ => MOST_IMAGES,
        },
    }
}

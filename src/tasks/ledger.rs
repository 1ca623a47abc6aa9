//! The ledger: the queue of writes to the store, and the loop that owns the store.
//!
//! Requests never touch the store. They put an entry into the queue and go on; only a create waits until
//! its entry is written, and not for long. The loop takes all entries that wait and writes them in one
//! transaction. If that fails, the entries stay in the queue and are written later.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::record::{DEFAULT_ACCOUNT, TaskRecord, Timestamp};
use super::running::RunningTasks;
pub use super::running::{LostCreate, RunningTask};
use super::state::TaskState;
use super::store::{Entry, Observation, Store, StoreError};
use crate::clock::Clock;
use crate::kling::family::{Family, Pool};
use crate::kling::task_answer::AnsweredTask;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::printable;

/// The memory of this process, and its way to the store. All clones share one queue.
#[derive(Clone)]
pub struct Ledger(Arc<LedgerInner>);

struct LedgerInner {
    queue: Mutex<Queue>,
    /// Notified when the queue has something new.
    filled: Notify,
    /// Notified to end [`Ledger::run`], and when it has ended.
    ending: [Notify; 2],
    /// Number of entries that were written, or given up.
    written: watch::Sender<u64>,
    /// True while the store takes writes.
    is_up: AtomicBool,
    running: RunningTasks,
    /// True once a task was made, or was found running at the start.
    was_used: AtomicBool,
    /// Types of packs that tasks took from since the start.
    pools: Mutex<Vec<Pool>>,
    /// Tasks that have changed in the store, by this process or another one.
    changes: broadcast::Sender<Arc<TaskRecord>>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    /// Number of entries that ever entered the queue.
    entered: u64,
    reads: VecDeque<Read>,
}

/// Work that reads the store, and sends its result to whoever waits for it.
type Read = Box<dyn FnOnce(&mut dyn Store) + Send>;

/// The store does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store of tasks does not answer")]
pub struct Unavailable;

/// Longest time that a create waits until its entry is written.
const PATIENCE: Duration = Duration::from_millis(500);
/// Longest time that a look at tasks waits for the store.
const READ: Duration = Duration::from_secs(5);
/// Most reads that wait at once.
const MOST_READS: usize = 256;
/// Most entries that wait while the store fails.
const MOST_WAITING: usize = 10_000;
/// Most entries of one transaction.
const BATCH: usize = 256;
/// Time between two extensions of the leases of this process.
const LEASES: Duration = Duration::from_secs(5);
/// Time between two looks for changes that other processes made.
const OTHERS: Duration = Duration::from_secs(1);
/// Time between two deletions of old tasks.
const FORGET: Duration = Duration::from_mins(1);
/// Time between them while there is more to delete.
const FORGET_MORE: Duration = Duration::from_millis(100);
/// Waits before a write that failed is repeated: the first, and the longest. Each is double the last.
const AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];
/// Most changes that are read from the store at once.
const CHANGES: usize = 256;
/// Changes that a slow reader may be behind before it has to read them from the store.
const BEHIND: usize = 1024;
/// Most running tasks that are read at the start.
const MOST_RUNNING: usize = 100_000;

// === impl Ledger ===

impl Ledger {
    /// Makes a ledger. Nothing is stored until [`run`](Self::run) runs.
    pub fn new(clock: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        metrics.state_up(true);
        Self(Arc::new(LedgerInner {
            queue: Mutex::default(),
            filled: Notify::new(),
            ending: Default::default(),
            written: watch::Sender::new(0),
            is_up: AtomicBool::new(true),
            running: RunningTasks::default(),
            was_used: AtomicBool::new(false),
            pools: Mutex::default(),
            changes: broadcast::Sender::new(BEHIND),
            clock,
            metrics,
        }))
    }

    /// Makes a ledger whose store does not work, so that nobody waits for it.
    #[cfg(test)]
    pub fn without_store(metrics: Arc<Metrics>) -> Self {
        let ledger = Self::new(Arc::new(crate::clock::SystemClock), metrics);
        ledger.0.is_up.store(false, Relaxed);
        ledger
    }

    /// Returns the time now, by the clock of this machine.
    pub fn now(&self) -> Timestamp {
        self.0.clock.now().into()
    }

    /// Reports all that this process knows of a create. Returns the number of the entry.
    pub(super) fn report(&self, record: &TaskRecord) -> u64 {
        self.0.learn(record);
        self.enter(Entry::Report(Box::new(record.clone())))
    }

    /// Waits until the entry with this number is written, for 500 ms at most. If the store fails, it does
    /// not wait.
    pub(super) async fn written(&self, number: u64) {
        if !self.0.is_up.load(Relaxed) {
            return;
        }
        let mut written = self.0.written.subscribe();
        let is_up = &self.0.is_up;
        let wait = written.wait_for(|written| *written >= number || !is_up.load(Relaxed));
        if timeout(PATIENCE, wait).await.is_err() {
            self.fails(&"it did not answer in time");
        }
    }

    /// Finds a running task by Kling's id, or else by its external id.
    pub fn running(&self, id: &str) -> Option<Arc<RunningTask>> {
        self.0.running.find(id)
    }

    /// Finds a running task by Kling's id.
    pub fn running_by_id(&self, id: &str) -> Option<Arc<RunningTask>> {
        self.0.running.find_by_id(id)
    }

    /// Finds an unknown create by its external id.
    pub fn lost(&self, external_id: &str) -> Option<LostCreate> {
        self.0.running.find_lost(external_id)
    }

    /// Returns true if there is an unknown create with an external id.
    pub fn has_lost(&self) -> bool {
        self.0.running.has_lost()
    }

    /// Returns all running tasks that this process knows of.
    pub fn all_running(&self) -> Vec<Arc<RunningTask>> {
        self.0.running.all()
    }

    /// Returns true once a task was made, or was found running at the start.
    pub fn was_used(&self) -> bool {
        self.0.was_used.load(Relaxed)
    }

    /// Returns the types of packs that tasks took from since the start.
    pub fn pools_in_use(&self) -> Vec<Pool> {
        let pools = self.0.pools.lock();
        pools.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns true if this process knows of no running task, and of none that may run.
    pub fn is_idle(&self) -> bool {
        self.0.running.is_empty()
    }

    /// Takes note of an answer that shows a running task in this state, by Kling's word. Returns true if that is
    /// no news.
    pub fn knows(&self, task: &RunningTask, status: &str) -> bool {
        let is_same = TaskState::from_kling(status) == Some(task.news().state);
        is_same && !task.hear(task.news().state, self.now())
    }

    /// Takes note of what an answer from Kling says of a running task. The store is told if it is news.
    pub fn seen(&self, task: &RunningTask, seen: Observation) {
        if seen.state.is_ended() {
            self.0.running.remove(&task.task_id);
        }
        if task.hear(seen.state, seen.at) {
            self.enter(Entry::Seen(Box::new(seen)));
        }
    }

    /// Takes note of a task that a look-up has found, whatever is known of it here.
    pub fn found(&self, seen: Observation) {
        self.enter(Entry::Seen(Box::new(seen)));
    }

    /// Records a task that was made without this proxy.
    pub fn adopt(&self, family: &Family, task: AnsweredTask, request_id: &str) {
        let now = self.now();
        let created_at = task.created_at.map_or(now, Timestamp);
        let Some(seen) = Observation::of(task, DEFAULT_ACCOUNT, now) else {
            return;
        };
        let mut record = TaskRecord {
            created_at,
            ..TaskRecord::new(request_id, &family.path(), now)
        };
        record.observe(&seen);
        self.0.learn(&record);
        self.enter(Entry::Adopted(Box::new(record)));
    }

    /// Returns a stream of the tasks that change from now on.
    pub fn changes(&self) -> broadcast::Receiver<Arc<TaskRecord>> {
        self.0.changes.subscribe()
    }

    /// Reads the store.
    ///
    /// # Errors
    ///
    /// [`Unavailable`] if the store fails, or does not answer within 5 s.
    pub async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&mut dyn Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Unavailable> {
        let (sender, answer) = oneshot::channel();
        let read: Read = Box::new(move |store| {
            // The reader may have given up waiting.
            if !sender.is_closed() {
                let _ = sender.send(read(store));
            }
        });
        self.enter_read(read)?;
        match timeout(READ, answer).await {
            Ok(Ok(Ok(found))) => Ok(found),
            Ok(Ok(Err(error))) => {
                tracing::warn!(%error, "the store of tasks cannot be read");
                Err(Unavailable)
            }
            Ok(Err(_)) | Err(_) => Err(Unavailable),
        }
    }

    /// Waits until everything is written, and then closes the store, for at most `limit`.
    pub async fn close(&self, limit: Duration) {
        let entered = self.lock().entered;
        let mut written = self.0.written.subscribe();
        let [end, ended] = &self.0.ending;
        let all = async {
            let _ = written.wait_for(|written| *written >= entered).await;
            end.notify_one();
            ended.notified().await;
        };
        if timeout(limit, all).await.is_err() {
            tracing::warn!("not all tasks could be stored before the end");
        }
    }

    /// Runs the store: writes what enters the queue, keeps leases, notices what other processes change and
    /// deletes what is older than `keep`. Returns after [`close`](Self::close).
    pub async fn run(&self, mut store: Box<dyn Store>, keep: Duration) {
        let is_shared = store.is_shared();
        let mut store_loop = StoreLoop {
            ledger: self,
            store: &mut *store,
            batch: Vec::new(),
            again: None,
            seen: None,
        };
        let [mut leases, mut others, mut forget] = [LEASES, OTHERS, FORGET].map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        let [end, ended] = &self.0.ending;
        store_loop.publish();
        loop {
            let again = store_loop.again.map(|(at, _)| at);
            tokio::select! {
                () = end.notified() => break,
                () = self.0.filled.notified() => {}
                () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
                _ = leases.tick(), if is_shared => store_loop.keep_leases(),
                _ = others.tick(), if is_shared => {}
                _ = forget.tick() => {
                    if store_loop.forget(keep) {
                        forget.reset_after(FORGET_MORE);
                    }
                }
            }
            // A read sees what was entered before it, and delays no write by more than itself.
            loop {
                store_loop.write();
                store_loop.publish();
                let read = self.lock().reads.pop_front();
                match read {
                    Some(read) => read(store_loop.store),
                    None => break,
                }
            }
        }
        // SQLite tidies its files when the last process closes them.
        drop(store);
        ended.notify_one();
    }

    fn enter_read(&self, read: Read) -> Result<(), Unavailable> {
        let mut queue = self.lock();
        if queue.reads.len() >= MOST_READS {
            return Err(Unavailable);
        }
        queue.reads.push_back(read);
        drop(queue);
        self.0.filled.notify_one();
        Ok(())
    }

    fn enter(&self, entry: Entry) -> u64 {
        let mut queue = self.lock();
        queue.entered += 1;
        queue.entries.push_back(entry);
        if queue.entries.len() > MOST_WAITING {
            drop_one(&mut queue.entries);
            self.0.written.send_modify(|written| *written += 1);
        }
        let number = queue.entered;
        drop(queue);
        self.0.filled.notify_one();
        number
    }

    /// Records that the store fails, and says so once.
    fn fails(&self, cause: &dyn std::fmt::Display) {
        if self.0.is_up.swap(false, Relaxed) {
            self.0.metrics.state_up(false);
            // Creates no longer wait for the store.
            self.0.written.send_modify(|_| {});
            tracing::warn!(
                %cause,
                "the store of tasks fails; requests go on, and it is written later"
            );
        }
    }

    fn works(&self) {
        if !self.0.is_up.swap(true, Relaxed) {
            self.0.metrics.state_up(true);
            tracing::info!("the store of tasks works again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl LedgerInner ===

impl LedgerInner {
    /// Takes over what a record says of a running task.
    fn learn(&self, record: &TaskRecord) {
        self.running.update(record, self.clock.now().into());
        // An unknown create may have made a task.
        if record.state.is_running() || record.state == TaskState::Unknown {
            self.was_used.store(true, Relaxed);
            if let Some(pool) = record.pool {
                let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
                if !pools.contains(&pool) {
                    pools.push(pool);
                }
            }
        }
    }
}

/// Drops the oldest entry of an ended task, or else the oldest entry, and logs it.
fn drop_one(entries: &mut VecDeque<Entry>) {
    let is_ended = |entry: &Entry| match entry {
        Entry::Report(record) | Entry::Adopted(record) => record.state.is_ended(),
        Entry::Seen(seen) => seen.state.is_ended(),
    };
    let index = entries.iter().position(is_ended).unwrap_or(0);
    match entries.remove(index) {
        Some(Entry::Report(record) | Entry::Adopted(record)) => tracing::error!(
            task = record.reference.as_str(),
            task.id = record.task_id.as_deref().map(printable).as_deref(),
            state = record.state.as_str(),
            "the record of a task is lost: too many wait for the store"
        ),
        Some(Entry::Seen(seen)) => tracing::error!(
            task.id = &*printable(&seen.task_id),
            state = seen.state.as_str(),
            "news of a task is lost: too much waits for the store"
        ),
        None => {}
    }
}

/// The store and the writes that are under way, for [`Ledger::run`].
struct StoreLoop<'a> {
    ledger: &'a Ledger,
    store: &'a mut dyn Store,
    /// Entries that are being written.
    batch: Vec<Entry>,
    /// Time of the next try after a failure, and the wait before it.
    again: Option<(Instant, Duration)>,
    /// Number of the last change that was published; `None` before the first look.
    seen: Option<u64>,
}

// === impl StoreLoop ===

impl StoreLoop<'_> {
    /// Writes all entries that wait, in transactions of limited size.
    fn write(&mut self) {
        if self.again.is_some_and(|(at, _)| Instant::now() < at) {
            return;
        }
        loop {
            if self.batch.is_empty() {
                let mut queue = self.ledger.lock();
                let most = queue.entries.len().min(BATCH);
                self.batch.extend(queue.entries.drain(..most));
            }
            let written = if !self.batch.is_empty() {
                self.store.write(&self.batch, self.ledger.now())
            } else if self.again.is_some() {
                // Nothing waits, but it is unknown if the store works again.
                self.store.probe()
            } else {
                return;
            };
            if !self.has_succeeded(written) {
                return;
            }
            self.again = None;
            self.ledger.works();
            let count = self.batch.len() as u64;
            self.batch.clear();
            let written = &self.ledger.0.written;
            written.send_modify(|written| *written += count);
        }
    }

    /// Sends the changes since the last look to those who follow them.
    fn publish(&mut self) {
        // A store that cannot be read has failed a write as well, or will.
        let Ok(last) = self.store.newest_change() else {
            return;
        };
        let Some(mut seen) = self.seen else {
            if self.load_running() {
                self.seen = Some(last);
            }
            return;
        };
        while seen < last {
            let Ok(changed) = self.store.changes_since(seen, CHANGES) else {
                return;
            };
            let Some(newest) = changed.last() else {
                break;
            };
            seen = newest.change;
            self.seen = Some(seen);
            for record in changed {
                let ledger = &self.ledger.0;
                ledger.learn(&record);
                // Nobody may follow the changes.
                let _ = ledger.changes.send(Arc::new(record));
            }
        }
        self.seen = Some(last);
    }

    /// Learns the tasks that were running when the process started. Returns false if they cannot be read.
    fn load_running(&mut self) -> bool {
        let Ok(tasks) = self.store.unsettled(MOST_RUNNING) else {
            return false;
        };
        for record in tasks {
            self.ledger.0.learn(&record);
        }
        true
    }

    fn keep_leases(&mut self) {
        let kept = self.store.keep_leases(self.ledger.now());
        self.has_succeeded(kept);
    }

    /// Deletes a part of what is older than `keep`. Returns true if there is more.
    fn forget(&mut self, keep: Duration) -> bool {
        let before = self.ledger.now().before(keep);
        let mut has_more = false;
        let forgotten = self.store.forget(before).map(|more| has_more = more);
        self.has_succeeded(forgotten) && has_more
    }

    /// Takes note of the outcome of a transaction. Returns true if it succeeded. A transaction that may have
    /// had nothing to write does not show that the store works again.
    fn has_succeeded(&mut self, outcome: Result<(), StoreError>) -> bool {
        match outcome {
            Ok(()) => true,
            Err(error) => {
                let [first, longest] = AGAIN;
                let wait = self
                    .again
                    .map_or(first, |(_, wait)| (wait * 2).min(longest));
                self.again = Some((Instant::now() + wait, wait));
                self.ledger.fails(&error);
                false
            }
        }
    }
}

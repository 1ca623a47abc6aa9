//! The watcher: asks Kling for running tasks that no client asks for, and for the account's resource packs.
//!
//! A client may create a task and never ask for it again. The watcher still learns its end, its cost and its
//! results. Of all processes that share a store, one has the lease to watch.

mod packs;
mod schedule;

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use http::Uri;
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tower::Service;

use self::packs::Packs;
use self::schedule::Schedule;
use crate::auth::token::Tokens;
use crate::error::Error;
use crate::kling::family::Family;
use crate::kling::service_code::{self, Class};
use crate::kling::task_answer::{AnsweredTask, TaskPlace, TaskSplitter};
use crate::request::replayable::ReplayableRequest;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::{DEFAULT_ACCOUNT, SKEW, TaskRecord};
use crate::tasks::store::Observation;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::{CREATES, printable};

/// Asks Kling for what no client asks for. `S` sends reads with the proxy's credential.
pub struct Watcher<S> {
    reads: S,
    ledger: Ledger,
    tokens: Arc<Tokens>,
    metrics: Arc<Metrics>,
    schedule: Schedule,
    packs: Packs,
    is_turn_of_unknown: bool,
    /// Time of the next request, and the wait between two.
    next: Instant,
    pace: Duration,
    /// Time until which this process has the lease, by its own clock.
    leased_until: Option<Instant>,
}

/// Time between two looks at the schedule, and the shortest wait between two requests.
const PACE: Duration = Duration::from_secs(1);
/// Longest wait between two requests, after refusals for the rate.
const SLOWEST: Duration = Duration::from_mins(1);
/// Time between two extensions of the lease. The lease itself is longer.
const RENEW: Duration = Duration::from_secs(5);
/// Largest answer, in bytes: 20 tasks with their results.
const LARGEST: usize = 1 << 20;
/// Longest time of one request.
const LONGEST: Duration = Duration::from_mins(1);
/// Most unknown creates that are looked at.
const MOST_UNKNOWN: usize = 1000;

// === impl Watcher ===

impl<S> Watcher<S>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error>,
{
    /// Makes a watcher. Nothing is asked until [`run`](Self::run) runs.
    pub fn new(reads: S, ledger: Ledger, tokens: Arc<Tokens>, metrics: Arc<Metrics>) -> Self {
        Self {
            reads,
            ledger,
            tokens,
            packs: Packs::new(Arc::clone(&metrics)),
            metrics,
            schedule: Schedule::default(),
            is_turn_of_unknown: false,
            next: Instant::now(),
            pace: PACE,
            leased_until: None,
        }
    }

    /// Watches. Never returns.
    pub async fn run(mut self) {
        let mut ticks = interval(PACE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // The lease is kept also while requests are far apart.
            if self.ledger.was_used() && self.has_lease().await && Instant::now() >= self.next {
                self.step().await;
            }
        }
    }

    /// Sends at most one request. Unknown creates and running tasks take turns, so that neither waits for the
    /// other.
    async fn step(&mut self) {
        if self.packs.is_due(Instant::now()) {
            return self.read_packs().await;
        }
        self.is_turn_of_unknown = !self.is_turn_of_unknown;
        if self.is_turn_of_unknown && self.look_up_unknown().await {
            return;
        }
        let running = self.ledger.all_running();
        let has_api_key = self.tokens.has_api_key();
        if let Some(due) = self.schedule.due(&running, self.ledger.now(), has_api_key) {
            // The layer that reads polls of clients reads this answer too.
            let _ = self.get(&due.target).await;
        }
    }

    /// Looks up one create whose answer was lost. Returns false if none is due.
    async fn look_up_unknown(&mut self) -> bool {
        let now = self.ledger.now();
        let since = now.before(schedule::LAST_LOOK_UP * 2);
        let unknown = self
            .ledger
            .read(move |store| store.unknown(since, MOST_UNKNOWN))
            .await;
        let unknown = unknown.unwrap_or_default();
        self.schedule.forget_all_but(&unknown);
        for record in &unknown {
            let Some(look_up) = self.schedule.next_look_up(record, now) else {
                continue;
            };
            let Some(target) = external_target(record) else {
                // Nothing can be asked, so the last time to say so is the first.
                self.schedule.has_looked_up(record, look_up);
                if look_up.is_first {
                    warn_of_unknown(record);
                }
                continue;
            };
            let Some(found) = self.ask(&target).await else {
                return true;
            };
            self.schedule.has_looked_up(record, look_up);
            match found.into_iter().find(|task| is_of(task, record)) {
                Some(task) => self.settle(task, record),
                None if look_up.is_last => warn_of_unknown(record),
                None => {}
            }
            return true;
        }
        false
    }

    /// Gives a create the task that a look-up has found.
    fn settle(&self, task: AnsweredTask, record: &TaskRecord) {
        if let Some(seen) = Observation::of(task, DEFAULT_ACCOUNT, self.ledger.now()) {
            self.ledger.found(Observation {
                of_create: Some(record.reference.clone()),
                ..seen
            });
        }
    }

    /// Reads the resource packs of the account.
    async fn read_packs(&mut self) {
        let target = packs::target(self.ledger.now());
        let answer = self.get(&target).await;
        let costs = answer.and_then(|answer| serde_json::from_slice::<Value>(&answer).ok());
        let pools = self.ledger.pools_in_use();
        self.packs
            .read(costs.as_ref(), self.ledger.now(), &pools, Instant::now());
    }

    /// Looks for tasks, and returns those that the answer shows; `None` without an answer. That there is no
    /// such task is an answer too.
    async fn ask(&mut self, target: &str) -> Option<Vec<AnsweredTask>> {
        let answer = self.get(target).await?;
        let mut tasks = Vec::new();
        TaskSplitter::new(TaskPlace::of_target(target)).push(&answer, |task| {
            tasks.extend(task.read());
        });
        Some(tasks)
    }

    /// Sends one read, and adapts the pace to the answer. Returns its body, which is empty if Kling refuses the
    /// parameters; `None` without an answer.
    async fn get(&mut self, target: &str) -> Option<Vec<u8>> {
        let target: Uri = target.parse().ok()?;
        let request = ReplayableRequest::own_read(target, &self.metrics);
        let read = async {
            let answer = self.reads.call(request).await?;
            let body = Limited::new(answer.into_body(), LARGEST).collect().await;
            Ok::<_, Error>(body.ok().map(|body| body.to_bytes().to_vec()))
        };
        let answer = timeout(LONGEST, read).await;
        let is_too_fast =
            matches!(&answer, Ok(Err(error)) if error.code() == service_code::RATE_LIMITED);
        self.pace = if is_too_fast {
            (self.pace * 2).min(SLOWEST)
        } else {
            (self.pace / 2).max(PACE)
        };
        self.next = Instant::now() + self.pace;
        match answer.ok()? {
            Ok(body) => body,
            Err(error) if error.row().class == Class::Parameters => Some(Vec::new()),
            Err(_) => None,
        }
    }

    /// Returns true if this process has the lease to watch the account.
    async fn has_lease(&mut self) -> bool {
        let now = Instant::now();
        if self.leased_until.is_some_and(|until| now < until) {
            return true;
        }
        let at = self.ledger.now();
        let taken = self
            .ledger
            .read(move |store| store.watch(DEFAULT_ACCOUNT, at))
            .await;
        let has_lease = taken.unwrap_or(false);
        self.leased_until = has_lease.then(|| now + RENEW);
        has_lease
    }
}

/// Returns the target that reads the task of a create by its external id; `None` if there is none.
fn external_target(record: &TaskRecord) -> Option<String> {
    let family = Family::named(record.family.as_deref()?)?;
    let id = record
        .external_id
        .as_deref()
        .filter(|id| Family::is_plain_id(id))?;
    family.read_by_external_id(id)
}

/// Returns true if a task is the one that a create has made: not one that took the external id before.
fn is_of(task: &AnsweredTask, record: &TaskRecord) -> bool {
    task.external_id == record.external_id && task.is_since(record.created_at.before(SKEW).0)
}

fn warn_of_unknown(record: &TaskRecord) {
    tracing::warn!(
        target: CREATES,
        task = record.reference.as_str(),
        request_id = record.request_id,
        task.external_id = record.external_id.as_deref().map(printable).as_deref(),
        url.path = &*printable(&record.path),
        model = record.order.model,
        created_at = %record.created_at,
        "it is still unknown whether a create made a task; the task may exist and be billed"
    );
}

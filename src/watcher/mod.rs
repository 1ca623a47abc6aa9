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
use tokio::time::{Instant, MissedTickBehavior, interval};
use tower::Service;

use self::packs::Packs;
use self::schedule::{Due, Schedule};
use crate::auth::token::Tokens;
use crate::error::Error;
use crate::kling::family::Family;
use crate::kling::service_code;
use crate::kling::task_answer::{AnsweredTask, TaskPlace, TaskSplitter};
use crate::request::replayable::ReplayableRequest;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::{DEFAULT_ACCOUNT, TaskRecord};
use crate::tasks::state::TaskState;
use crate::tasks::store::Observation;
use crate::telemetry::CREATES;
use crate::telemetry::metrics::Metrics;

/// Asks Kling for what no client asks for. `S` sends reads with the proxy's credential.
pub struct Watcher<S> {
    reads: S,
    ledger: Ledger,
    tokens: Arc<Tokens>,
    metrics: Arc<Metrics>,
    schedule: Schedule,
    packs: Packs,
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
/// Most creates of which the outcome is unknown that are looked at.
const MOST_UNSETTLED: usize = 1000;

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
            if Instant::now() >= self.next && self.is_needed() && self.has_lease().await {
                self.step().await;
            }
        }
    }

    /// Returns true if a task runs, or was created since the start.
    fn is_needed(&self) -> bool {
        self.ledger.was_used()
    }

    /// Sends at most one request.
    async fn step(&mut self) {
        let now = self.ledger.now();
        if self.packs.is_due(Instant::now()) {
            return self.read_packs().await;
        }
        let running = self.ledger.all_running();
        let due = self.schedule.due(&running, now, self.tokens.has_api_key());
        match due {
            Some(Due { target, place }) => {
                // The layer that reads polls of clients reads this answer too.
                let _ = self.ask(&target, place).await;
            }
            None => self.look_up_unknown().await,
        }
    }

    /// Looks up one create whose answer was lost.
    async fn look_up_unknown(&mut self) {
        let now = self.ledger.now();
        if !self.schedule.is_time_for_unknown(now) {
            return;
        }
        let unsettled = self
            .ledger
            .read(|store| store.unsettled(MOST_UNSETTLED))
            .await;
        let unknown = unsettled.unwrap_or_default().into_iter();
        let unknown = unknown.filter(|record| record.state == TaskState::Unknown);
        for record in unknown {
            let Some(look_up) = self.schedule.next_look_up(&record, now) else {
                continue;
            };
            let target = external_target(&record);
            if let Some(target) = &target {
                let place = place_of(target);
                let found = self.ask(target, place).await.unwrap_or_default();
                let is_it = |task: &AnsweredTask| task.external_id == record.external_id;
                if let Some(task) = found.into_iter().find(is_it)
                    && let Some(seen) = Observation::of(task, DEFAULT_ACCOUNT, now)
                {
                    self.ledger.found(seen);
                    return;
                }
            }
            if look_up.is_last || target.is_none() {
                warn_of_unknown(&record);
            }
            if target.is_some() {
                return;
            }
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

    /// Asks for tasks, and returns those that the answer shows.
    async fn ask(&mut self, target: &str, place: TaskPlace) -> Option<Vec<AnsweredTask>> {
        let answer = self.get(target).await?;
        let mut tasks = Vec::new();
        TaskSplitter::new(place).push(&answer, |task| tasks.push(task));
        Some(tasks)
    }

    /// Sends one read, and adapts the pace to the answer.
    async fn get(&mut self, target: &str) -> Option<Vec<u8>> {
        let target: Uri = target.parse().ok()?;
        let request = ReplayableRequest::own_read(target, &self.metrics);
        let answer = self.reads.call(request).await;
        let is_too_fast =
            matches!(&answer, Err(error) if error.code() == service_code::RATE_LIMITED);
        self.pace = if is_too_fast {
            (self.pace * 2).min(SLOWEST)
        } else {
            (self.pace / 2).max(PACE)
        };
        self.next = Instant::now() + self.pace;
        let body = Limited::new(answer.ok()?.into_body(), LARGEST)
            .collect()
            .await;
        Some(body.ok()?.to_bytes().to_vec())
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

/// Returns the place of tasks in the answer to a read of single tasks.
fn place_of(target: &str) -> TaskPlace {
    if target.contains('?') {
        TaskPlace::List
    } else {
        TaskPlace::Data
    }
}

fn warn_of_unknown(record: &TaskRecord) {
    tracing::warn!(
        target: CREATES,
        task = record.reference.as_str(),
        request_id = record.request_id,
        task.external_id = record.external_id,
        url.path = record.path,
        model = record.order.model,
        created_at = %record.created_at,
        "it stays unknown if a create made a task; the task may exist and be billed"
    );
}

//! Sends again what may be sent again: never a create that may have worked, and never more than
//! upstream can bear.
//!
//! One place decides. Connections hand a request back when, and only when, nothing of it was sent
//! (see `upstream`), nothing below this layer sends anything twice, and what an error allows stands
//! in [`Error::resend`].

use std::mem;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::response::Response;
use http::header::{HeaderMap, RETRY_AFTER};
use tokio::time::{Instant, Sleep, sleep};
use tower::retry::Policy;
use tower::retry::budget::{Budget, TpsBudget};

use crate::auth::token::Tokens;
use crate::clock::Clock;
use crate::error::Error;
use crate::kling::idempotency::Effect;
use crate::kling::service_code::Resend;
use crate::reloadable::Reloadable;
use crate::request::replayable::ReplayableRequest;
use crate::telemetry::CREATES;
use crate::telemetry::metrics::Metrics;

/// How often and for how long (`retry.attempts`, `retry.total_time`).
#[derive(Clone, Copy, Debug)]
pub struct RetryLimits {
    /// Attempts in all; 1 for no resending.
    pub attempts: u64,
    /// No attempt starts later than this after the first.
    pub total_time: Duration,
}

/// Judges what came of the attempts of one request.
///
/// tower asks one for all requests for a copy of the first attempt, and then clones it for the request.
/// Only the clone is asked to judge, so that `again` is never set on the one for all.
#[derive(Clone)]
pub struct RetryPolicy {
    shared: Arc<RetryShared>,
    /// Those of this request: a reload changes them for the next one.
    limits: RetryLimits,
    begun: Option<Instant>,
    attempts: u64,
    /// Whether an attempt was made with a token minted for it.
    renewed: bool,
    /// Whether the next attempt is a further one of the same request.
    again: bool,
}

#[derive(Clone)]
struct RetryShared {
    limits: Reloadable<RetryLimits>,
    budget: Arc<TpsBudget>,
    tokens: Arc<Tokens>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

/// What the budget remembers, counts a second whatever the traffic, and adds of the requests.
const BUDGET: (Duration, u32, f32) = (Duration::from_secs(10), 10, 0.2);

/// The longest first wait, doubled for each further one: a connection or a gateway is often back
/// at once.
const SOON: Duration = Duration::from_millis(250);
/// The same for a limit; the vendor advises a back-off from 1 s.
const LATER: Duration = Duration::from_secs(1);

// === impl RetryPolicy ===

impl RetryPolicy {
    /// Resends within `limits`, and within one budget for all clones.
    pub fn new(
        limits: RetryLimits,
        tokens: Arc<Tokens>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (window, always, share) = BUDGET;
        let shared = RetryShared {
            limits: Reloadable::new(limits),
            budget: Arc::new(TpsBudget::new(window, always, share)),
            tokens,
            clock,
            metrics,
        };
        Self {
            shared: Arc::new(shared),
            limits,
            begun: None,
            attempts: 0,
            renewed: false,
            again: false,
        }
    }

    /// Holds the next requests to other limits.
    pub fn set_limits(&self, limits: RetryLimits) {
        self.shared.limits.store(limits);
    }

    /// How long to wait before the next attempt; `None` for no further one.
    fn wait(&mut self, effect: Effect, error: &Error) -> Option<Duration> {
        let longest = match error.resend() {
            Resend::Never | Resend::ByClient => return None,
            Resend::Reads if effect == Effect::Create => return None,
            Resend::Reads | Resend::Unsent => SOON,
            Resend::Refused => LATER,
            Resend::NewToken if self.renewed || !self.shared.tokens.renew() => return None,
            Resend::NewToken => {
                self.renewed = true;
                Duration::ZERO
            }
        };
        let left = self
            .limits
            .total_time
            .checked_sub(self.begun?.elapsed())
            .unwrap_or_default();
        let asked = error
            .answer()
            .and_then(|answer| retry_after(&answer.head.headers, self.shared.clock.now()));
        if left.is_zero() || asked.is_some_and(|asked| asked > left) {
            self.shared.metrics.resend_withheld("time");
            return None;
        }
        // Full jitter: many that failed together do not come back together.
        let doubled = longest.saturating_mul(1 << self.attempts.saturating_sub(1).min(16));
        Some(asked.unwrap_or_else(|| doubled.min(left).mul_f64(fastrand::f64())))
    }
}

impl Policy<ReplayableRequest, Response, Error> for RetryPolicy {
    type Future = Sleep;

    fn retry(
        &mut self,
        request: &mut ReplayableRequest,
        result: &mut Result<Response, Error>,
    ) -> Option<Sleep> {
        let error = result.as_ref().err()?;
        let wait = self.wait(request.effect(), error)?;
        let withheld = if !request.body().is_whole() {
            "body"
        } else if !self.shared.budget.withdraw() {
            "budget"
        } else {
            macro_rules! log {
                ($target:expr) => {
                    tracing::info!(
                        target: $target,
                        request_id = request.context().id().as_str(),
                        error.type = error.kind(),
                        attempts = self.attempts,
                        wait_seconds = wait.as_secs_f64(),
                        "sending again"
                    )
                };
            }
            match request.effect() {
                Effect::Create => log!(CREATES),
                Effect::Read => log!(module_path!()),
            }
            self.again = true;
            return Some(sleep(wait));
        };
        self.shared.metrics.resend_withheld(withheld);
        None
    }

    /// Called before each attempt: with a copy, `retry` is asked what to make of its outcome.
    fn clone_request(&mut self, request: &ReplayableRequest) -> Option<ReplayableRequest> {
        if !mem::take(&mut self.again) {
            self.begun = Some(request.context().begun());
            self.limits = **self.shared.limits.load();
            self.attempts = 0;
            self.renewed = false;
            self.shared.budget.deposit();
        }
        self.attempts += 1;
        (self.attempts < self.limits.attempts).then(|| request.clone())
    }
}

/// What upstream asks for, in seconds or as a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

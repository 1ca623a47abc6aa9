//! Retries a failed request if that is safe: never a create that may have had an effect, and never more
//! often than upstream can bear.
//!
//! This layer alone decides about retries. A connection hands a request back only if nothing of it was
//! sent (see `upstream`). Nothing below this layer sends anything twice. [`Error::resend`] states the
//! rule for each error.

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
use crate::kling::service_code::{self, Resend};
use crate::reloadable::Reloadable;
use crate::request::replayable::ReplayableRequest;
use crate::telemetry::CREATES;
use crate::telemetry::metrics::Metrics;

/// Limits of retries (`retry.attempts`, `retry.total_time`).
#[derive(Clone, Copy, Debug)]
pub struct RetryLimits {
    /// Attempts in all, the first included; 1 means no retry.
    pub attempts: u64,
    /// Latest start of an attempt, counted from the arrival of the request.
    pub total_time: Duration,
}

/// Decides after each attempt if the request is sent again.
///
/// tower's `Retry` keeps one policy for all requests. It calls `clone_request` on that one for the first
/// attempt, then clones the policy for the request and calls `retry` on the clone only. So `again` is
/// never set on the shared policy.
#[derive(Clone)]
pub struct RetryPolicy {
    shared: Arc<RetryShared>,
    /// Limits of this request. A reload changes them only for later requests.
    limits: RetryLimits,
    begun: Option<Instant>,
    attempts: u64,
    /// True if an attempt was made with a token minted for it.
    renewed: bool,
    /// True if the next attempt is a retry of the same request.
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

/// Retry budget: the time that it looks back, the retries per second that it allows at any traffic, and
/// the share of requests that it allows as further retries.
const BUDGET: (Duration, u32, f32) = (Duration::from_secs(10), 10, 0.2);

/// Longest wait before the first retry, doubled for each further one. A connection or a gateway often
/// works again at once.
const SOON: Duration = Duration::from_millis(250);
/// Longest wait before the first retry after a rate limit. The vendor advises a back-off from 1 s.
const LATER: Duration = Duration::from_secs(1);

// === impl RetryPolicy ===

impl RetryPolicy {
    /// Makes a policy that retries within `limits`. All its clones share one retry budget.
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

    /// Sets the limits of requests that arrive from now on.
    pub fn set_limits(&self, limits: RetryLimits) {
        self.shared.limits.store(limits);
    }

    /// Returns the latest start of an attempt, counted from the arrival of the request.
    pub fn total_time(&self) -> Duration {
        self.shared.limits.load().total_time
    }

    /// Returns the wait before the next attempt; `None` if there is none.
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
        // Full jitter: requests that failed together are not sent again together.
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
        if request.is_own() && error.code() == service_code::RATE_LIMITED {
            // Whoever asks for the proxy slows down instead.
            return None;
        }
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

    /// Runs before each attempt. If it returns a copy, tower passes the attempt's result to `retry`.
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

/// Returns the wait in `Retry-After`, given in seconds or as a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?;
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::extract::Request;
    use bytesize::ByteSize;
    use tokio::time::advance;

    use super::*;
    use crate::auth::secret::Secret;
    use crate::auth::token::{Credential, Validity};
    use crate::clock::SystemClock;
    use crate::error::Answer;
    use crate::kling::envelope;
    use crate::request::context::ProxyRequest;
    use crate::request::replay_body::{ReplayBudget, ReplayLimits};

    const TOTAL: Duration = Duration::from_secs(30);

    fn pair() -> Credential {
        let [access_key, secret_key] = ["access", "secret"].map(|key| Secret::from(key.to_owned()));
        Credential::Pair {
            access_key,
            secret_key,
        }
    }

    fn policy(attempts: u64, credential: Credential) -> RetryPolicy {
        let metrics = Arc::new(Metrics::new().unwrap());
        let validity = Validity {
            lifetime: Duration::from_mins(30),
            not_before_leeway: Duration::from_secs(5),
            refresh_before: Duration::from_mins(5),
        };
        let clock = Arc::new(SystemClock);
        let tokens = Tokens::new(
            credential,
            validity,
            Arc::<SystemClock>::clone(&clock),
            Arc::clone(&metrics),
        );
        let limits = RetryLimits {
            attempts,
            total_time: TOTAL,
        };
        RetryPolicy::new(limits, Arc::new(tokens), clock, metrics)
    }

    fn request(method: &str) -> ReplayableRequest {
        let metrics = Arc::new(Metrics::new().unwrap());
        let none = ReplayLimits {
            body: ByteSize::b(0),
            memory: ByteSize::b(0),
        };
        let request = Request::builder()
            .method(method)
            .uri("/v1/videos/text2video");
        let request = request.body(Body::empty()).unwrap();
        let request = ProxyRequest::untraced(request, &metrics);
        ReplayableRequest::new(request, &Arc::new(ReplayBudget::new(none, metrics)), false)
    }

    fn service(code: i64, retry_after: Option<&str>) -> Error {
        let mut answer = Response::new(Body::empty());
        if let Some(value) = retry_after {
            let value = value.parse().unwrap();
            answer.headers_mut().insert(RETRY_AFTER, value);
        }
        let text = format!("{{\"code\":{code}}}");
        Error::Service {
            answer: Answer::boxed(answer),
            envelope: envelope::read(text.as_bytes()).unwrap(),
        }
    }

    fn unreachable() -> Error {
        Error::Unreachable("refused".into())
    }

    fn disconnected() -> Error {
        Error::Disconnected("reset".into())
    }

    /// A policy after its first attempt at a request.
    fn begun(credential: Credential) -> RetryPolicy {
        let mut policy = policy(3, credential);
        assert!(policy.clone_request(&request("GET")).is_some());
        policy
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_had_no_effect_is_sent_again() {
        for (error, read, create) in [
            (unreachable(), true, true),
            (disconnected(), true, false),
            (service(1303, None), true, true),
            (service(5000, None), true, false),
            (service(1102, None), false, false),
            (service(1201, None), false, false),
            (
                Error::EgressRefused(http::StatusCode::FORBIDDEN),
                false,
                false,
            ),
            (Error::Draining, false, false),
        ] {
            for (effect, expected) in [(Effect::Read, read), (Effect::Create, create)] {
                let wait = begun(pair()).wait(effect, &error);
                assert_eq!(wait.is_some(), expected, "{error} {effect:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn token_is_renewed_once_and_an_api_key_never() {
        let mut policy = begun(pair());
        let error = service(1004, None);
        assert_eq!(policy.wait(Effect::Create, &error), Some(Duration::ZERO));
        assert_eq!(policy.wait(Effect::Create, &error), None);
        let key = Credential::ApiKey(Secret::from("key".to_owned()));
        assert_eq!(begun(key).wait(Effect::Create, &error), None);
    }

    #[tokio::test(start_paused = true)]
    async fn longest_wait_doubles_and_ends_with_the_total_time() {
        fastrand::seed(18);
        for (error, first) in [(unreachable(), SOON), (service(1303, None), LATER)] {
            let mut policy = begun(pair());
            for (attempts, longest) in [(1, first), (2, 2 * first), (3, 4 * first), (64, TOTAL)] {
                policy.attempts = attempts;
                let waits = (0..500).map(|_| policy.wait(Effect::Read, &error).unwrap());
                let waits: Vec<_> = waits.collect();
                let most = *waits.iter().max().unwrap();
                assert!(most <= longest, "{attempts}: {most:?}");
                assert!(most > longest.mul_f64(0.98), "{attempts}: {most:?}");
                assert!(*waits.iter().min().unwrap() < longest.mul_f64(0.02));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wait_that_upstream_asks_for_is_kept_if_the_time_allows() {
        let mut policy = begun(pair());
        let mut wait = |retry_after| policy.wait(Effect::Read, &service(1303, Some(retry_after)));
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(wait("0"), seconds(0));
        assert_eq!(wait("7"), seconds(7));
        assert_eq!(wait("30"), seconds(30));
        assert_eq!(wait("31"), None);
        assert_eq!(wait("Thu, 01 Jan 1970 00:00:00 GMT"), seconds(0));
        assert_eq!(wait("Fri, 01 Jan 2100 00:00:00 GMT"), None);
        // Neither a number nor a date.
        assert!(wait("soon").unwrap() <= LATER);
        advance(TOTAL.mul_f64(0.999)).await;
        assert!(policy.wait(Effect::Read, &unreachable()).is_some());
        advance(TOTAL.mul_f64(0.001)).await;
        assert_eq!(policy.wait(Effect::Read, &unreachable()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_are_counted_for_each_request_and_new_limits_hold_for_the_next() {
        let request = &mut request("GET");
        let mut policy = policy(3, pair());
        for _ in 0..2 {
            // With a copy, the outcome of an attempt is judged.
            assert!(policy.clone_request(request).is_some());
            assert!(policy.retry(request, &mut Err(unreachable())).is_some());
            assert!(policy.clone_request(request).is_some());
            assert!(policy.retry(request, &mut Err(unreachable())).is_some());
            assert!(policy.clone_request(request).is_none());
            // The next request starts anew.
            policy.again = false;
        }
        let once = RetryLimits {
            attempts: 1,
            total_time: TOTAL,
        };
        policy.set_limits(once);
        assert!(policy.clone_request(request).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn success_is_not_sent_again_and_the_budget_ends() {
        let request = &mut request("GET");
        let mut policy = policy(3, pair());
        policy.clone_request(request);
        let mut success = Ok(Response::new(Body::empty()));
        assert!(policy.retry(request, &mut success).is_none());
        let mut retry = || policy.retry(request, &mut Err(unreachable())).is_some();
        let granted = (0..1_000).filter(|_| retry());
        // Ten a second for the window of ten seconds; a fifth of the one request is no whole retry.
        assert_eq!(granted.count(), 100);
    }
}

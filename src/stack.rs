//! THE order of the layers: the only place that knows all of them.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use futures_util::FutureExt;
use futures_util::future::Either;
use tokio_util::task::TaskTracker;
use tower::retry::RetryLayer;
use tower::util::MapResponseLayer;
use tower::{Service, ServiceBuilder, service_fn};

use crate::admin::{self, Control};
use crate::auth::client_share::Shares;
use crate::auth::token::{Credential, Tokens, Validity};
use crate::clock::Clock;
use crate::error::Error;
use crate::layer::authenticate::AuthenticateLayer;
use crate::layer::cors::CorsLayer;
use crate::layer::detach::DetachLayer;
use crate::layer::drain::DrainLayer;
use crate::layer::guard::GuardLayer;
use crate::layer::guard::hop::Hop;
use crate::layer::guard::rules::Rules;
use crate::layer::normalise::{ErrorFormat, NormaliseLayer};
use crate::layer::retry::{RetryLimits, RetryPolicy};
use crate::layer::trace::{Counted, TraceLayer};
use crate::lifecycle::Lifecycle;
use crate::reloadable::Reloadable;
use crate::request::context::ProxyRequest;
use crate::request::replay_body::{ReplayBudget, ReplayLimits};
use crate::request::replayable::ReplayableRequest;
use crate::sandbox::{self, Sandbox};
use crate::telemetry::metrics::Metrics;
use crate::upstream::{Dial, Origin, Timeouts, Upstream, UpstreamClock};

/// What a proxy is made of.
pub struct Parts {
    /// What is shown to upstream.
    pub credential: Credential,
    /// How tokens are made of it.
    pub validity: Validity,
    /// Decides what passes.
    pub rules: Rules,
    /// The form of errors.
    pub errors: ErrorFormat,
    /// Bounds of resending.
    pub retry: RetryLimits,
    /// Bounds of what is kept to be sent again.
    pub replay: ReplayLimits,
    /// Where requests go.
    pub origin: Origin,
    /// Leads there.
    pub dial: Arc<dyn Dial>,
    /// How long upstream may take.
    pub timeouts: Timeouts,
    /// The wall clock.
    pub clock: Arc<dyn Clock>,
    /// Where everything is counted.
    pub metrics: Arc<Metrics>,
}

/// What the stacks of all threads share.
#[derive(Clone)]
pub struct Shared {
    /// What may pass.
    pub rules: Reloadable<Rules>,
    /// What may pass on the admin listener.
    pub admin_rules: Reloadable<Rules>,
    /// What each client has in flight.
    pub shares: Arc<Shares>,
    /// What an upstream on this machine is told.
    pub hop: Option<Arc<Hop>>,
    /// How errors look.
    pub errors: Reloadable<ErrorFormat>,
    /// What is sent again.
    pub retry_policy: RetryPolicy,
    /// What is kept to be sent again.
    pub replay_budget: Arc<ReplayBudget>,
    /// Where bearers come from.
    pub tokens: Arc<Tokens>,
    /// Where requests go.
    pub origin: Origin,
    /// How they go there.
    pub upstream: Upstream,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// Whether to serve at all.
    pub lifecycle: Arc<Lifecycle>,
    /// What to count in.
    pub metrics: Arc<Metrics>,
}

// === impl Shared ===

impl Shared {
    /// Puts the parts together. Nothing runs yet.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            credential,
            validity,
            rules,
            errors,
            retry,
            replay,
            origin,
            dial,
            timeouts,
            clock,
            metrics,
        } = parts;
        let upstream_clock = UpstreamClock::new(Arc::clone(&clock), Arc::clone(&metrics));
        let upstream_clock = Arc::new(upstream_clock);
        let tokens = Tokens::new(
            credential,
            validity,
            Arc::<UpstreamClock>::clone(&upstream_clock),
            Arc::clone(&metrics),
        );
        let tokens = Arc::new(tokens);
        let upstream = Upstream::new(
            &origin,
            dial,
            timeouts,
            Arc::clone(&clock),
            Arc::clone(&upstream_clock),
            Arc::clone(&metrics),
        );
        let retry_tokens = Arc::clone(&tokens);
        Self {
            retry_policy: RetryPolicy::new(
                retry,
                retry_tokens,
                upstream_clock,
                Arc::clone(&metrics),
            ),
            replay_budget: Arc::new(ReplayBudget::new(replay, Arc::clone(&metrics))),
            admin_rules: Reloadable::new(rules.for_admin()),
            rules: Reloadable::new(rules),
            shares: Arc::default(),
            hop: Hop::to(&origin).map(Arc::new),
            errors: Reloadable::new(errors),
            tokens,
            origin,
            upstream,
            clock,
            lifecycle: Arc::default(),
            metrics,
        }
    }

    /// The whole path of a request, for one thread: its connections to upstream are its own.
    /// `detached` tracks what goes on after its client has gone.
    ///
    /// ```text
    /// listener -> trace -> cors -> normalise -> drain -> guard -> original -> detach -> retry -> authenticate
    ///          -> upstream
    /// ```
    ///
    /// There is no router: that cost a poll more than all the checks of the guard, for one prefix.
    pub fn stack(
        &self,
        detached: &TaskTracker,
    ) -> impl Service<Request, Response = http::Response<Counted>, Error = Infallible, Future: Send>
    + Send
    + use<> {
        let (replay_budget, is_marked) = (Arc::clone(&self.replay_budget), self.hop.is_some());
        ServiceBuilder::new()
            .layer(TraceLayer::new(Arc::clone(&self.metrics))) // one id and one span, refusals too
            .layer(CorsLayer::new(self.rules.clone())) // pages read errors too
            .layer(NormaliseLayer::new(self.errors.clone())) // inside, a request may fail; outside, it cannot
            .layer(DrainLayer::new(Arc::clone(&self.lifecycle))) // answers what a shutdown gives up
            .layer(GuardLayer {
                rules: self.rules.clone(),
                shares: Some(Arc::clone(&self.shares)),
                hop: self.hop.clone(),
                lifecycle: Arc::clone(&self.lifecycle),
                metrics: Arc::clone(&self.metrics),
            }) // refuses before anything is spent
            // Without the client's credentials from here on.
            .map_request(move |inbound| ReplayableRequest::new(inbound, &replay_budget, is_marked))
            .layer(DetachLayer::new(detached.clone())) // a paid task outlives its client
            .layer(RetryLayer::new(self.retry_policy.clone())) // never a create that may have worked
            .layer(AuthenticateLayer::new(
                Arc::clone(&self.tokens),
                self.origin.host(),
            ))
            .service(self.upstream.for_thread())
    }

    /// What the admin listener serves. Health and metrics answer whoever can connect, since probes
    /// and scrapers come by pod address. `control` is for this machine alone, behind the same guard.
    pub fn admin(&self, control: Option<Control>) -> Router {
        let open = admin::router(
            Arc::clone(&self.lifecycle),
            Arc::clone(&self.metrics),
            self.rules.clone(),
        );
        let set_security_headers = MapResponseLayer::new(admin::set_security_headers);
        let Some(control) = control else {
            return open.layer(set_security_headers);
        };
        let metrics = Arc::clone(&self.metrics);
        let guarded = ServiceBuilder::new()
            .map_request(move |request| ProxyRequest::untraced(request, &metrics))
            .layer(NormaliseLayer::new(self.errors.clone()))
            .layer(GuardLayer {
                rules: self.admin_rules.clone(),
                shares: None,
                hop: None,
                lifecycle: Arc::default(), // it serves to the end, to tell how that goes
                metrics: Arc::clone(&self.metrics),
            })
            .service(service_fn(move |inbound: ProxyRequest| {
                ready(control.answer(&inbound.request))
            }));
        open.fallback_service(guarded).layer(set_security_headers)
    }
}

/// What the sandbox serves where it listens alone: all but its files, which pages show, is behind the
/// guard that the proxy has.
pub fn sandbox(
    sandbox: Sandbox,
    rules: Rules,
    errors: ErrorFormat,
    metrics: Metrics,
) -> impl Service<Request, Response = Response, Error = sandbox::Reset, Future: Send> + Send {
    let rules = Reloadable::new(rules);
    let [mut files, mut all_else] = [sandbox.clone(), sandbox];
    let metrics = Arc::new(metrics);
    let uncounted = Arc::clone(&metrics);
    let mut guarded = ServiceBuilder::new()
        .map_request(move |request| ProxyRequest::untraced(request, &uncounted))
        .layer(CorsLayer::new(rules.clone()))
        .layer(NormaliseLayer::new(Reloadable::new(errors)))
        .layer(GuardLayer {
            rules,
            shares: None,
            hop: None,
            lifecycle: Arc::default(),
            metrics,
        })
        .service(service_fn(move |inbound: ProxyRequest| {
            let answer = all_else.call(inbound.request);
            // The layers pass on errors of ours only.
            let kept = |reset: sandbox::Reset| Extension(reset).into_response();
            answer.map(move |answer| Ok::<_, Error>(answer.unwrap_or_else(kept)))
        }));
    service_fn(move |request: Request| {
        if sandbox::is_for_file(&request) {
            return Either::Left(files.call(request));
        }
        let answer = guarded.call(request);
        Either::Right(answer.map(|Ok::<_, Infallible>(mut answer)| {
            match answer.extensions_mut().remove::<sandbox::Reset>() {
                Some(reset) => Err(reset),
                None => Ok(answer),
            }
        }))
    })
}

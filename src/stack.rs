//! The order of the layers. No other file knows all of them.

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
use crate::layer::guard::hop::Hop;
use crate::layer::guard::rules::Rules;
use crate::layer::guard::{Destination, GuardLayer};
use crate::layer::local::tasks::TaskRequest;
use crate::layer::local::{self, LocalLayer};
use crate::layer::normalise::{ErrorFormat, NormaliseLayer};
use crate::layer::observe::ObserveLayer;
use crate::layer::recover::RecoverLayer;
use crate::layer::retry::{RetryLimits, RetryPolicy};
use crate::layer::trace::{Counted, TraceLayer};
use crate::layer::wait::WaitLayer;
use crate::lifecycle::Lifecycle;
use crate::reloadable::Reloadable;
use crate::request::context::ProxyRequest;
use crate::request::replay_body::{ReplayBudget, ReplayLimits};
use crate::request::replayable::ReplayableRequest;
use crate::sandbox::{self, Sandbox};
use crate::tasks::ledger::Ledger;
use crate::tasks::waiting::WaitingRoom;
use crate::telemetry::metrics::Metrics;
use crate::upstream::{Dial, Origin, Timeouts, Upstream, UpstreamClock};
use crate::watcher::Watcher;

/// Parts from which a proxy is built.
pub struct Parts {
    /// Credential of the proxy's account at upstream.
    pub credential: Credential,
    /// Times in the life of the tokens that are minted from it.
    pub validity: Validity,
    /// Rules that each request must pass.
    pub rules: Rules,
    /// Form of error responses (`errors.*`).
    pub errors: ErrorFormat,
    /// Limits of retries: their number and time.
    pub retry: RetryLimits,
    /// Limits of the memory for bodies that are kept for retries.
    pub replay: ReplayLimits,
    /// Scheme, host and port of upstream.
    pub origin: Origin,
    /// True if upstream is the embedded sandbox.
    pub sandboxed: bool,
    /// URL of the admin listener, if there is one.
    pub admin: Option<String>,
    /// Opens connections to upstream, directly or through the egress proxy.
    pub dial: Arc<dyn Dial>,
    /// Time limits for connections to upstream and for its responses.
    pub timeouts: Timeouts,
    /// Most requests that wait at once (`state.waiting`).
    pub waiting: u64,
    /// Wall clock of this machine, without correction.
    pub clock: Arc<dyn Clock>,
    /// Metrics of the whole process.
    pub metrics: Arc<Metrics>,
}

/// State that the stacks of all threads share.
#[derive(Clone)]
pub struct Shared {
    /// Rules of the data listener.
    pub rules: Reloadable<Rules>,
    /// Rules of the admin listener.
    pub admin_rules: Reloadable<Rules>,
    /// Answers to requests for the proxy itself.
    pub local: LocalLayer,
    /// Tells where a request to the data listener goes.
    pub destination: fn(&Request) -> Destination,
    /// Requests in flight, per client.
    pub shares: Arc<Shares>,
    /// Mark that detects loops of proxies; `None` if upstream is not on this machine.
    pub hop: Option<Arc<Hop>>,
    /// Form of error responses (`errors.*`).
    pub errors: Reloadable<ErrorFormat>,
    /// Policy that decides about retries.
    pub retry_policy: RetryPolicy,
    /// Budget of memory for bodies that are kept for retries.
    pub replay_budget: Arc<ReplayBudget>,
    /// Source of bearer tokens for upstream.
    pub tokens: Arc<Tokens>,
    /// Scheme, host and port of upstream.
    pub origin: Origin,
    /// Client that sends requests to upstream.
    pub upstream: Upstream,
    /// Wall clock of this machine, without correction.
    pub clock: Arc<dyn Clock>,
    /// Memory of all creates and their tasks.
    pub ledger: Ledger,
    /// Lets requests wait for the end of their task.
    pub wait: WaitLayer,
    /// Phase of the proxy, from start to end.
    pub lifecycle: Arc<Lifecycle>,
    /// Metrics of the whole process.
    pub metrics: Arc<Metrics>,
}

// === impl Shared ===

impl Shared {
    /// Builds the shared state from the parts. Nothing runs yet.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            credential,
            validity,
            rules,
            errors,
            retry,
            replay,
            origin,
            sandboxed,
            admin,
            dial,
            timeouts,
            waiting,
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
        let ledger = Ledger::new(Arc::clone(&clock), Arc::clone(&metrics));
        let lifecycle = Arc::<Lifecycle>::default();
        let wait = WaitLayer {
            room: WaitingRoom::new(waiting, Arc::clone(&metrics)),
            polls: Arc::default(),
            lifecycle: Arc::clone(&lifecycle),
            metrics: Arc::clone(&metrics),
        };
        let (destination, place): (fn(&Request) -> _, _) = if sandboxed {
            let place = "the embedded sandbox, which costs nothing".to_owned();
            (destination_with_sandbox, place)
        } else {
            (destination, origin.to_string())
        };
        Self {
            local: LocalLayer::new(&place, admin.as_deref(), ledger.clone(), wait.clone()),
            destination,
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
            ledger,
            wait,
            clock,
            lifecycle,
            metrics,
        }
    }

    /// Builds the whole path of a request for one thread, which has its own connections to upstream.
    /// `detached` tracks the creates that go on after their client has disconnected.
    ///
    /// ```text
    /// listener -> trace -> cors -> normalise -> drain -> guard -> local -> replayable -> wait
    ///          -> observe -> detach -> recover -> retry -> authenticate -> upstream
    /// ```
    ///
    /// There is no router: for one prefix it cost a poll more than all the checks of the guard.
    pub fn stack(
        &self,
        detached: &TaskTracker,
    ) -> impl Service<Request, Response = http::Response<Counted>, Error = Infallible, Future: Send>
    + Send
    + use<> {
        let (replay_budget, is_marked) = (Arc::clone(&self.replay_budget), self.hop.is_some());
        ServiceBuilder::new()
            .layer(TraceLayer::new(Arc::clone(&self.metrics))) // one id and one span, also if refused
            .layer(CorsLayer::new(self.rules.clone())) // allowed pages can read errors too
            .layer(NormaliseLayer::new(self.errors.clone())) // outside of this layer nothing fails
            .layer(DrainLayer::new(Arc::clone(&self.lifecycle))) // answers requests that a shutdown gives up
            .layer(GuardLayer {
                rules: self.rules.clone(),
                destination: self.destination,
                shares: Some(Arc::clone(&self.shares)),
                hop: self.hop.clone(),
                lifecycle: Arc::clone(&self.lifecycle),
                metrics: Arc::clone(&self.metrics),
            }) // refuses requests before they cost anything
            .layer(self.local.clone()) // answers requests for the proxy itself
            // From here on requests do not have the client's credentials.
            .map_request(move |inbound| ReplayableRequest::new(inbound, &replay_budget, is_marked))
            .layer(self.wait.clone()) // holds answers back until their task has ended, for clients that ask for it
            .layer(ObserveLayer::new(self.ledger.clone())) // learns from polls and lists what becomes of tasks
            .layer(DetachLayer::new(detached.clone(), self.ledger.clone())) // records creates; each goes on without its client
            .layer(RecoverLayer {
                ledger: self.ledger.clone(),
                retry_policy: self.retry_policy.clone(),
                metrics: Arc::clone(&self.metrics),
            }) // looks a create up if its answer was lost
            .layer(RetryLayer::new(self.retry_policy.clone())) // never retries a create that may have worked
            .layer(AuthenticateLayer::new(
                Arc::clone(&self.tokens),
                self.origin.host(),
            ))
            .service(self.upstream.for_thread())
    }

    /// Builds the watcher, which sends its reads through the inner layers of [`stack`](Self::stack).
    pub fn watcher(
        &self,
    ) -> Watcher<
        impl Service<ReplayableRequest, Response = Response, Error = Error, Future: Send> + Send + use<>,
    > {
        let reads = ServiceBuilder::new()
            .layer(ObserveLayer::new(self.ledger.clone()))
            .layer(RetryLayer::new(self.retry_policy.clone()))
            .layer(AuthenticateLayer::new(
                Arc::clone(&self.tokens),
                self.origin.host(),
            ))
            .service(self.upstream.for_thread());
        let (ledger, tokens) = (self.ledger.clone(), Arc::clone(&self.tokens));
        Watcher::new(reads, ledger, tokens, Arc::clone(&self.metrics))
    }

    /// Builds the service of the admin listener. Health and metrics are open to everyone who can
    /// connect, since probes and scrapers connect to the pod address. `control` is for this machine
    /// alone, and behind the guard. So are the tasks, which nobody sees here if clients need tokens, or
    /// connect to a Unix socket: this listener restricts nobody on this machine.
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
        let (rules, ledger) = (self.rules.clone(), self.ledger.clone());
        let guarded = ServiceBuilder::new()
            .map_request(move |request| ProxyRequest::untraced(request, &metrics))
            .layer(NormaliseLayer::new(self.errors.clone()))
            .layer(GuardLayer {
                rules: self.admin_rules.clone(),
                destination: |_| Destination::ThisProxy,
                shares: None,
                hop: None,
                lifecycle: Arc::default(), // it answers to the end, to show the progress
                metrics: Arc::clone(&self.metrics),
            })
            .service(service_fn(move |inbound: ProxyRequest| {
                let request = &inbound.request;
                let shows_tasks = control.shows_tasks && rules.load().client_tokens.is_none();
                match TaskRequest::of(request, &inbound.context) {
                    Some(asked) if shows_tasks => Either::Left(asked.read(ledger.clone())),
                    _ => Either::Right(ready(control.answer(request, shows_tasks))),
                }
            }));
        open.fallback_service(guarded).layer(set_security_headers)
    }
}

/// Tells where a request goes.
fn destination(request: &Request) -> Destination {
    if local::is_local(request) {
        Destination::ThisProxy
    } else {
        Destination::Upstream
    }
}

/// Tells the same if upstream is the embedded sandbox.
fn destination_with_sandbox(request: &Request) -> Destination {
    if sandbox::is_for_file(request) {
        Destination::PublicFile
    } else {
        destination(request)
    }
}

/// Builds the service of a sandbox with its own listener. Requests pass the same guard as in the proxy,
/// except those for its files, which pages show.
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
            destination: |_| Destination::Upstream,
            shares: None,
            hop: None,
            lifecycle: Arc::default(),
            metrics,
        })
        .service(service_fn(move |inbound: ProxyRequest| {
            if local::is_reserved(&inbound.request) {
                return Either::Left(ready(Err(Error::NotFound("the sandbox has no such file"))));
            }
            let answer = all_else.call(inbound.request);
            // The layers only pass errors of type [`Error`], so a reset travels as an extension.
            let kept = |reset: sandbox::Reset| Extension(reset).into_response();
            Either::Right(answer.map(move |answer| Ok::<_, Error>(answer.unwrap_or_else(kept))))
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

//! What the layers find out about a request on its way; `trace` tells it when the request ends.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use axum::extract::Request;
use tokio::time::Instant;

use crate::auth::client_share::Held;
use crate::auth::client_token::ClientName;
use crate::error::FailureRecord;
use crate::kling::task::Task;
use crate::request::id::RequestId;
use crate::telemetry::metrics::{InFlight, Metrics};

/// The facts of one request. All clones are one.
///
/// The request counts as in flight while there is a clone: until its answer has ended, and a create
/// until it is carried through.
#[derive(Clone)]
pub struct RequestContext(Arc<ContextInner>);

struct ContextInner {
    id: RequestId,
    begun: Instant,
    in_flight: InFlight,
    client: OnceLock<ClientName>,
    share: OnceLock<Held>,
    attempts: AtomicU32,
    external_id: OnceLock<String>,
    task: OnceLock<Task>,
    failure: OnceLock<Box<FailureRecord>>,
}

/// A request on its way in, between the layers, and what is known of it. Among its extensions the facts
/// would take a hash map for each request.
pub struct ProxyRequest {
    /// As it came.
    pub request: Request,
    /// What is known of it.
    pub context: RequestContext,
}

// === impl RequestContext ===

impl RequestContext {
    /// Begins now, with the request's name and count.
    pub fn new(id: RequestId, in_flight: InFlight) -> Self {
        Self(Arc::new(ContextInner {
            id,
            begun: Instant::now(),
            in_flight,
            client: OnceLock::new(),
            share: OnceLock::new(),
            attempts: AtomicU32::new(0),
            external_id: OnceLock::new(),
            task: OnceLock::new(),
            failure: OnceLock::new(),
        }))
    }

    /// The request's name.
    pub fn id(&self) -> &RequestId {
        &self.0.id
    }

    /// When its head was there.
    pub fn begun(&self) -> Instant {
        self.0.begun
    }

    /// Where it is counted.
    pub fn metrics(&self) -> &Metrics {
        self.0.in_flight.metrics()
    }

    /// The guard knows whose token was shown.
    pub fn is_from(&self, client: ClientName) {
        // A request has one client; the first word stands.
        let _ = self.0.client.set(client);
    }

    /// The request has a place in its client's share.
    pub fn holds(&self, place: Held) {
        // The guard gives it one.
        let _ = self.0.share.set(place);
    }

    /// The client's name, where clients have to show a token.
    pub fn client(&self) -> Option<&str> {
        self.0.client.get().map(ClientName::as_str)
    }

    /// The client gives its task this external id.
    pub fn is_named(&self, external_id: String) {
        // Of several the first counts.
        let _ = self.0.external_id.set(external_id);
    }

    /// The external id of the task: the one that upstream echoes, else the client's own.
    pub fn external_id(&self) -> Option<&str> {
        let echoed = self.task().and_then(|task| task.external_id.as_deref());
        echoed.or_else(|| self.0.external_id.get().map(String::as_str))
    }

    /// Upstream answered that there is a task now.
    pub fn created(&self, task: Task) {
        // A request creates one task, and upstream answers once that it did.
        let _ = self.0.task.set(task);
    }

    /// The task that was created, if any.
    pub fn task(&self) -> Option<&Task> {
        self.0.task.get()
    }

    /// The request is answered with an error.
    pub fn failed(&self, failure: FailureRecord) {
        // It is answered once.
        let _ = self.0.failure.set(Box::new(failure));
    }

    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&FailureRecord> {
        self.0.failure.get().map(|failure| &**failure)
    }

    /// Upstream was asked once more.
    pub fn attempted(&self) {
        self.0.attempts.fetch_add(1, Relaxed);
    }

    /// How often upstream was asked.
    pub fn attempts(&self) -> u32 {
        self.0.attempts.load(Relaxed)
    }

    /// How often the request was sent again; `None` if never.
    pub fn resend_count(&self) -> Option<u32> {
        self.attempts().checked_sub(1).filter(|resent| *resent > 0)
    }
}

// === impl ProxyRequest ===

impl ProxyRequest {
    /// Wraps a request that is neither traced nor counted: one to the admin listener or the sandbox.
    pub fn untraced(request: Request, metrics: &Arc<Metrics>) -> Self {
        let id = RequestId::of(request.headers());
        let context = RequestContext::new(id, metrics.enter_uncounted());
        Self { request, context }
    }
}

//! The record of one request, which the layers fill in. `trace` logs it when the request ends.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use axum::extract::Request;
use tokio::time::Instant;

use crate::auth::client_share::Held;
use crate::auth::client_token::ClientName;
use crate::error::FailureRecord;
use crate::kling::task::Task;
use crate::request::id::RequestId;
use crate::tasks::record::TaskRef;
use crate::telemetry::metrics::{InFlight, Metrics};

/// The context of one request. All clones share one record.
///
/// The request counts as in flight while a clone exists: until its response has ended, or, for a create
/// request, until the create is finished.
#[derive(Clone)]
pub struct RequestContext(Arc<ContextInner>);

struct ContextInner {
    id: RequestId,
    begun: Instant,
    in_flight: InFlight,
    client: OnceLock<ClientName>,
    share: Mutex<Option<Held>>,
    attempts: AtomicU32,
    external_id: OnceLock<String>,
    reference: OnceLock<TaskRef>,
    task: OnceLock<Task>,
    failure: OnceLock<Box<FailureRecord>>,
}

/// An inbound request between the layers, with its context. The context is not one of the request's
/// extensions, because those would need a hash map for each request.
pub struct ProxyRequest {
    /// The request as the client sent it.
    pub request: Request,
    /// The context of the request.
    pub context: RequestContext,
}

// === impl RequestContext ===

impl RequestContext {
    /// Starts the context now, with the request's id and its guard in the count of requests in flight.
    pub fn new(id: RequestId, in_flight: InFlight) -> Self {
        Self(Arc::new(ContextInner {
            id,
            begun: Instant::now(),
            in_flight,
            client: OnceLock::new(),
            share: Mutex::default(),
            attempts: AtomicU32::new(0),
            external_id: OnceLock::new(),
            reference: OnceLock::new(),
            task: OnceLock::new(),
            failure: OnceLock::new(),
        }))
    }

    /// Returns the id of the request.
    pub fn id(&self) -> &RequestId {
        &self.0.id
    }

    /// Returns the time at which the head of the request had arrived.
    pub fn begun(&self) -> Instant {
        self.0.begun
    }

    /// Returns the metrics that count this request.
    pub fn metrics(&self) -> &Metrics {
        self.0.in_flight.metrics()
    }

    /// Records the client whose token the request showed.
    pub fn is_from(&self, client: ClientName) {
        // A request has one client, so the first value stays.
        let _ = self.0.client.set(client);
    }

    /// Records that the request counts in its client's share, as long as the context exists.
    pub fn holds(&self, place: Held) {
        *self.share() = Some(place);
    }

    /// Records that the request only waits from now on, so it counts neither in its client's share nor as
    /// in flight.
    pub fn waits(&self) {
        self.share().take();
        self.0.in_flight.leave();
    }

    fn share(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.share.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the name of the client, if clients must show a token.
    pub fn client(&self) -> Option<&str> {
        self.0.client.get().map(ClientName::as_str)
    }

    /// Records the external id that the client gives to its task.
    pub fn is_named(&self, external_id: &str) {
        // If there are several, the first one counts.
        self.0.external_id.get_or_init(|| external_id.to_owned());
    }

    /// Records the proxy's own id of the create that the request is.
    pub fn is_create(&self, reference: TaskRef) {
        // A request is one create.
        let _ = self.0.reference.set(reference);
    }

    /// Returns the proxy's own id of the create; `None` for a read, and for a create that is not in the
    /// family table.
    pub fn reference(&self) -> Option<&TaskRef> {
        self.0.reference.get()
    }

    /// Returns the external id of the task: the one in upstream's response, else the client's own.
    pub fn external_id(&self) -> Option<&str> {
        let echoed = self.task().and_then(|task| task.external_id.as_deref());
        echoed.or_else(|| self.0.external_id.get().map(String::as_str))
    }

    /// Records the task that upstream created, as its response names it.
    pub fn created(&self, task: Task) {
        // A request creates one task, and upstream reports it once.
        let _ = self.0.task.set(task);
    }

    /// Returns the task that was created, if any.
    pub fn task(&self) -> Option<&Task> {
        self.0.task.get()
    }

    /// Records the error that the request is answered with.
    pub fn failed(&self, failure: FailureRecord) {
        // A request is answered once.
        let _ = self.0.failure.set(Box::new(failure));
    }

    /// Returns the reason for the failure, if the request failed.
    pub fn failure(&self) -> Option<&FailureRecord> {
        self.0.failure.get().map(|failure| &**failure)
    }

    /// Counts one more attempt to send the request to upstream.
    pub fn attempted(&self) {
        self.0.attempts.fetch_add(1, Relaxed);
    }

    /// Returns the number of attempts so far.
    pub fn attempts(&self) -> u32 {
        self.0.attempts.load(Relaxed)
    }

    /// Returns the number of attempts after the first one; `None` if there were none.
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

//! A client's request as it passed the guard. Each attempt to send it is made of it anew.

use std::sync::Arc;

use axum::extract::Request;
use http::{Uri, request};
use tokio::task::yield_now;

use crate::clock::Correction;
use crate::kling::idempotency::Effect;
use crate::request::context::{ProxyRequest, RequestContext};
use crate::request::headers;
use crate::request::pending_create::{ClientLeft, PendingCreate};
use crate::request::replay_body::{ReplayBody, ReplayBudget};

/// A request that can be sent again. Clones share one head, so that they cost next to nothing: most
/// requests are answered at the first attempt.
#[derive(Clone)]
pub struct ReplayableRequest {
    head: Arc<request::Parts>,
    effect: Effect,
    context: RequestContext,
    /// For a create that runs on its own.
    create: Option<Arc<PendingCreate>>,
    body: ReplayBody,
}

/// One attempt to send a request.
pub struct Attempt {
    /// What is sent.
    pub request: Request,
    /// For a create: asked before its first byte is sent.
    pub create: Option<AttemptedCreate>,
    /// The correction of the clock that its token was minted by, if it has one.
    pub minted_by: Option<Correction>,
}

/// A create that is about to be sent.
pub struct AttemptedCreate {
    pending: Arc<PendingCreate>,
    body: ReplayBody,
}

/// Turns of the event loop in which nothing more of a request has come before all of it that was sent
/// counts as read: one for its rest, and one for the end of its connection.
const QUIET_TURNS: u32 = 2;

// === impl ReplayableRequest ===

impl ReplayableRequest {
    /// Keeps of a request what may reach upstream; of its body what is read, for as long as `budget`
    /// lets it. The guard has marked the request for an upstream on this machine.
    pub fn new(inbound: ProxyRequest, budget: &Arc<ReplayBudget>, is_marked: bool) -> Self {
        let ProxyRequest { request, context } = inbound;
        let effect = Effect::of(&request);
        let (mut head, body) = request.into_parts();
        headers::strip_request(&mut head.headers, is_marked);
        let create = (effect == Effect::Create).then_some(&context);
        let body = ReplayBody::new(body, budget, create);
        Self {
            head: Arc::new(head),
            effect,
            context,
            create: None,
            body,
        }
    }

    /// What sending it again could cost.
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Its target.
    pub fn uri(&self) -> &Uri {
        &self.head.uri
    }

    /// What is known of it.
    pub fn context(&self) -> &RequestContext {
        &self.context
    }

    /// Its body, as far as it is kept.
    pub fn body(&self) -> &ReplayBody {
        &self.body
    }

    /// Has each attempt ask whether it may be sent.
    pub fn set_pending(&mut self, create: Arc<PendingCreate>) {
        self.create = Some(create);
    }

    /// One attempt to send it, without a token.
    pub fn attempt(self) -> Attempt {
        let create = self.create.map(|pending| AttemptedCreate {
            pending,
            body: self.body.clone(),
        });
        let mut request = Request::new(self.body.into_body());
        request.method_mut().clone_from(&self.head.method);
        request.uri_mut().clone_from(&self.head.uri);
        request.headers_mut().clone_from(&self.head.headers);
        Attempt {
            request,
            create,
            minted_by: None,
        }
    }
}

// === impl AttemptedCreate ===

impl AttemptedCreate {
    /// Asks, right before the first byte, whether its client still waits for it.
    ///
    /// That the client has left is noticed behind all that it sent before. So this lets the event loop
    /// turn for as long as more of the body comes, which is read meanwhile ([`ReplayBody::read_while`]). The
    /// end of a connection to upstream is seen then, too.
    ///
    /// # Errors
    ///
    /// [`ClientLeft`]: nothing of it may be sent.
    pub async fn begin_sending(&self) -> Result<(), ClientLeft> {
        let mut quiet = 0;
        while quiet < QUIET_TURNS {
            let before = self.body.arrived();
            yield_now().await;
            quiet = if self.body.arrived() > before {
                0
            } else {
                quiet + 1
            };
        }
        self.pending.begin_sending()
    }

    /// There is no task of what was sent.
    pub fn not_created(&self) {
        self.pending.not_created();
    }
}

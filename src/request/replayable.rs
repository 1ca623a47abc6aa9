//! A client's request after it passed the guard. Each attempt to send it is built from it anew.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use http::header::{ACCEPT, HeaderValue, USER_AGENT};
use http::{Method, Uri, request};
use tokio::task::yield_now;

use crate::clock::Correction;
use crate::kling::idempotency::Effect;
use crate::request::context::{ProxyRequest, RequestContext};
use crate::request::headers::{self, NAME};
use crate::request::id::RequestId;
use crate::request::pending_create::{ClientLeft, PendingCreate};
use crate::request::preference;
use crate::request::replay_body::{ReplayBody, ReplayBudget};
use crate::telemetry::metrics::Metrics;

/// A request that can be sent again. Clones share one head, so a clone costs almost nothing. Most requests
/// need only one attempt, and their clone is never used.
#[derive(Clone)]
pub struct ReplayableRequest {
    head: Arc<request::Parts>,
    effect: Effect,
    context: RequestContext,
    /// State of a create, which each attempt consults before it sends.
    create: Option<Arc<PendingCreate>>,
    /// Time that the client wants to wait for the end of the task (`Prefer: wait=N`).
    wait: Option<Duration>,
    /// True for a read of the proxy's own.
    is_own: bool,
    body: ReplayBody,
}

/// One attempt to send a request.
pub struct Attempt {
    /// The request to send, once it has a token.
    pub request: Request,
    /// Permission check before the first byte of a create is sent; `None` for a read.
    pub create: Option<AttemptedCreate>,
    /// Clock correction that was in use when the token was minted; `None` without a minted token.
    pub minted_by: Option<Correction>,
}

/// A create request that is about to be sent.
pub struct AttemptedCreate {
    pending: Arc<PendingCreate>,
    body: ReplayBody,
}

/// Turns of the event loop without new data after which all that a client sent counts as read: one turn for
/// the rest of the data, and one for the end of the connection.
const QUIET_TURNS: u32 = 2;

// === impl ReplayableRequest ===

impl ReplayableRequest {
    /// Keeps the headers of a request that may reach upstream, and the bytes of its body that are read while
    /// `budget` has room. If `is_marked`, the guard has added its id for an upstream on this machine.
    pub fn new(inbound: ProxyRequest, budget: &Arc<ReplayBudget>, is_marked: bool) -> Self {
        let ProxyRequest { request, context } = inbound;
        let effect = Effect::of(&request);
        let (mut head, body) = request.into_parts();
        headers::strip_request(&mut head.headers, is_marked);
        let wait = preference::take(&mut head.headers);
        let create = (effect == Effect::Create).then_some(&context);
        let body = ReplayBody::new(body, budget, create);
        Self {
            head: Arc::new(head),
            effect,
            context,
            create: None,
            wait,
            is_own: false,
            body,
        }
    }

    /// Makes a read of the proxy's own, which carries no header of a client.
    pub fn own_read(target: Uri, metrics: &Arc<Metrics>) -> Self {
        let mut head = Request::new(()).into_parts().0;
        head.uri = target;
        let headers = &mut head.headers;
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(NAME));
        let context = RequestContext::new(RequestId::random(), metrics.enter_uncounted());
        Self {
            head: Arc::new(head),
            effect: Effect::Read,
            context,
            create: None,
            wait: None,
            is_own: true,
            body: ReplayBody::none(),
        }
    }

    /// Returns the time that the client wants to wait for the end of the task.
    pub fn wait(&self) -> Option<Duration> {
        self.wait
    }

    /// Returns true for a read of the proxy's own.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// Returns the effect of the request, which decides if it may be sent again.
    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Returns the method of the request.
    pub fn method(&self) -> &Method {
        &self.head.method
    }

    /// Returns the target of the request.
    pub fn uri(&self) -> &Uri {
        &self.head.uri
    }

    /// Returns the context of the request.
    pub fn context(&self) -> &RequestContext {
        &self.context
    }

    /// Returns the body, which can be sent again as far as it is kept.
    pub fn body(&self) -> &ReplayBody {
        &self.body
    }

    /// Makes each attempt ask `create` for permission before it sends.
    pub fn set_pending(&mut self, create: Arc<PendingCreate>) {
        self.create = Some(create);
    }

    /// Builds one attempt to send the request, without a token.
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
    /// Asks for permission to send, right before the first byte.
    ///
    /// The disconnection of a client is noticed only after all that it sent before has been read. So this
    /// lets the event loop turn as long as more of the body arrives, which is read meanwhile
    /// ([`ReplayBody::read_while`]). The end of a connection to upstream is noticed in these turns, too.
    ///
    /// # Errors
    ///
    /// [`ClientLeft`] if the client has disconnected: nothing of the create may be sent.
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

    /// Records that upstream made no task from the bytes that were sent.
    pub fn not_created(&self) {
        self.pending.not_created();
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use bytesize::ByteSize;
    use futures_util::{FutureExt, stream};
    use tokio::sync::mpsc;

    use super::*;
    use crate::error::BoxError;
    use crate::request::replay_body::ReplayLimits;
    use crate::tasks::ledger::Ledger;
    use crate::telemetry::metrics::Metrics;

    /// Asks for permission to send a create. In each of the first `frames` turns a frame of its body arrives,
    /// and in turn `left` after them its client disconnects.
    async fn begin_sending(frames: usize, left: usize) -> Result<(), ClientLeft> {
        let metrics = Arc::new(Metrics::new().unwrap());
        let limits = ReplayLimits {
            body: ByteSize::kib(64),
            memory: ByteSize::kib(64),
        };
        let budget = Arc::new(ReplayBudget::new(limits, Arc::clone(&metrics)));
        let (client, mut received) = mpsc::unbounded_channel::<Result<&str, BoxError>>();
        let sent = Body::from_stream(stream::poll_fn(move |cx| received.poll_recv(cx)));
        let request = Request::post("/v1/videos/text2video").body(sent).unwrap();
        let request = ProxyRequest::untraced(request, &metrics);
        let mut request = ReplayableRequest::new(request, &budget, false);
        let pending = PendingCreate::new(
            request.context().clone(),
            request.uri().clone(),
            &Ledger::without_store(metrics),
        );
        let pending = Arc::new(pending);
        request.set_pending(Arc::clone(&pending));
        let body = request.body().clone();
        let create = request.attempt().create.unwrap();
        let client = async {
            for _ in 0..frames {
                client.send(Ok("x")).unwrap();
                assert!(body.read_while(|| true).now_or_never().is_none());
                yield_now().await;
            }
            for _ in 1..left {
                yield_now().await;
            }
            pending.client_left();
        };
        let (begun, ()) = tokio::join!(biased; create.begin_sending(), client);
        assert_eq!(pending.is_being_sent(), begun.is_ok());
        create.not_created();
        assert!(!pending.is_being_sent());
        begun
    }

    #[tokio::test]
    async fn create_is_sent_after_two_turns_without_news_of_its_client() {
        for frames in [0, 1, 5] {
            for (left, may_send) in [(1, false), (2, false), (3, true)] {
                let begun = begin_sending(frames, left).await;
                assert_eq!(begun.is_ok(), may_send, "{frames} frames, turn {left}");
            }
        }
    }
}

//! A client's request as it passed the guard. Each attempt to send it is made of it anew.

use std::sync::Arc;

use axum::extract::Request;
use http::{HeaderMap, Uri, request};

use crate::effect::Effect;
use crate::facts::{Facts, Traced};
use crate::replay::{Keeper, Replay};

/// A request that can be sent again. Clones share one head, so that they cost next to nothing: most
/// requests are answered at the first attempt.
#[derive(Clone)]
pub struct Original {
    head: Arc<request::Parts>,
    effect: Effect,
    facts: Option<Facts>,
    body: Replay,
}

// === impl Original ===

impl Original {
    /// Keeps what is read of the body for as long as `keeper` lets it.
    pub fn new(traced: Traced, keeper: &Arc<Keeper>) -> Self {
        let Traced { request, facts } = traced;
        let effect = Effect::of(&request);
        let (head, body) = request.into_parts();
        Self {
            head: Arc::new(head),
            effect,
            facts,
            body: Replay::new(body, keeper),
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

    /// Its headers, those included that must not pass.
    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// What is known of it.
    pub fn facts(&self) -> Option<&Facts> {
        self.facts.as_ref()
    }

    /// Its body, as far as it is kept.
    pub fn body(&self) -> &Replay {
        &self.body
    }

    /// One attempt to send it, with these headers instead of its own.
    pub fn attempt(self, headers: HeaderMap) -> Request {
        let mut request = Request::new(self.body.into_body());
        request.method_mut().clone_from(&self.head.method);
        request.uri_mut().clone_from(&self.head.uri);
        *request.headers_mut() = headers;
        request
    }
}

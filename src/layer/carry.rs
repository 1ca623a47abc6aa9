//! Carries a create through although its client has gone. hyper drops a request's future then, and
//! with it would go the only trace of a paid task: so a create runs on its own, and what came of it
//! is logged if nobody is left to be told.

use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::response::Response;
use futures_util::future::Either;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;
use tower::{Layer, Service};
use tracing::Instrument;

use crate::effect::Effect;
use crate::error::{Error, chain};
use crate::facts::Facts;
use crate::original::Original;
use crate::task::Task;
use crate::telemetry::printable;

/// Adds [`Carry`] to a service.
#[derive(Clone)]
pub struct CarryLayer {
    carried: TaskTracker,
}

/// Runs creates on their own.
#[derive(Clone)]
pub struct Carry<S> {
    inner: S,
    carried: TaskTracker,
}

/// Waits for a create that runs on its own.
pub struct Carried(oneshot::Receiver<Parcel>);

/// A create on its way to its client. Whatever drops it before it was taken, it is logged.
struct Parcel {
    outcome: Outcome,
    order: Original,
}

/// What came of a create.
enum Outcome {
    /// Nothing yet.
    Coming,
    /// This.
    There(Result<Response, Error>),
    /// The client has it.
    Taken,
}

// === impl CarryLayer ===

impl CarryLayer {
    /// Has `carried` track what runs on its own, so that a shutdown can wait for it.
    pub fn new(carried: TaskTracker) -> Self {
        Self { carried }
    }
}

impl<S> Layer<S> for CarryLayer {
    type Service = Carry<S>;

    fn layer(&self, inner: S) -> Carry<S> {
        let carried = self.carried.clone();
        Carry { inner, carried }
    }
}

// === impl Carry ===

impl<S> Service<Original> for Carry<S>
where
    S: Service<Original, Response = Response, Error = Error, Future: Send + 'static>,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Carried>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Original) -> Self::Future {
        if request.effect() == Effect::Read {
            return Either::Left(self.inner.call(request));
        }
        // Before the call, which may send it at once: whatever becomes of the task, the parcel tells.
        let mut parcel = Parcel {
            outcome: Outcome::Coming,
            order: request.clone(),
        };
        let exchange = self.inner.call(request);
        let (sender, receiver) = oneshot::channel();
        let running = async move {
            parcel.arrive(exchange.await);
            // A parcel that is not taken speaks for itself.
            let _ = sender.send(parcel);
        };
        self.carried.spawn(running.in_current_span());
        Either::Right(Carried(receiver))
    }
}

// === impl Carried ===

impl Future for Carried {
    type Output = Result<Response, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let parcel = ready!(Pin::new(&mut self.0).poll(cx));
        let outcome = parcel.map(|mut parcel| mem::replace(&mut parcel.outcome, Outcome::Taken));
        Poll::Ready(match outcome {
            Ok(Outcome::There(outcome)) => outcome,
            // It panicked, which a bug in this program could make it do.
            Ok(Outcome::Coming | Outcome::Taken) | Err(_) => {
                Err(Error::Disconnected("the exchange was aborted".into()))
            }
        })
    }
}

// === impl Parcel ===

impl Parcel {
    fn arrive(&mut self, mut outcome: Result<Response, Error>) {
        let answer = outcome.as_mut().ok();
        let task = answer.and_then(|answer| answer.extensions_mut().remove());
        if let (Some(task), Some(facts)) = (task, self.order.facts()) {
            facts.created(task);
        }
        self.outcome = Outcome::There(outcome);
    }

    /// Logs what came of a create whose client was not told; nothing yet, if it was cut off. The
    /// line may be all that is left of a paid task.
    fn tell(&self, outcome: Option<Result<&Response, &Error>>) {
        let facts = self.order.facts();
        let task = facts.and_then(Facts::task);
        let ordered = self.order.body().with_kept(Task::ordered);
        let external_id = task.and_then(|task| task.external_id.as_ref());
        let external_id = external_id.or(ordered.external_id.as_ref());
        let answer = outcome.and_then(Result::ok);
        let error = outcome.and_then(Result::err);
        let cause = error.map(|error| chain(error));
        tracing::warn!(
            request_id = facts.map(|facts| facts.id().as_str()),
            client = facts.and_then(Facts::client),
            url.path = &*printable(self.order.uri().path()),
            task.id = task.and_then(|task| task.id.as_deref()).map(printable).as_deref(),
            task.external_id = external_id.map(|id| printable(id)).as_deref(),
            http.response.status_code = answer.map(|answer| answer.status().as_u16()),
            http.request.resend_count = facts.and_then(Facts::resend_count),
            error.type = error.map(Error::kind),
            error.cause = cause.as_deref().map(printable).as_deref(),
            "{}",
            match outcome {
                Some(_) => "the client has gone; its create was carried through",
                None => "a create was cut off; its task may exist and be billed",
            }
        );
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        match &self.outcome {
            Outcome::There(outcome) => self.tell(Some(outcome.as_ref())),
            Outcome::Coming => self.tell(None),
            Outcome::Taken => {}
        }
    }
}

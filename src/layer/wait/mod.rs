//! Answers a request with `Prefer: wait=N` when its task has ended, or when N seconds have passed.
//!
//! | request | answer at the end of the task | otherwise |
//! | --- | --- | --- |
//! | read of one task | upstream's answer to that read | upstream's latest answer |
//! | create | upstream's answer to a read of the task | the create's own answer |
//!
//! Once Kling has made the task, the answer to a create is never an error.

pub mod polls;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::future::Either;
use futures_util::stream;
use http::{Method, Uri};
use http_body_util::BodyExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tower::{Layer, Service};

use self::polls::{Polled, SharedPolls};
use crate::error::Error;
use crate::kling::family::{Family, TaskRead};
use crate::kling::idempotency::Effect;
use crate::lifecycle::Lifecycle;
use crate::request::context::RequestContext;
use crate::request::preference;
use crate::request::replayable::ReplayableRequest;
use crate::tasks::waiting::{WaitingPlace, WaitingRoom};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::{CREATES, printable};

/// Adds [`Wait`] to a service.
#[derive(Clone)]
pub struct WaitLayer {
    /// Limits the requests that wait.
    pub room: Arc<WaitingRoom>,
    /// Polls that run, of all threads.
    pub polls: Arc<SharedPolls>,
    /// Phase of the proxy. While it drains, nobody waits.
    pub lifecycle: Arc<Lifecycle>,
    /// Metrics of the whole process.
    pub metrics: Arc<Metrics>,
}

/// Lets requests wait for the end of their task, if they ask for it.
#[derive(Clone)]
pub struct Wait<S> {
    inner: S,
    layer: WaitLayer,
}

/// The event that a request waits for.
enum Wish {
    /// The end of the task that it makes, which this family reads.
    Create(&'static Family),
    /// The end of the task that it reads, with this target.
    Read(Uri),
}

/// Wait before the first poll of a task that has just been made.
const FIRST: Duration = Duration::from_secs(2);
/// Largest answer to a create that can wait, in bytes. Kling's have less than 1 KiB.
const LARGEST: usize = 64 << 10;

// === impl WaitLayer ===

impl<S> Layer<S> for WaitLayer {
    type Service = Wait<S>;

    fn layer(&self, inner: S) -> Wait<S> {
        let layer = self.clone();
        Wait { inner, layer }
    }
}

// === impl Wait ===

impl<S> Service<ReplayableRequest> for Wait<S>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error, Future: Send>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: ReplayableRequest) -> Self::Future {
        let wait = request.wait();
        let Some((wait, wish)) = wait.and_then(|wait| Some((wait, Wish::of(&request)?))) else {
            return Either::Left(self.inner.call(request));
        };
        // Every service of this stack is always ready, and so is a clone of it.
        let waiting = Waiting {
            inner: self.inner.clone(),
            layer: self.layer.clone(),
            deadline: request.context().begun() + wait,
        };
        Either::Right(Box::pin(async move {
            let mut answer = match wish {
                Wish::Read(target) => waiting.read(request, target).await?,
                Wish::Create(family) => waiting.create(request, family).await?,
            };
            preference::applied(&mut answer, wait);
            Ok(answer)
        }))
    }
}

// === impl Wish ===

impl Wish {
    fn of(request: &ReplayableRequest) -> Option<Self> {
        let uri = request.uri();
        match (request.effect(), request.method()) {
            (Effect::Create, &Method::POST) => Family::of_create(uri.path()).map(Self::Create),
            // All who wait for one task have one target, however they have spelled it.
            (Effect::Read, &Method::GET) => {
                let target = TaskRead::target_of_one(uri.path(), uri.query())?;
                target.parse().ok().map(Self::Read)
            }
            _ => None,
        }
    }
}

/// A request that waits, or is about to.
struct Waiting<S> {
    inner: S,
    layer: WaitLayer,
    deadline: Instant,
}

// === impl Waiting ===

impl<S> Waiting<S>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error, Future: Send>
        + Clone
        + Send
        + 'static,
{
    /// Answers a read with upstream's latest answer. Where there is none, the read goes upstream as if it did
    /// not wait.
    async fn read(mut self, request: ReplayableRequest, target: Uri) -> Result<Response, Error> {
        let begun = self.begin(request.context(), target, Duration::ZERO);
        let lifecycle = Arc::clone(&self.layer.lifecycle);
        match wait(begun, self.deadline, lifecycle).await {
            Polled::Running(answer) | Polled::Ended(answer) => Ok(answer.to_response()),
            Polled::Nothing | Polled::Refused => self.inner.call(request).await,
        }
    }

    /// Sends a create, and waits for the end of its task.
    async fn create(
        mut self,
        request: ReplayableRequest,
        family: &Family,
    ) -> Result<Response, Error> {
        let context = request.context().clone();
        let answer = self.inner.call(request).await?;
        let (head, body) = answer.into_parts();
        // The answer has been read whole before the wait, since it is the answer if the wait is in vain.
        let own = match read_whole(body).await {
            Ok(bytes) => Response::from_parts(head, Body::from(bytes)),
            Err(rest) => return Ok(Response::from_parts(head, rest)),
        };
        let id = context.task().and_then(|task| task.id.as_deref());
        // The client may leave while it waits, and then no other line would name the task.
        tracing::info!(
            target: CREATES,
            request_id = context.id().as_str(),
            task.id = id.map(printable).as_deref(),
            task.external_id = context.external_id().map(printable).as_deref(),
            "the task was made; its client waits for the end"
        );
        let plain = id.filter(|id| Family::is_plain_id(id));
        let target = plain.map(|id| family.read_by_id(id));
        let Some(target) = target.and_then(|target| target.parse().ok()) else {
            return Ok(own);
        };
        let begun = self.begin(&context, target, FIRST);
        let lifecycle = Arc::clone(&self.layer.lifecycle);
        Ok(match wait(begun, self.deadline, lifecycle).await {
            Polled::Ended(answer) => answer.to_response(),
            Polled::Nothing | Polled::Running(_) | Polled::Refused => own,
        })
    }

    /// Begins to wait for the end of a task; `None` without a place in the waiting room.
    fn begin(
        &self,
        context: &RequestContext,
        target: Uri,
        delay: Duration,
    ) -> Option<(WaitingPlace, watch::Receiver<Polled>)> {
        let place = self.layer.room.enter(context.client())?;
        context.waits();
        let WaitLayer { polls, metrics, .. } = &self.layer;
        Some((place, polls.join(target, delay, &self.inner, metrics)))
    }
}

/// Waits until a task has ended, the time is over or the proxy drains. Returns what is known then.
async fn wait(
    begun: Option<(WaitingPlace, watch::Receiver<Polled>)>,
    deadline: Instant,
    lifecycle: Arc<Lifecycle>,
) -> Polled {
    let Some((_place, mut polled)) = begun else {
        return Polled::Nothing;
    };
    tokio::select! {
        () = end(&mut polled) => {}
        () = sleep_until(deadline) => {}
        () = lifecycle.draining() => {}
    }
    polled.borrow().clone()
}

/// Waits until a poll is over: with the end of the task, with a refusal, or with its thread.
async fn end(polled: &mut watch::Receiver<Polled>) {
    let is_over = |polled: &Polled| matches!(polled, Polled::Ended(_) | Polled::Refused);
    // An error means that the thread of the poll has ended.
    let _ = polled.wait_for(is_over).await;
}

/// Reads a whole body. A body that is too large, or that fails, is returned as a body with the same bytes and
/// the same failure.
async fn read_whole(mut body: Body) -> Result<Bytes, Body> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => {
                bytes.extend_from_slice(&data);
                if bytes.len() > LARGEST {
                    let begun = stream::once(async { Ok::<_, axum::Error>(bytes.freeze()) });
                    let rest = body.into_data_stream();
                    return Err(Body::from_stream(stream::StreamExt::chain(begun, rest)));
                }
            }
            // Trailers say nothing here.
            Ok(Err(_)) => {}
            Err(error) => {
                let parts = [Ok(bytes.freeze()), Err(error)];
                return Err(Body::from_stream(stream::iter(parts)));
            }
        }
    }
    Ok(bytes.freeze())
}

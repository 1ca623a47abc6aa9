//! Reads what answers to polls and lists say of tasks, while they pass.
//!
//! The bodies pass unchanged. Only answers that may show a running task, or the task of an unknown create, are
//! looked at. So a poll of any other task costs a search in a hash map.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::future::Either;
use http::{Method, StatusCode};
use http_body::{Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::error::Error;
use crate::kling::family::TaskRead;
use crate::kling::idempotency::Effect;
use crate::kling::task_answer::{TaskPlace, TaskSplitter};
use crate::request::replayable::ReplayableRequest;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::{DEFAULT_ACCOUNT, SKEW};
use crate::tasks::store::Observation;
use crate::upstream::Decoder;

/// Adds [`Observe`] to a service.
#[derive(Clone)]
pub struct ObserveLayer {
    ledger: Ledger,
}

/// Reads tasks in the answers of the inner service.
#[derive(Clone)]
pub struct Observe<S> {
    inner: S,
    ledger: Ledger,
}

pin_project! {
    /// Waits for an answer that may show tasks.
    pub struct ObserveFuture<F> {
        #[pin]
        inner: F,
        subject: Option<(Ledger, TaskPlace)>,
    }
}

pin_project! {
    /// Body of an answer, which is read while it passes.
    struct ObservedBody {
        #[pin]
        inner: Body,
        text: Decoder<TaskListener>,
    }
}

/// Takes the text of an answer, and tells the ledger of the tasks in it.
struct TaskListener {
    tasks: TaskSplitter,
    ledger: Ledger,
}

// === impl ObserveLayer ===

impl ObserveLayer {
    /// Tells `ledger` of the tasks in answers.
    pub fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }
}

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        let ledger = self.ledger.clone();
        Observe { inner, ledger }
    }
}

// === impl Observe ===

impl<S> Service<ReplayableRequest> for Observe<S>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, ObserveFuture<S::Future>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: ReplayableRequest) -> Self::Future {
        let place = place_of_tasks(&request, &self.ledger);
        let inner = self.inner.call(request);
        match place {
            None => Either::Left(inner),
            Some(place) => Either::Right(ObserveFuture {
                inner,
                subject: Some((self.ledger.clone(), place)),
            }),
        }
    }
}

/// Returns the place of tasks in the answer to a request; `None` if the answer shows no task that runs.
fn place_of_tasks(request: &ReplayableRequest, ledger: &Ledger) -> Option<TaskPlace> {
    if request.effect() != Effect::Read || ledger.is_idle() {
        return None;
    }
    let path = request.uri().path().trim_end_matches('/');
    if *request.method() == Method::POST {
        return matches!(path, "/tasks" | "/solutions").then_some(TaskPlace::Result);
    }
    let last = path.rsplit('/').next().unwrap_or_default();
    let is_known = |id: &str| ledger.running(id).is_some() || ledger.lost(id).is_some();
    if is_known(last) {
        return Some(TaskPlace::Data);
    }
    if last.starts_with(|c: char| c.is_ascii_digit()) {
        // Another task's id. No list has such a name.
        return None;
    }
    match TaskRead::of_get(path, request.uri().query())? {
        TaskRead::List => Some(TaskPlace::List),
        TaskRead::ByPath(_) => None,
        TaskRead::ByQuery(ids) => {
            let mut ids = ids.split(',').flat_map(|ids| ids.split("%2C"));
            ids.any(is_known).then_some(TaskPlace::List)
        }
    }
}

// === impl ObserveFuture ===

impl<F> Future for ObserveFuture<F>
where
    F: Future<Output = Result<Response, Error>>,
{
    type Output = Result<Response, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.inner.poll(cx))?;
        let subject = this.subject.take();
        let Some((ledger, place)) = subject.filter(|_| answer.status() == StatusCode::OK) else {
            return Poll::Ready(Ok(answer));
        };
        let (head, inner) = answer.into_parts();
        let listener = TaskListener {
            tasks: TaskSplitter::new(place),
            ledger,
        };
        let text = Decoder::to(listener, &head.headers);
        let body = Body::new(ObservedBody { inner, text });
        Poll::Ready(Ok(Response::from_parts(head, body)))
    }
}

// === impl ObservedBody ===

impl http_body::Body for ObservedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.project();
        let step = ready!(this.inner.poll_frame(cx));
        if let Some(Ok(frame)) = &step
            && let Some(data) = frame.data_ref()
        {
            this.text.push(data);
        }
        Poll::Ready(step)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

// === impl TaskListener ===

impl io::Write for TaskListener {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Self { tasks, ledger } = self;
        tasks.push(bytes, |text| {
            // Most answers say what is known already, so a brief look comes first.
            if let Some(brief) = text.brief() {
                match ledger.running_by_id(&brief.id) {
                    None if !ledger.has_lost() => return,
                    Some(task) if ledger.knows(&task, &brief.status) => return,
                    None | Some(_) => {}
                }
            }
            let Some(answered) = text.read() else {
                return;
            };
            let running = ledger.running_by_id(&answered.id);
            let lost = answered
                .external_id
                .as_deref()
                .and_then(|id| ledger.lost(id));
            // A task that is older than the create took the external id before.
            let lost = lost.filter(|lost| answered.is_since(lost.created_at.before(SKEW).0));
            let Some(seen) = Observation::of(answered, DEFAULT_ACCOUNT, ledger.now()) else {
                return;
            };
            match (running, lost) {
                (Some(task), _) => ledger.seen(&task, seen),
                (None, Some(lost)) => ledger.found(Observation {
                    of_create: Some(lost.reference),
                    ..seen
                }),
                (None, None) => {}
            }
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Runs each create in a task of its own, apart from its client's connection.
//!
//! hyper drops a request's future when the client disconnects. The only record of a paid task would be
//! lost with it. Therefore a create that is being sent runs to its end, and the log has its outcome. A
//! create that is not being sent is cancelled.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::future::Either;
use http::StatusCode;
use http_body::{Body as _, Frame, SizeHint};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tower::{Layer, Service};
use tracing::Instrument;

use crate::error::{Error, LateAnswer};
use crate::kling::idempotency::Effect;
use crate::kling::task::TaskReader;
use crate::request::pending_create::{Ending, PendingCreate};
use crate::request::replayable::ReplayableRequest;
use crate::tasks::ledger::Ledger;
use crate::upstream::Decoder;

/// Adds [`Detach`] to a service.
#[derive(Clone)]
pub struct DetachLayer {
    creates: Creates,
}

/// Runs each create in a tokio task of its own, and calls the inner service directly for reads.
#[derive(Clone)]
pub struct Detach<S> {
    inner: S,
    creates: Creates,
}

/// Waits for the outcome of a detached create. Dropping it means that the client has disconnected.
pub struct DetachFuture {
    outcome: oneshot::Receiver<Result<Response, Error>>,
    create: Arc<PendingCreate>,
}

/// State that all creates of one thread share.
#[derive(Clone)]
struct Creates {
    /// Tracks the detached tasks; a shutdown waits for them.
    running: TaskTracker,
    /// One permit for each create that waits for a late response.
    late: Arc<Semaphore>,
    ledger: Ledger,
}

/// Guard for a create without an outcome. If it is dropped while armed, for example at the end of the
/// process, it logs the create as given up.
struct Unfinished(Option<Arc<PendingCreate>>);

/// Body of the response to a create. It reads the task id from the bytes as they pass. If the client
/// leaves a part of the body unread, a detached task reads the rest.
struct AnswerBody {
    /// `None` after a drop: a detached task may own the reader by then.
    reading: Option<AnswerReader>,
    running: TaskTracker,
}

/// Reads the body of a response and extracts the task from it.
struct AnswerReader {
    body: Body,
    text: Decoder<TaskReader>,
    status: StatusCode,
    ended: bool,
    create: Arc<PendingCreate>,
    /// Ending to log if the client does not read the response.
    ending: Ending,
}

/// Longest wait for a late response, from the moment when the client received a timeout error.
const LATE: Duration = Duration::from_mins(5);
/// Most creates of one thread that may wait for a late response at once. Each may hold a connection.
const MOST_LATE: usize = 64;
/// Longest time to read the rest of a response after its client has disconnected.
const READ_ON: Duration = Duration::from_mins(1);

// === impl DetachLayer ===

impl DetachLayer {
    /// Tracks the detached tasks in `running`, so that a shutdown can wait for them. Records the creates in
    /// `ledger`.
    pub fn new(running: TaskTracker, ledger: Ledger) -> Self {
        let late = Arc::new(Semaphore::new(MOST_LATE));
        Self {
            creates: Creates {
                running,
                late,
                ledger,
            },
        }
    }
}

impl<S> Layer<S> for DetachLayer {
    type Service = Detach<S>;

    fn layer(&self, inner: S) -> Detach<S> {
        let creates = self.creates.clone();
        Detach { inner, creates }
    }
}

// === impl Detach ===

impl<S> Service<ReplayableRequest> for Detach<S>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error, Future: Send + 'static>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, DetachFuture>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: ReplayableRequest) -> Self::Future {
        if request.effect() == Effect::Read {
            return Either::Left(self.inner.call(request));
        }
        let create = PendingCreate::new(
            request.context().clone(),
            request.uri().clone(),
            &self.creates.ledger,
        );
        let create = Arc::new(create);
        request.set_pending(Arc::clone(&create));
        let (sender, outcome) = oneshot::channel();
        // Every service of this stack is always ready, and so is a clone of it.
        let run =
            self.creates
                .clone()
                .run(self.inner.clone(), request, Arc::clone(&create), sender);
        self.creates.running.spawn(run.in_current_span());
        Either::Right(DetachFuture { outcome, create })
    }
}

// === impl DetachFuture ===

impl Future for DetachFuture {
    type Output = Result<Response, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(Pin::new(&mut self.outcome).poll(cx));
        self.create.answer();
        Poll::Ready(outcome.unwrap_or_else(|_| {
            // The task ended without an outcome: it panicked, because of a bug in this program.
            Err(Error::Disconnected("the exchange was aborted".into()))
        }))
    }
}

impl Drop for DetachFuture {
    fn drop(&mut self) {
        self.create.client_left();
        self.outcome.close();
        // The outcome may have arrived at the same moment. A response needs no line here: the drop of
        // its body logs it.
        if let Ok(Err(error)) = self.outcome.try_recv() {
            self.create.log_failure(&error, Ending::CarriedThrough);
        }
    }
}

// === impl Creates ===

impl Creates {
    /// Runs a create to its end, and sends the outcome to its client, or to the log.
    async fn run<S>(
        self,
        inner: S,
        request: ReplayableRequest,
        create: Arc<PendingCreate>,
        client: oneshot::Sender<Result<Response, Error>>,
    ) where
        S: Service<ReplayableRequest, Response = Response, Error = Error>,
    {
        let unfinished = Unfinished(Some(Arc::clone(&create)));
        let body = request.body().clone();
        let outcome = tokio::select! {
            biased;
            outcome = exchange(inner, request, &create) => outcome,
            () = create.cancelled() => return,
            error = body.read_while(|| !create.is_being_sent()) => Err(error),
        };
        create.learn(body.order());
        drop(body);
        match outcome {
            Ok(answer) => {
                let answer = self.read_task(answer, &create, Ending::CarriedThrough);
                unfinished.disarm();
                // If the client has disconnected, the body reads the rest when it is dropped.
                let _ = client.send(Ok(answer));
            }
            Err(mut error) => {
                create.failed(&error);
                let late = error.take_late();
                if let Err(Err(error)) = client.send(Err(error)) {
                    create.log_failure(&error, Ending::CarriedThrough);
                }
                match late {
                    Some(late) => self.listen(late, &create, unfinished).await,
                    None => unfinished.disarm(),
                }
            }
        }
    }

    /// Waits for the late response to a create whose client has received a timeout error, and logs it.
    async fn listen(&self, late: LateAnswer, create: &Arc<PendingCreate>, unfinished: Unfinished) {
        let Ok(_permit) = self.late.try_acquire() else {
            return;
        };
        match timeout(LATE, late.wait()).await {
            Ok(Ok(answer)) => {
                unfinished.disarm();
                drop(self.read_task(answer, create, Ending::Late));
            }
            Ok(Err(error)) => {
                unfinished.disarm();
                create.failed(&error);
                create.log_failure(&error, Ending::Late);
            }
            Err(_) => {}
        }
    }

    /// Wraps a response so that its task is read while the body passes.
    fn read_task(&self, answer: Response, create: &Arc<PendingCreate>, ending: Ending) -> Response {
        let (head, body) = answer.into_parts();
        let reading = AnswerReader {
            text: Decoder::to(TaskReader::of_answer(), &head.headers),
            status: head.status,
            ended: body.is_end_stream(),
            body,
            create: Arc::clone(create),
            ending,
        };
        if reading.ended {
            create.unreadable();
        }
        let body = AnswerBody {
            reading: Some(reading),
            running: self.running.clone(),
        };
        Response::from_parts(head, Body::new(body))
    }
}

/// Reads ahead in the request body and records the create, so that it is known before anything is sent. Then
/// sends the request.
async fn exchange<S>(
    mut inner: S,
    request: ReplayableRequest,
    create: &PendingCreate,
) -> Result<Response, Error>
where
    S: Service<ReplayableRequest, Response = Response, Error = Error>,
{
    request.body().read_ahead().await?;
    create.admit(request.body().order()).await;
    inner.call(request).await
}

// === impl Unfinished ===

impl Unfinished {
    /// Disarms the guard: another part logs or delivers the outcome.
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(create) = self.0.take() {
            create.give_up();
        }
    }
}

// === impl AnswerBody ===

impl http_body::Body for AnswerBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(reading) = &mut self.get_mut().reading else {
            return Poll::Ready(None);
        };
        let step = ready!(reading.poll_step(cx));
        if let Some(Err(_)) = step
            && !reading.has_task()
        {
            reading.create.unreadable();
            reading.log(Ending::Unknown);
        }
        Poll::Ready(step)
    }

    fn is_end_stream(&self) -> bool {
        let reading = self.reading.as_ref();
        reading.is_none_or(|reading| reading.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let reading = self.reading.as_ref();
        reading.map_or_else(SizeHint::default, |reading| reading.body.size_hint())
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        let Some(reading) = self.reading.take() else {
            return;
        };
        if !reading.is_over() {
            let unfinished = Unfinished(Some(Arc::clone(&reading.create)));
            // Without a runtime the process is ending; then the drop of `unfinished` logs the create.
            if Handle::try_current().is_ok() {
                let running = reading.read_on(unfinished).in_current_span();
                self.running.spawn(running);
            }
        } else if !reading.create.is_answered() {
            reading.log(reading.ending);
        }
    }
}

// === impl AnswerReader ===

impl AnswerReader {
    fn poll_step(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let step = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &step {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.text.push(data);
                }
                self.ended = self.body.is_end_stream();
            }
            Some(Err(_)) | None => self.ended = true,
        }
        if self.is_over() && !matches!(step, Some(Err(_))) {
            match self.text.get_ref() {
                Some(reader) => self.create.created(reader.task()),
                None => self.create.unreadable(),
            }
        }
        Poll::Ready(step)
    }

    /// Reads until the task is known or the body ends, and then logs the task. If the body fails before, the
    /// task is unknown.
    async fn read_on(mut self, unfinished: Unfinished) {
        let reading = async {
            while !self.is_over() {
                if let Some(Err(_)) = poll_fn(|cx| self.poll_step(cx)).await {
                    return false;
                }
            }
            true
        };
        let is_whole = timeout(READ_ON, reading).await.unwrap_or(false);
        unfinished.disarm();
        if !is_whole {
            self.create.unreadable();
        }
        self.log(if is_whole {
            self.ending
        } else {
            Ending::Unknown
        });
    }

    /// Returns true if the rest of the body holds nothing about the task.
    fn is_over(&self) -> bool {
        self.ended || self.has_task()
    }

    fn has_task(&self) -> bool {
        self.text.get_ref().is_some_and(TaskReader::is_complete)
    }

    fn log(&self, ending: Ending) {
        self.create.log_answer(self.status, ending);
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;
    use std::sync::Mutex;

    use axum::extract::Request;
    use bytesize::ByteSize;
    use futures_util::stream;
    use http_body_util::BodyExt;
    use tokio::sync::Notify;
    use tower::service_fn;
    use tracing::field::Field;
    use tracing::{Event, Subscriber};
    use tracing_subscriber::layer::{self, SubscriberExt};

    use super::*;
    use crate::error::BoxError;
    use crate::request::context::ProxyRequest;
    use crate::request::replay_body::{ReplayBudget, ReplayLimits};
    use crate::telemetry::CREATES;
    use crate::telemetry::metrics::Metrics;

    const SUCCESS: &str = r#"{"code":0,"data":{"task_id":"t-1"}}"#;
    const START: &str = r#"{"code":0,"data":{"#;

    /// Keeps the message of each log line about a create, and the id of the task that the line names.
    #[derive(Clone, Default)]
    struct Capture(Arc<Mutex<Vec<(String, String)>>>);

    impl<S: Subscriber> layer::Layer<S> for Capture {
        fn on_event(&self, event: &Event<'_>, _: layer::Context<'_, S>) {
            if event.metadata().target() != CREATES {
                return;
            }
            let (mut message, mut task) = (String::new(), String::new());
            event.record(
                &mut |field: &Field, value: &dyn fmt::Debug| match field.name() {
                    "message" => message = format!("{value:?}"),
                    "task.id" => task = format!("{value:?}").replace('"', ""),
                    _ => {}
                },
            );
            self.0.lock().unwrap().push((message, task));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Client {
        /// Reads the whole response.
        Reads,
        /// Disconnects after the head of the response.
        LeavesInside,
        /// Disconnects while the create is being sent.
        LeavesBefore,
        /// Disconnects before the create is sent.
        LeavesUnsent,
    }

    fn create() -> ReplayableRequest {
        let metrics = Arc::new(Metrics::new().unwrap());
        let none = ReplayLimits {
            body: ByteSize::b(0),
            memory: ByteSize::b(0),
        };
        let request = Request::post("/v1/videos/text2video").body(Body::empty());
        let request = ProxyRequest::untraced(request.unwrap(), &metrics);
        ReplayableRequest::new(request, &Arc::new(ReplayBudget::new(none, metrics)), false)
    }

    /// Creates a response whose body has these parts. An empty part stands for a failure.
    fn answer(parts: &'static [&str]) -> Response {
        let parts = parts.iter().map(|part| match *part {
            "" => Err(BoxError::from("reset")),
            part => Ok(part),
        });
        Response::new(Body::from_stream(stream::iter(parts)))
    }

    fn timed_out(late: LateAnswer) -> Error {
        Error::UpstreamTimeout {
            limit: Duration::from_secs(1),
            late: Some(late),
        }
    }

    fn disconnected() -> Error {
        Error::Disconnected("reset".into())
    }

    type Outcome = fn() -> Result<Response, Error>;

    fn ledger() -> Ledger {
        Ledger::without_store(Arc::new(Metrics::new().unwrap()))
    }

    /// Runs a create that has this outcome. Returns the log lines about it.
    async fn lines(outcome: Outcome, client: Client) -> Vec<(String, String)> {
        let capture = Capture::default();
        let lines = tracing_subscriber::registry().with(capture.clone());
        let _lines = tracing::subscriber::set_default(lines);
        let [sending, go_on] = [(); 2].map(|()| Arc::new(Notify::new()));
        let (begun, wait) = (Arc::clone(&sending), Arc::clone(&go_on));
        let inner = service_fn(move |request: ReplayableRequest| {
            let (begun, wait) = (Arc::clone(&begun), Arc::clone(&wait));
            async move {
                let create = request.attempt().create.unwrap();
                create.begin_sending().await.unwrap();
                begun.notify_one();
                wait.notified().await;
                outcome()
            }
        });
        let running = TaskTracker::new();
        let waiting = DetachLayer::new(running.clone(), ledger())
            .layer(inner)
            .call(create());
        if !matches!(client, Client::LeavesUnsent) {
            sending.notified().await;
        }
        go_on.notify_one();
        match client {
            Client::LeavesUnsent | Client::LeavesBefore => drop(waiting),
            Client::LeavesInside => drop(waiting.await),
            Client::Reads => {
                if let Ok(answer) = waiting.await {
                    let _ = answer.into_body().collect().await;
                }
            }
        }
        running.close();
        running.wait().await;
        let lines = capture.0.lock().unwrap();
        lines.clone()
    }

    #[tokio::test(start_paused = true)]
    async fn log_of_a_create_has_the_outcome_that_its_client_does_not_get() {
        use Client::{LeavesBefore, LeavesInside, LeavesUnsent, Reads};
        let success: Outcome = || Ok(answer(&[SUCCESS]));
        let failure_after: Outcome = || Ok(answer(&[SUCCESS, ""]));
        let failure_before: Outcome = || Ok(answer(&[START, ""]));
        let no_task: Outcome = || Ok(answer(&["{", "}"]));
        let no_body: Outcome = || Ok(Response::new(Body::empty()));
        let error: Outcome = || Err(disconnected());
        let late: Outcome = || Err(timed_out(LateAnswer::new(async { Ok(answer(&[SUCCESS])) })));
        let late_error: Outcome = || Err(timed_out(LateAnswer::new(async { Err(disconnected()) })));
        let never: Outcome = || Err(timed_out(LateAnswer::new(std::future::pending())));
        let carried = "the client has gone";
        let (too_late, unknown) = ("after its client was told", "no whole answer");
        // After the line of the first attempt: part of the only other line, if there is one, and the task.
        for (name, outcome, client, line, task) in [
            ("success", success, Reads, "", ""),
            ("success", success, LeavesInside, carried, "t-1"),
            ("success", success, LeavesBefore, carried, "t-1"),
            ("failure after the task", failure_after, Reads, "", ""),
            (
                "failure after the task",
                failure_after,
                LeavesBefore,
                carried,
                "t-1",
            ),
            (
                "failure before the task",
                failure_before,
                Reads,
                unknown,
                "",
            ),
            (
                "failure before the task",
                failure_before,
                LeavesBefore,
                unknown,
                "",
            ),
            ("no task", no_task, Reads, "", ""),
            ("no task", no_task, LeavesInside, carried, ""),
            ("no body", no_body, Reads, "", ""),
            ("no body", no_body, LeavesBefore, carried, ""),
            ("error", error, Reads, "", ""),
            ("error", error, LeavesBefore, carried, ""),
            ("late", late, Reads, too_late, "t-1"),
            ("late error", late_error, Reads, too_late, ""),
            ("never", never, Reads, "a create was cut off", ""),
            ("never sent", success, LeavesUnsent, "", ""),
        ] {
            let case = format!("{name}, client {client:?}");
            let lines = lines(outcome, client).await;
            let (first, rest) = lines.split_first().expect(&case);
            let begun = if matches!(client, LeavesUnsent) {
                "cancelled"
            } else {
                "sending"
            };
            assert!(first.0.starts_with(begun), "{case}: {lines:?}");
            match rest {
                [] => assert_eq!(line, "", "{case}"),
                [only] => {
                    assert!(
                        !line.is_empty() && only.0.contains(line),
                        "{case}: {lines:?}"
                    );
                    assert_eq!(only.1, task, "{case}");
                }
                _ => panic!("{case}: {lines:?}"),
            }
        }
    }

    #[tokio::test]
    async fn length_of_a_response_passes_unchanged() {
        let inner = service_fn(|_| async { Ok(Response::new(Body::from(SUCCESS))) });
        let layer = DetachLayer::new(TaskTracker::new(), ledger());
        let mut body = layer.layer(inner).call(create()).await.unwrap().into_body();
        let length = SUCCESS.len() as u64;
        assert_eq!(
            (body.size_hint().exact(), body.is_end_stream()),
            (Some(length), false)
        );
        body.frame().await.unwrap().unwrap();
        assert_eq!(
            (body.size_hint().exact(), body.is_end_stream()),
            (Some(0), true)
        );
    }
}

//! Polls of tasks that several clients wait for. However many they are, upstream is asked once per interval.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::Uri;
use http::response::Parts;
use http_body_util::BodyExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tower::Service;

use crate::error::Error;
use crate::kling::idempotency::Effect;
use crate::kling::service_code;
use crate::kling::task_answer::{TaskPlace, TaskSplitter};
use crate::request::replayable::ReplayableRequest;
use crate::tasks::state::TaskState;
use crate::telemetry::metrics::Metrics;

/// All polls that run, by their target.
#[derive(Default)]
pub struct SharedPolls(Mutex<HashMap<Uri, watch::Receiver<Polled>>>);

/// The latest outcome of a poll.
#[derive(Clone, Default)]
pub enum Polled {
    /// Upstream has not answered yet.
    #[default]
    Nothing,
    /// The task runs, as this answer says.
    Running(Arc<WholeAnswer>),
    /// The task has ended, as this answer says.
    Ended(Arc<WholeAnswer>),
    /// Upstream refuses the poll, and would do so again.
    Refused,
}

/// An answer with its whole body.
pub struct WholeAnswer {
    head: Parts,
    body: Bytes,
}

/// Wait between two polls in the first minute, and after it.
const INTERVALS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(5)];
/// Time after which the longer wait applies.
const LONG: Duration = Duration::from_mins(1);
/// Longest time of one poll, and longest wait after refusals for the rate.
const LONGEST: Duration = Duration::from_mins(1);
/// Largest answer of a poll, in bytes. Larger ones show nothing here.
const LARGEST: usize = 1 << 20;

// === impl SharedPolls ===

impl SharedPolls {
    /// Joins the poll of a target, or starts it: at once, or with a `delay`. The poll ends when nobody waits
    /// for it.
    pub fn join<S>(
        self: &Arc<Self>,
        target: Uri,
        delay: Duration,
        inner: &S,
        metrics: &Arc<Metrics>,
    ) -> watch::Receiver<Polled>
    where
        S: Service<ReplayableRequest, Response = Response, Error = Error, Future: Send>
            + Clone
            + Send
            + 'static,
    {
        let mut running = self.lock();
        // A poll whose sender is gone has ended with its thread.
        if let Some(polled) = running.get(&target)
            && polled.has_changed().is_ok()
        {
            return polled.clone();
        }
        let (sender, polled) = watch::channel(Polled::Nothing);
        running.insert(target.clone(), polled.clone());
        drop(running);
        let poll = Poll {
            polls: Arc::clone(self),
            target,
            delay,
            sender,
            metrics: Arc::clone(metrics),
        };
        tokio::spawn(poll.run(inner.clone()));
        polled
    }

    /// Removes a poll that nobody waits for. Returns false if somebody does.
    fn leave(&self, target: &Uri, sender: &watch::Sender<Polled>) -> bool {
        let mut running = self.lock();
        // The map itself holds one receiver.
        let is_left = sender.receiver_count() <= 1;
        if is_left {
            running.remove(target);
        }
        is_left
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uri, watch::Receiver<Polled>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One poll that runs, with the channel to those who wait for it.
struct Poll {
    polls: Arc<SharedPolls>,
    target: Uri,
    delay: Duration,
    sender: watch::Sender<Polled>,
    metrics: Arc<Metrics>,
}

// === impl Poll ===

impl Poll {
    async fn run<S>(self, mut inner: S)
    where
        S: Service<ReplayableRequest, Response = Response, Error = Error>,
    {
        let begun = Instant::now();
        // Wait after a refusal for the rate, doubled by each further one.
        let mut pause = Duration::ZERO;
        let place = TaskPlace::of_target(&self.target.to_string());
        sleep(self.delay).await;
        while !self.polls.leave(&self.target, &self.sender) {
            let request = ReplayableRequest::own_read(self.target.clone(), &self.metrics);
            let asked = async {
                match inner.call(request).await {
                    Ok(answer) => Ok(outcome(answer, place).await),
                    Err(error) => Err(error),
                }
            };
            let mut is_too_fast = false;
            let polled = match timeout(LONGEST, asked).await {
                Ok(Ok(polled)) => polled,
                Ok(Err(error)) if error.retryable(Effect::Read) => {
                    is_too_fast = error.code() == service_code::RATE_LIMITED;
                    None
                }
                Ok(Err(_)) => Some(Polled::Refused),
                Err(_) => None,
            };
            pause = if is_too_fast {
                (pause * 2).clamp(INTERVALS[1], LONGEST)
            } else {
                Duration::ZERO
            };
            if let Some(polled) = polled {
                let is_over = matches!(polled, Polled::Ended(_) | Polled::Refused);
                self.sender.send_replace(polled);
                if is_over {
                    self.polls.lock().remove(&self.target);
                    return;
                }
            }
            let [short, long] = INTERVALS;
            let interval = if begun.elapsed() < LONG { short } else { long };
            sleep(interval.max(pause)).await;
        }
    }
}

/// Reads an answer; `None` if it is cut off, is too large or shows no task.
async fn outcome(answer: Response, place: TaskPlace) -> Option<Polled> {
    let (head, mut body) = answer.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.ok()?.into_data() {
            if bytes.len() + data.len() > LARGEST {
                return None;
            }
            bytes.extend_from_slice(&data);
        }
    }
    let mut state = None;
    TaskSplitter::new(place).push(&bytes, |task| {
        let status = task.read().map(|task| task.status);
        state = status.as_deref().and_then(TaskState::from_kling);
    });
    let answer = Arc::new(WholeAnswer {
        head,
        body: bytes.freeze(),
    });
    Some(match state {
        Some(state) if state.is_ended() => Polled::Ended(answer),
        _ => Polled::Running(answer),
    })
}

// === impl WholeAnswer ===

impl WholeAnswer {
    /// Returns a copy for one client.
    pub fn to_response(&self) -> Response {
        Response::from_parts(self.head.clone(), Body::from(self.body.clone()))
    }
}

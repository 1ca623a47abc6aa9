//! Looks a create up after a failure that may have made its task, and answers with the task.
//!
//! A create can be looked up if it carries an external id. Nothing is sent a second time. A look-up that finds
//! no task proves nothing here: the client then gets the failure, and the task counts as unknown.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use futures_util::future::Either;
use http::Uri;
use http::header::{CONTENT_TYPE, HeaderValue};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout};
use tower::{Layer, Service};

use crate::error::Error;
use crate::kling::family::{ExternalIdPlace, Family};
use crate::kling::idempotency::Effect;
use crate::layer::retry::RetryPolicy;
use crate::request::context::RequestContext;
use crate::request::replayable::ReplayableRequest;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::SKEW;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::{CREATES, printable};

/// Adds [`Recover`] to a service.
#[derive(Clone)]
pub struct RecoverLayer {
    /// Memory of all tasks. A task of another create is not the one that is looked for.
    pub ledger: Ledger,
    /// Policy whose total time limits the look-ups too.
    pub retry_policy: RetryPolicy,
    /// Metrics of the whole process.
    pub metrics: Arc<Metrics>,
}

/// Answers a create whose answer was lost with its task.
#[derive(Clone)]
pub struct Recover<S> {
    inner: S,
    layer: RecoverLayer,
}

/// A create that may be looked up.
struct Subject {
    family: &'static Family,
    context: RequestContext,
    /// Latest start of a look-up.
    deadline: Instant,
}

/// Waits before the look-ups, counted from the failure.
const LOOK_UPS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(5),
];
/// Longest time of one look-up. Kling answers reads in 0.3 s (measured by `aself101/kling-api`).
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest answer to a look-up, in bytes.
const LARGEST: usize = 64 << 10;
/// Longest wait for the store.
const STORE: Duration = Duration::from_millis(500);

// === impl RecoverLayer ===

impl<S> Layer<S> for RecoverLayer {
    type Service = Recover<S>;

    fn layer(&self, inner: S) -> Recover<S> {
        let layer = self.clone();
        Recover { inner, layer }
    }
}

// === impl Recover ===

impl<S> Service<ReplayableRequest> for Recover<S>
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
        let subject = Subject::of(&request, self.layer.retry_policy.total_time());
        let sent = self.inner.call(request);
        let Some(subject) = subject else {
            return Either::Left(sent);
        };
        let (inner, layer) = (self.inner.clone(), self.layer.clone());
        Either::Right(Box::pin(async move {
            match sent.await {
                Err(error) if error.may_hide_a_task() => {
                    layer.look_up(inner, &subject).await.ok_or(error)
                }
                other => other,
            }
        }))
    }
}

// === impl Subject ===

impl Subject {
    /// Returns the subject of a create; `None` for any other request.
    fn of(request: &ReplayableRequest, total_time: Duration) -> Option<Self> {
        if request.effect() != Effect::Create {
            return None;
        }
        let context = request.context();
        let family = Family::of_create(request.uri().path())?;
        let wait = request.wait().unwrap_or_default();
        Some(Self {
            family,
            context: context.clone(),
            deadline: context.begun() + total_time.max(wait),
        })
    }

    /// Returns the target of the look-up; `None` without an external id, or if it cannot stand in a target.
    /// The id may have come late in the body, so it is known after the create only.
    fn target(&self) -> Option<Uri> {
        let id = self.context.external_id()?;
        let target = self.family.read_by_external_id(id)?;
        Family::is_plain_id(id).then(|| target.parse().ok())?
    }

    /// Returns the task in an answer to a look-up, as the create would have answered with it.
    ///
    /// A task that is older than the create is another one's: the external id was taken before.
    fn task_in(&self, answer: &Value, begun_at: i64) -> Option<Value> {
        let data = &answer["data"];
        let task = data
            .as_array()
            .map_or(data, |tasks| tasks.first().unwrap_or(data));
        let (id, status, echo, times) = match self.family.external_id {
            ExternalIdPlace::Top => (
                "task_id",
                "task_status",
                &task["task_info"]["external_task_id"],
                ["created_at", "updated_at"],
            ),
            ExternalIdPlace::Options => (
                "id",
                "status",
                &task["external_id"],
                ["create_time", "update_time"],
            ),
        };
        let earliest = begun_at.saturating_sub(i64::try_from(SKEW.as_millis()).unwrap_or(0));
        let is_new = task[times[0]]
            .as_i64()
            .is_none_or(|created| created >= earliest);
        let is_it = self
            .context
            .external_id()
            .is_some_and(|external_id| *echo == *external_id);
        if !task[id].is_string() || !is_it || !is_new {
            return None;
        }
        let mut data = json!({ id: task[id], status: task[status] });
        match self.family.external_id {
            ExternalIdPlace::Top => data["task_info"] = json!({ "external_task_id": echo }),
            ExternalIdPlace::Options => data["external_id"] = echo.clone(),
        }
        for time in times {
            data[time] = task[time].clone();
        }
        Some(data)
    }
}

// === impl RecoverLayer ===

impl RecoverLayer {
    /// Looks for the task of a create as long as the time allows. Returns the answer that the create would
    /// have got.
    async fn look_up<S>(&self, mut inner: S, subject: &Subject) -> Option<Response>
    where
        S: Service<ReplayableRequest, Response = Response, Error = Error>,
    {
        let target = subject.target()?;
        let failed = Instant::now();
        let age = i64::try_from(subject.context.begun().elapsed().as_millis()).unwrap_or(0);
        let begun_at = self.ledger.now().0.saturating_sub(age);
        for wait in LOOK_UPS {
            let start = failed + wait;
            if start > subject.deadline {
                return None;
            }
            sleep_until(start).await;
            let request = ReplayableRequest::own_read(target.clone(), &self.metrics);
            let read = async {
                let answer = inner.call(request).await.ok()?;
                let body = Limited::new(answer.into_body(), LARGEST).collect().await;
                serde_json::from_slice(&body.ok()?.to_bytes()).ok()
            };
            // The client waits for its answer, so a look-up must not hang.
            let answer = timeout(PATIENCE, read).await.ok().flatten();
            let Some(data) = answer.and_then(|answer| subject.task_in(&answer, begun_at)) else {
                continue;
            };
            if self.is_of_another(&data, &subject.context).await {
                return None;
            }
            tracing::info!(
                target: CREATES,
                request_id = subject.context.id().as_str(),
                task.external_id = subject.context.external_id().map(printable).as_deref(),
                "the answer to a create was lost; its task was found"
            );
            return Some(created(&data, subject.context.id().as_str()));
        }
        None
    }

    /// Returns true if the task may be that of another create. If the store does not answer, it may be.
    async fn is_of_another(&self, data: &Value, context: &RequestContext) -> bool {
        let id = data["task_id"].as_str().or_else(|| data["id"].as_str());
        let id = id.unwrap_or_default().to_owned();
        let known = self.ledger.read(move |store| store.find(&id, None));
        match timeout(STORE, known).await {
            Ok(Ok(Some(task))) => context.reference() != Some(&task.reference),
            Ok(Ok(None)) => false,
            Ok(Err(_)) | Err(_) => true,
        }
    }
}

/// Makes the answer to a create.
fn created(data: &Value, request_id: &str) -> Response {
    let answer = json!({ "code": 0, "message": "SUCCEED", "request_id": request_id, "data": data });
    let mut answer = Response::new(Body::from(format!("{answer}\n")));
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(CONTENT_TYPE, json);
    answer
}

#[cfg(test)]
mod tests {
    use axum::extract::Request;
    use bytesize::ByteSize;

    use super::*;
    use crate::request::context::ProxyRequest;
    use crate::request::replay_body::{ReplayBudget, ReplayLimits};

    const BEGUN: i64 = 1_800_000_000_000;

    fn subject(path: &str, external_id: &str) -> Subject {
        let metrics = Arc::new(Metrics::new().unwrap());
        let none = ReplayLimits {
            body: ByteSize::b(0),
            memory: ByteSize::b(0),
        };
        let request = Request::post(path).body(Body::empty()).unwrap();
        let request = ProxyRequest::untraced(request, &metrics);
        request.context.is_named(external_id);
        let budget = Arc::new(ReplayBudget::new(none, metrics));
        let request = ReplayableRequest::new(request, &budget, false);
        Subject::of(&request, Duration::ZERO).unwrap()
    }

    fn legacy(external_id: &str, created_at: i64) -> Value {
        json!({ "code": 0, "data": {
            "task_id": "8", "task_status": "processing", "task_status_msg": "",
            "task_info": { "external_task_id": external_id },
            "created_at": created_at, "updated_at": created_at,
        } })
    }

    fn standard(external_id: &str) -> Value {
        json!({ "code": 0, "data": [{
            "id": "8", "status": "processing", "external_id": external_id, "outputs": [],
            "create_time": BEGUN, "update_time": BEGUN,
        }] })
    }

    #[test]
    fn task_is_found_by_its_external_id_and_no_other_is() {
        let skew = i64::try_from(SKEW.as_millis()).unwrap();
        let legacy_data = json!({
            "task_id": "8", "task_status": "processing",
            "task_info": { "external_task_id": "mine" },
            "created_at": BEGUN, "updated_at": BEGUN,
        });
        let standard_data = json!({
            "id": "8", "status": "processing", "external_id": "mine",
            "create_time": BEGUN, "update_time": BEGUN,
        });
        let [old, new] =
            ["/v1/videos/text2video", "/text-to-video/kling-3.0"].map(|path| subject(path, "mine"));
        for (subject, answer, found) in [
            (&old, legacy("mine", BEGUN), Some(legacy_data)),
            (&old, legacy("other", BEGUN), None),
            // The id was taken before.
            (&old, legacy("mine", BEGUN - skew - 1), None),
            (
                &old,
                json!({ "code": 1201, "message": "not found", "data": null }),
                None,
            ),
            (&old, json!({ "data": {} }), None),
            (&new, standard("mine"), Some(standard_data)),
            (&new, standard("other"), None),
            (&new, json!({ "code": 0, "data": [] }), None),
        ] {
            assert_eq!(subject.task_in(&answer, BEGUN), found, "{answer}");
        }
    }

    #[test]
    fn id_that_cannot_stand_in_a_target_is_not_looked_up() {
        for (id, target) in [
            ("mine-1.x_y", Some("/v1/videos/text2video/mine-1.x_y")),
            ("../../account/costs", None),
            ("a/b", None),
            ("a?b", None),
            ("a b", None),
            ("ä", None),
            ("", None),
            (".", None),
            ("..", None),
        ] {
            let found = subject("/v1/videos/text2video", id)
                .target()
                .map(|target| target.to_string());
            assert_eq!(found.as_deref(), target, "{id}");
        }
    }
}

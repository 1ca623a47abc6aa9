//! Answers the requests about tasks: everything below `/_proxy/tasks`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::Method;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep_until};
use tower::Service;

use super::search::{Found, Search};
use crate::error::Error;
use crate::kling::family::Family;
use crate::layer::wait::WaitLayer;
use crate::request::context::{ProxyRequest, RequestContext};
use crate::request::preference;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::{TaskRecord, TaskRef};
use crate::tasks::state::TaskState;
use crate::tasks::store::ListQuery;
use crate::tasks::view::{BadQuery, PageView, TaskView};

/// Path of the list of all tasks. A further segment names one task.
pub const TASKS: &str = "/_proxy/tasks";

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");
const NO_SNIFF: HeaderValue = HeaderValue::from_static("nosniff");

/// A request about tasks, as far as its head shows it.
#[derive(Clone)]
pub struct TaskRequest {
    method: Method,
    /// The id in the path; `None` for the list.
    id: Option<String>,
    query: String,
    /// The client whose tasks the request may see; `None` for all tasks.
    client: Option<String>,
    context: RequestContext,
}

// === impl TaskRequest ===

impl TaskRequest {
    /// Reads a request; `None` if its path is not about tasks. With client tokens, a client sees the tasks
    /// that its own name has created.
    pub fn of(request: &Request, context: &RequestContext) -> Option<Self> {
        let rest = request.uri().path().strip_prefix(TASKS)?;
        let id = match rest.strip_prefix('/') {
            None if rest.is_empty() => None,
            None => return None,
            Some("") => None,
            Some(id) => {
                // An external id may have any character. What is no UTF-8 is the id of no task.
                let id = percent_decode_str(id).decode_utf8_lossy();
                Some(id.into_owned())
            }
        };
        Some(Self {
            method: request.method().clone(),
            id,
            query: request.uri().query().unwrap_or_default().to_owned(),
            client: context.client().map(str::to_owned),
            context: context.clone(),
        })
    }

    /// Answers a request that only reads, as [`answer`](Self::answer) does.
    ///
    /// # Errors
    ///
    /// [`Error::MethodNotAllowed`] for any method but GET and HEAD, and the errors of `answer`.
    pub async fn read(self, ledger: Ledger) -> Result<Response, Error> {
        match self.method {
            Method::GET | Method::HEAD => self.answer(ledger).await,
            _ => Err(Error::MethodNotAllowed),
        }
    }

    /// Answers the request from the store.
    ///
    /// # Errors
    ///
    /// - [`Error::NotFound`] if there is no such task, or if it is another client's.
    /// - [`Error::BadRequest`] if the query of a list is not understood.
    /// - [`Error::TaskNotCancelable`] for the cancellation of a create that was sent.
    /// - [`Error::StoreUnavailable`] if the store does not answer.
    pub async fn answer(self, ledger: Ledger) -> Result<Response, Error> {
        let Self {
            method,
            id,
            query,
            client,
            context: _,
        } = self;
        match (method, id) {
            (Method::GET | Method::HEAD, None) => list(&query, client, &ledger).await,
            (Method::GET | Method::HEAD, Some(id)) => {
                let task = find(id, client, &ledger).await?;
                Ok(json(&TaskView::from(&task)))
            }
            (Method::DELETE, Some(id)) => {
                let task = find(id, client, &ledger).await?;
                match task.state {
                    TaskState::Canceled => Ok(json(&TaskView::from(&task))),
                    _ => Err(Error::TaskNotCancelable),
                }
            }
            _ => Err(Error::MethodNotAllowed),
        }
    }
}

impl TaskRequest {
    /// Searches upstream for a task that the store does not know, and records it. With client tokens it does
    /// not, because the task may be another client's.
    pub async fn search<S>(&self, search: &Search, inner: S, ledger: &Ledger)
    where
        S: Service<ProxyRequest, Response = Response, Error = Error>,
    {
        let (&Method::GET, Some(id), None) = (&self.method, &self.id, &self.client) else {
            return;
        };
        let known = find(id.clone(), None, ledger).await;
        if let Err(Error::NotFound(_)) = known
            && let Some(Found { family, task }) = search.find(id, inner, &self.context).await
        {
            ledger.adopt(family, task, self.context.id().as_str());
        }
    }

    /// Answers the request when its task has ended, or when the time is over. Meanwhile, `inner` polls the task
    /// for all who wait for it.
    ///
    /// # Errors
    ///
    /// As [`answer`](Self::answer).
    pub async fn wait<S>(
        self,
        time: Duration,
        mut inner: S,
        ledger: Ledger,
        wait: WaitLayer,
    ) -> Result<Response, Error>
    where
        S: Service<ProxyRequest, Response = Response, Error = Error>,
    {
        let (&Method::GET, Some(id)) = (&self.method, &self.id) else {
            return self.answer(ledger).await;
        };
        let deadline = self.context.begun() + time;
        let mut changes = ledger.changes();
        let mut place = None;
        loop {
            let task = find(id.clone(), self.client.clone(), &ledger).await?;
            if task.state.is_ended() || Instant::now() >= deadline || wait.lifecycle.is_draining() {
                break;
            }
            if let Some(poll) = self.poll(&task, time) {
                // It waits in this one's place. Its answer is upstream's; the record has the news by then.
                drop(place);
                let _ = inner.call(poll).await;
                break;
            }
            // The create is being sent, or nobody can read such a task.
            if place.is_none() {
                place = wait.room.enter(self.client.as_deref());
                if place.is_none() {
                    break;
                }
                self.context.waits();
            }
            tokio::select! {
                () = changed(&mut changes, &task.reference) => {}
                () = sleep_until(deadline) => {}
                () = wait.lifecycle.draining() => {}
            }
        }
        let mut answer = self.answer(ledger).await?;
        preference::applied(&mut answer, time);
        Ok(answer)
    }

    /// Makes the request that waits for the end of a task at Kling; `None` if it has no id yet, or no family.
    /// It has the context of this one, so it counts the time from the same moment.
    fn poll(&self, task: &TaskRecord, time: Duration) -> Option<ProxyRequest> {
        let family = Family::named(task.family.as_deref()?)?;
        let id = task
            .task_id
            .as_deref()
            .filter(|id| Family::is_plain_id(id))?;
        let request = Request::builder()
            .uri(family.read_by_id(id))
            .header("prefer", format!("wait={}", time.as_secs()))
            .body(Body::empty());
        Some(ProxyRequest {
            request: request.ok()?,
            context: self.context.clone(),
        })
    }
}

/// Waits until a task changes, or until changes were missed.
async fn changed(changes: &mut broadcast::Receiver<Arc<TaskRecord>>, task: &TaskRef) {
    while let Ok(record) = changes.recv().await {
        if record.reference == *task {
            return;
        }
    }
}

async fn list(query: &str, client: Option<String>, ledger: &Ledger) -> Result<Response, Error> {
    let query = ListQuery::of_request(query, ledger.now());
    let mut query = query.map_err(|BadQuery(problem)| Error::BadRequest(problem))?;
    if let Some(client) = client {
        if query.client.as_ref().is_some_and(|asked| *asked != client) {
            // The tasks of others are not there for this client.
            return Ok(json(&PageView::empty()));
        }
        query.client = Some(client);
    }
    let page = ledger.read(move |store| store.list(&query)).await?;
    Ok(json(&PageView::from(&page)))
}

/// Finds a task that the client may see.
///
/// # Errors
///
/// [`Error::NotFound`], or [`Error::StoreUnavailable`].
pub(super) async fn find(
    id: String,
    client: Option<String>,
    ledger: &Ledger,
) -> Result<TaskRecord, Error> {
    let found = ledger
        .read(move |store| store.find(&id, client.as_deref()))
        .await?;
    found.ok_or(Error::NotFound("there is no such task"))
}

/// Answers with JSON and a newline, which nobody may keep or take for something else.
fn json(value: &impl Serialize) -> Response {
    // A struct of texts and numbers cannot fail to serialise.
    let mut body = serde_json::to_vec(value).unwrap_or_default();
    body.push(b'\n');
    let headers = [
        (CONTENT_TYPE, JSON),
        (CACHE_CONTROL, NO_STORE),
        (X_CONTENT_TYPE_OPTIONS, NO_SNIFF),
    ];
    (headers, Body::from(body)).into_response()
}

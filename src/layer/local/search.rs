//! Searches upstream for a task that the store does not know: one that was made without this proxy.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http_body_util::{BodyExt, Limited};
use tokio::sync::Mutex as Turn;
use tokio::time::{Instant, sleep_until, timeout};
use tower::Service;

use crate::error::Error;
use crate::kling::family::{FAMILIES, Family};
use crate::kling::task_answer::{AnsweredTask, TaskPlace, TaskSplitter};
use crate::request::context::{ProxyRequest, RequestContext};

/// Lets one search run at a time, and remembers what was not found.
#[derive(Default)]
pub struct Search {
    /// Start of the latest search.
    latest: Turn<Option<Instant>>,
    misses: Mutex<HashMap<String, Instant>>,
}

/// A task that a search has found.
pub struct Found {
    pub family: &'static Family,
    pub task: AnsweredTask,
}

/// Most requests of one search.
const MOST: usize = 8;
/// Time between the starts of two searches.
const PACE: Duration = Duration::from_secs(1);
/// Longest wait for the searches before.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for which an id that was not found is not searched for again.
const MISS: Duration = Duration::from_mins(1);
/// Most ids that are remembered as not found.
const MOST_MISSES: usize = 1000;
/// Largest answer that is read, in bytes.
const LARGEST: usize = 64 << 10;

// === impl Search ===

impl Search {
    /// Searches for a task by Kling's id or by its external id, through `inner`. `None` if there is none, if it
    /// was searched for a moment ago, or if too many searches wait.
    pub async fn find<S>(&self, id: &str, inner: S, context: &RequestContext) -> Option<Found>
    where
        S: Service<ProxyRequest, Response = Response, Error = Error>,
    {
        if !Family::is_plain_id(id) || self.is_missed(id) {
            return None;
        }
        let mut latest = timeout(PATIENCE, self.latest.lock()).await.ok()?;
        if let Some(latest) = *latest {
            sleep_until(latest + PACE).await;
        }
        // The search before may have been for the same id.
        if self.is_missed(id) {
            return None;
        }
        *latest = Some(Instant::now());
        let found = ask_all(id, inner, context).await;
        if found.is_none() {
            self.miss(id);
        }
        found
    }

    fn is_missed(&self, id: &str) -> bool {
        let misses = self.misses();
        misses.get(id).is_some_and(|at| at.elapsed() < MISS)
    }

    fn miss(&self, id: &str) {
        let mut misses = self.misses();
        if misses.len() >= MOST_MISSES {
            misses.retain(|_, at| at.elapsed() < MISS);
        }
        if misses.len() < MOST_MISSES {
            misses.insert(id.to_owned(), Instant::now());
        }
    }

    fn misses(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.misses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends the typed queries of the most used families, one after the other.
async fn ask_all<S>(id: &str, mut inner: S, context: &RequestContext) -> Option<Found>
where
    S: Service<ProxyRequest, Response = Response, Error = Error>,
{
    let mut targets: Vec<(String, &Family)> = Vec::new();
    for family in &FAMILIES {
        let target = family.read_by_id(id);
        // All families of the new standard are read by one query.
        if !targets.iter().any(|(known, _)| *known == target) {
            targets.push((target, family));
        }
    }
    // The query that finds the tasks of many families comes first. Without an API key, Kling refuses it.
    targets.sort_by_key(|(target, _)| !target.contains('?'));
    for (target, family) in targets.into_iter().take(MOST) {
        let request = Request::get(&target).body(Body::empty()).ok()?;
        let context = context.clone();
        let Ok(answer) = inner.call(ProxyRequest { request, context }).await else {
            continue;
        };
        let body = Limited::new(answer.into_body(), LARGEST).collect().await;
        let Ok(body) = body else {
            continue;
        };
        let mut tasks = Vec::new();
        TaskSplitter::new(TaskPlace::of_target(&target)).push(&body.to_bytes(), |task| {
            tasks.extend(task.read());
        });
        let is_it = |task: &AnsweredTask| task.id == id || task.external_id.as_deref() == Some(id);
        if let Some(task) = tasks.into_iter().find(is_it) {
            return Some(Found { family, task });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use tower::service_fn;

    use super::*;
    use crate::telemetry::metrics::Metrics;

    fn context() -> RequestContext {
        let metrics = Arc::new(Metrics::new().unwrap());
        let request = Request::new(Body::empty());
        ProxyRequest::untraced(request, &metrics).context
    }

    #[tokio::test(start_paused = true)]
    async fn search_is_bounded_in_requests_and_in_time() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&asked);
        let inner = service_fn(move |asked: ProxyRequest| {
            let path = asked.request.uri().path().to_owned();
            counting.fetch_add(1, SeqCst);
            async move {
                let answer = match &*path {
                    "/v1/videos/text2video/8" => {
                        r#"{"data":{"task_id":"8","task_status":"processing"}}"#
                    }
                    _ => r#"{"code":1201,"data":null}"#,
                };
                Ok::<_, Error>(Response::new(Body::from(answer)))
            }
        });
        let (search, context) = (Search::default(), context());
        let begun = Instant::now();
        let found = search.find("8", inner.clone(), &context).await.unwrap();
        assert_eq!(
            (found.task.id.as_str(), &*found.family.name()),
            ("8", "videos/text2video")
        );
        asked.store(0, SeqCst);
        assert!(search.find("9", inner.clone(), &context).await.is_none());
        assert_eq!((asked.load(SeqCst), begun.elapsed()), (MOST, PACE));
        // A miss is remembered.
        assert!(search.find("9", inner.clone(), &context).await.is_none());
        assert_eq!(asked.load(SeqCst), MOST);
        for id in ["", "..", "a/b", "a?b"] {
            assert!(search.find(id, inner.clone(), &context).await.is_none());
        }
        assert_eq!(asked.load(SeqCst), MOST);
        tokio::time::advance(MISS).await;
        assert!(search.find("9", inner, &context).await.is_none());
        assert_eq!(asked.load(SeqCst), 2 * MOST);
    }
}

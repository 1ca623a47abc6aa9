//! Server-sent events about tasks (HTML Standard, section 9.2): `GET /_proxy/events`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use http::Method;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::timeout;

use super::tasks::find;
use crate::error::Error;
use crate::layer::wait::WaitLayer;
use crate::lifecycle::Lifecycle;
use crate::request::context::RequestContext;
use crate::tasks::ledger::Ledger;
use crate::tasks::record::TaskRecord;
use crate::tasks::store::Store;
use crate::tasks::view::TaskView;
use crate::tasks::waiting::WaitingPlace;

/// Path of the stream of events about tasks.
pub const EVENTS: &str = "/_proxy/events";
/// Header with the number of the last event that a client has seen. Browsers send it when they reconnect.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Longest silence, in which proxies between do not take the connection for dead.
const SILENCE: Duration = Duration::from_secs(15);
/// Most changes that are read from the store at once.
const PAGE: usize = 100;
/// Most changes that a client may be behind. One that is further behind has to list the tasks again.
const MOST_BEHIND: u64 = 100_000;

/// A request for events, as far as its head shows it.
pub struct EventsRequest {
    last_event_id: Option<String>,
    /// Value of `task` in the query.
    task: Option<String>,
    client: Option<String>,
    context: RequestContext,
}

/// The state of one stream of events.
struct Events {
    ledger: Ledger,
    lifecycle: Arc<Lifecycle>,
    changes: broadcast::Receiver<Arc<TaskRecord>>,
    /// Number of the last change that was sent, or that the client has seen.
    seen: u64,
    /// Events that are ready to be sent.
    ready: VecDeque<String>,
    /// True if changes have to be read from the store.
    is_behind: bool,
    /// Reference of the only task of the stream.
    only: Option<String>,
    client: Option<String>,
    /// True after the last event.
    is_over: bool,
    _place: WaitingPlace,
}

// === impl EventsRequest ===

impl EventsRequest {
    /// Reads a request; `None` if its path is another one.
    pub fn of(request: &Request, context: &RequestContext) -> Option<Self> {
        if request.uri().path() != EVENTS || *request.method() != Method::GET {
            return None;
        }
        let id = request.headers().get(LAST_EVENT_ID);
        let query = request.uri().query().unwrap_or_default();
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let task = pairs.find(|(name, _)| *name == "task");
        Some(Self {
            last_event_id: id.map(|id| id.to_str().unwrap_or_default().to_owned()),
            task: task.map(|(_, reference)| reference.to_owned()),
            client: context.client().map(str::to_owned),
            context: context.clone(),
        })
    }

    /// Begins the stream.
    ///
    /// # Errors
    ///
    /// - [`Error::NotFound`] if the one task of the stream does not exist, or is another client's.
    /// - [`Error::TooManyWaiting`] if too many requests wait.
    /// - [`Error::StoreUnavailable`] if the store does not answer.
    pub async fn answer(self, ledger: Ledger, wait: WaitLayer) -> Result<Response, Error> {
        let Self {
            last_event_id,
            task,
            client,
            context,
        } = self;
        let place = wait.room.enter(client.as_deref());
        let place = place.ok_or(Error::TooManyWaiting(wait.room.places()))?;
        context.waits();
        // Before the look at the store, so that no change is missed between the two.
        let changes = ledger.changes();
        let first = match task {
            Some(task) => Some(find(task, client.clone(), &ledger).await?),
            None => None,
        };
        let known = |store: &mut dyn Store| Ok((store.oldest_change(), store.newest_change()?));
        let (oldest, newest) = ledger.read(known).await?;
        let mut events = Events {
            ledger,
            lifecycle: Arc::clone(&wait.lifecycle),
            changes,
            // A change of the one task may have come between the two looks at the store.
            seen: first.as_ref().map_or(newest, |task| task.change),
            ready: VecDeque::new(),
            is_behind: false,
            only: first
                .as_ref()
                .map(|task| task.reference.as_str().to_owned()),
            client,
            is_over: false,
            _place: place,
        };
        if let Some(task) = &first {
            events.add(task);
        } else if let Some(id) = last_event_id {
            events.resume(&id, oldest, newest);
        }
        let headers = [
            (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        ];
        let stream = stream::unfold(events, async |mut events| {
            let text = events.next().await?;
            Some((Ok::<_, Infallible>(Bytes::from(text)), events))
        });
        Ok((headers, Body::from_stream(stream)).into_response())
    }
}

// === impl Events ===

impl Events {
    /// Goes on after the last event that the client has seen.
    fn resume(&mut self, id: &str, oldest: u64, newest: u64) {
        match id.trim().parse() {
            Ok(id) if (oldest..=newest).contains(&id) && newest - id <= MOST_BEHIND => {
                self.seen = id;
                self.is_behind = true;
            }
            // The store is another one, or has gone on too far: the client has to list the tasks again.
            _ => self.ready.push_back("event: reset\ndata:\n\n".to_owned()),
        }
    }

    /// Returns the text of the next event, or a comment after a long silence; `None` after the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.pop_front() {
                return Some(text);
            }
            if self.is_over {
                return None;
            }
            if self.is_behind {
                self.catch_up().await?;
                continue;
            }
            let lifecycle = Arc::clone(&self.lifecycle);
            let changed = tokio::select! {
                changed = timeout(SILENCE, self.changes.recv()) => changed,
                () = lifecycle.draining() => return None,
            };
            match changed {
                Err(_) => return Some(":\n\n".to_owned()),
                Ok(Ok(record)) => {
                    if record.change > self.seen {
                        self.seen = record.change;
                        self.add(&record);
                    }
                }
                Ok(Err(RecvError::Lagged(_))) => self.is_behind = true,
                Ok(Err(RecvError::Closed)) => return None,
            }
        }
    }

    /// Reads the next changes from the store. `None` if it does not answer: the client then reconnects, and
    /// misses nothing.
    async fn catch_up(&mut self) -> Option<()> {
        let seen = self.seen;
        let read = self
            .ledger
            .read(move |store| store.changes_since(seen, PAGE));
        let changed = read.await.ok()?;
        self.is_behind = changed.len() == PAGE;
        for record in changed {
            self.seen = record.change;
            self.add(&record);
        }
        Some(())
    }

    /// Adds the event of a task, if the client may see it.
    fn add(&mut self, record: &TaskRecord) {
        let is_other = |only: &String| only != record.reference.as_str();
        let is_foreign = |client: &String| *client != record.client;
        if self.only.as_ref().is_some_and(is_other) || self.client.as_ref().is_some_and(is_foreign)
        {
            return;
        }
        self.is_over = self.only.is_some() && record.state.is_ended();
        // A struct of texts and numbers cannot fail to serialise. Its JSON has no line breaks.
        let task = serde_json::to_string(&TaskView::from(record)).unwrap_or_default();
        let mut text = String::new();
        let _ = write!(text, "event: task\nid: {}\ndata: {task}\n\n", record.change);
        self.ready.push_back(text);
    }
}

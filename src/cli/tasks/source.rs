//! The two places that the command reads: the file of the store, or a running proxy.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use http::header::HOST;
use http::{HeaderMap, HeaderValue, StatusCode};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Client;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::{FILE_PAUSE, PROXY_PAUSE};
use crate::cli::http_client::{self, Fetched};
use crate::cli::{Exit, Failure, complain, health};
use crate::environment::Environment;
use crate::error::chain;
use crate::layer::local::tasks::TASKS;
use crate::settings::Settings;
use crate::tasks::place::{StateUrl, existing_file};
use crate::tasks::record::{TaskRecord, Timestamp};
use crate::tasks::sqlite::Sqlite;
use crate::tasks::state::TaskState;
use crate::tasks::store::{ListQuery, Store, StoreError};
use crate::tasks::view::{MOST, TaskView};
use crate::telemetry::printable;

/// The place that the tasks are read from.
pub(super) enum Source {
    File(TaskFile),
    Proxy(RunningProxy),
}

/// The file of a store. It is opened anew for each look, so that a proxy may start, stop or replace it.
pub(super) struct TaskFile {
    path: PathBuf,
    /// Number of the last change that was read.
    seen: u64,
}

/// A proxy that keeps its tasks in memory, and shows them on its admin listener.
pub(super) struct RunningProxy {
    client: Client,
    address: SocketAddr,
    headers: HeaderMap,
    /// The tasks that were read, by their `ref`, as JSON.
    seen: HashMap<String, String>,
}

/// Filters that the user has given.
pub(super) struct Filter {
    pub(super) state: Option<TaskState>,
    pub(super) client: Option<String>,
    /// Earliest time at which a listed task was made.
    pub(super) since: Option<Timestamp>,
}

/// One task: its JSON text with all members, and those that the table shows.
pub(super) struct ShownTask {
    json: String,
    pub(super) members: Members,
}

/// Members of a TASK. A newer proxy may show more of them, and further states.
#[derive(Deserialize)]
pub(super) struct Members {
    pub(super) r#ref: String,
    pub(super) id: Option<String>,
    pub(super) external_id: Option<String>,
    pub(super) request_id: String,
    pub(super) account: String,
    pub(super) client: Option<String>,
    pub(super) path: String,
    pub(super) model: Option<String>,
    pub(super) status: String,
    pub(super) error: Option<ErrorMembers>,
    pub(super) units: Option<String>,
    pub(super) estimated_units: Option<String>,
    pub(super) created_at: String,
    pub(super) sent_at: Option<String>,
    pub(super) ended_at: Option<String>,
    pub(super) results: Vec<ResultMembers>,
}

/// Members of `error`. A failed task has only the message.
#[derive(Deserialize)]
pub(super) struct ErrorMembers {
    pub(super) code: Option<i64>,
    pub(super) r#type: Option<String>,
    pub(super) message: Option<String>,
    pub(super) solution: Option<String>,
}

/// The members of one result that the table shows.
#[derive(Deserialize)]
pub(super) struct ResultMembers {
    pub(super) kind: String,
    pub(super) url: String,
}

/// One page of the list of a running proxy.
#[derive(Deserialize)]
struct ListedPage {
    tasks: Vec<Box<RawValue>>,
    next_cursor: Option<String>,
}

/// Most bytes of one answer of a running proxy: more than 500 tasks with nine results each have.
const ANSWER_LIMIT: usize = 64 << 20;
/// Longest wait for one answer. It is longer than the wait of the proxy for its store.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Most changes that are read from a file at once.
const CHANGES: usize = 256;

// === impl Source ===

impl Source {
    /// Chooses the file of `state.url` if it exists and can be read, else the running proxy.
    pub(super) fn find(settings: &Settings, environment: &Environment) -> Result<Self, Failure> {
        let url = &settings.state.url;
        if let Some(path) = existing_file(url, environment) {
            match Sqlite::read_only(&path) {
                Ok(_) => return Ok(Self::File(TaskFile { path, seen: 0 })),
                // A proxy goes on in memory then.
                Err(error) if *url == StateUrl::Auto && error.is_about_the_file() => {
                    complain(format_args!("state.url: {error}; asking a running proxy"));
                }
                Err(error) => return Err(unreadable(&error)),
            }
        } else if let StateUrl::File(file) = url {
            let file = file.display();
            let reason =
                format!("there is no store {file} (state.url): a proxy makes it at its start");
            return Err(Failure::new(Exit::Failed, reason));
        }
        RunningProxy::of(settings).map(Self::Proxy)
    }

    /// Returns the tasks that the filter lets through, newest first.
    pub(super) async fn list(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, Failure> {
        match self {
            Self::File(file) => file.list(filter).map_err(|error| unreadable(&error)),
            Self::Proxy(proxy) => proxy.list(filter).await,
        }
    }

    /// Returns the task that this id names.
    pub(super) async fn task(&mut self, id: &str) -> Result<Option<ShownTask>, Failure> {
        match self {
            Self::File(file) => file.task(id).map_err(|error| unreadable(&error)),
            Self::Proxy(proxy) => proxy.task(id).await,
        }
    }

    /// Returns the tasks that have changed since the last call, or since the list.
    pub(super) async fn changes(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, Failure> {
        match self {
            Self::File(file) => file.changes(filter).map_err(|error| unreadable(&error)),
            Self::Proxy(proxy) => proxy.changes(filter).await,
        }
    }

    /// Returns the time between two looks for changes.
    pub(super) fn pause(&self) -> Duration {
        match self {
            Self::File(_) => FILE_PAUSE,
            Self::Proxy(_) => PROXY_PAUSE,
        }
    }

    /// Names the source, for messages.
    pub(super) fn place(&self) -> String {
        match self {
            Self::File(file) => file.path.display().to_string(),
            Self::Proxy(proxy) => format!("the proxy on {}", proxy.address),
        }
    }
}

fn unreadable(error: &StoreError) -> Failure {
    let reason = chain(error);
    let advice = "a running proxy shows its tasks at GET /_proxy/tasks";
    Failure::new(Exit::Failed, format!("state.url: {reason}; {advice}"))
}

// === impl TaskFile ===

impl TaskFile {
    fn list(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, StoreError> {
        let mut store = Sqlite::read_only(&self.path)?;
        // Changes during the list are shown twice rather than never.
        self.seen = store.newest_change()?;
        let mut query = filter.query();
        let mut tasks = Vec::new();
        loop {
            let page = store.list(&query)?;
            tasks.extend(page.tasks.iter().filter_map(ShownTask::of_record));
            if page.next.is_none() {
                return Ok(tasks);
            }
            query.cursor = page.next;
        }
    }

    fn task(&mut self, id: &str) -> Result<Option<ShownTask>, StoreError> {
        let found = Sqlite::read_only(&self.path)?.find(id, None)?;
        Ok(found.as_ref().and_then(ShownTask::of_record))
    }

    fn changes(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, StoreError> {
        let mut store = Sqlite::read_only(&self.path)?;
        let mut tasks = Vec::new();
        loop {
            let changed = store.changes_since(self.seen, CHANGES)?;
            let passing = changed.iter().filter(|record| filter.passes(record));
            tasks.extend(passing.filter_map(ShownTask::of_record));
            match changed.last() {
                Some(last) => self.seen = last.change,
                None => return Ok(tasks),
            }
        }
    }
}

// === impl RunningProxy ===

impl RunningProxy {
    fn of(settings: &Settings) -> Result<Self, Failure> {
        let address = settings.admin.address.ok_or_else(|| {
            let reason = "no task is stored in a file, and admin.address is off, so no running proxy can be \
                          asked. Set admin.address, or name a file in state.url";
            Failure::new(Exit::Failed, reason)
        })?;
        let client =
            http_client::plain().map_err(|error| Failure::because(Exit::Failed, &error))?;
        // The guard refuses other hosts, and the address may not be one of those that are allowed.
        let host = settings.access.allowed_hosts.first();
        let host = host.and_then(|host| HeaderValue::from_str(host).ok());
        Ok(Self {
            client,
            address: health::reachable(address),
            headers: host.map(|host| (HOST, host)).into_iter().collect(),
            seen: HashMap::new(),
        })
    }

    async fn list(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, Failure> {
        let mut tasks = Vec::new();
        let mut cursor = None;
        loop {
            let page = self.page(filter, cursor).await?;
            tasks.extend(self.read_tasks(&page)?);
            cursor = page.next_cursor;
            if cursor.is_none() {
                break;
            }
        }
        self.news(&tasks);
        Ok(tasks)
    }

    /// Returns the changes among the newest tasks: one page is read each time.
    async fn changes(&mut self, filter: &Filter) -> Result<Vec<ShownTask>, Failure> {
        let page = self.page(filter, None).await?;
        let mut tasks = self.read_tasks(&page)?;
        tasks.reverse();
        let mut news = self.news(&tasks).into_iter();
        tasks.retain(|_| news.next().unwrap_or_default());
        Ok(tasks)
    }

    /// Takes note of tasks. Returns which of them have changed.
    fn news(&mut self, tasks: &[ShownTask]) -> Vec<bool> {
        let note = |task: &ShownTask| {
            let known = self
                .seen
                .insert(task.members.r#ref.clone(), task.json.clone());
            known.as_ref() != Some(&task.json)
        };
        tasks.iter().map(note).collect()
    }

    async fn task(&mut self, id: &str) -> Result<Option<ShownTask>, Failure> {
        let id = utf8_percent_encode(id, NON_ALPHANUMERIC);
        let answer = self.ask(&format!("{TASKS}/{id}")).await?;
        if answer.status == StatusCode::NOT_FOUND {
            // A proxy that shows no tasks at all says so here.
            self.accept(&self.ask(&format!("{TASKS}?limit=1")).await?)?;
            return Ok(None);
        }
        let text = self.accept(&answer)?;
        self.read_task(text.trim_end()).map(Some)
    }

    async fn page(&self, filter: &Filter, cursor: Option<String>) -> Result<ListedPage, Failure> {
        let mut path = format!("{TASKS}?limit={MOST}");
        let texts = [
            ("status", filter.state.map(|state| state.to_string())),
            ("client", filter.client.clone()),
            ("since", filter.since.map(|since| since.to_string())),
            ("cursor", cursor),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                let value = utf8_percent_encode(&value, NON_ALPHANUMERIC);
                // Writing to a string cannot fail.
                let _ = write!(path, "&{name}={value}");
            }
        }
        let text = self.accept(&self.ask(&path).await?)?;
        serde_json::from_str(&text).map_err(|_| self.not_understood())
    }

    async fn ask(&self, path: &str) -> Result<Fetched, Failure> {
        let address = self.address;
        let url = format!("http://{address}{path}");
        let answer =
            http_client::fetch_up_to(ANSWER_LIMIT, &self.client, url, self.headers.clone());
        let reason = match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => health::root(&error).to_string(),
            Err(_) => format!("not within {}", humantime::format_duration(ANSWER_TIMEOUT)),
        };
        Err(Failure::new(
            Exit::Failed,
            format!(
                "no task is stored in a file, and no proxy answers on {address} (admin.address): {reason}. \
                 Start a proxy, or name a file in state.url"
            ),
        ))
    }

    /// Returns the text of an answer, if it shows tasks.
    fn accept(&self, answer: &Fetched) -> Result<String, Failure> {
        let address = self.address;
        let reason = match answer.status {
            StatusCode::OK if answer.is_whole => {
                return Ok(String::from_utf8_lossy(&answer.body).into_owned());
            }
            StatusCode::OK => format!("the answer of {address} is too long"),
            StatusCode::NOT_FOUND => format!(
                "the proxy on {address} (admin.address) does not show its tasks there: it has client \
                 tokens, listens on a Unix socket alone, or other machines can reach {address}. Ask its data \
                 listener: GET /_proxy/tasks"
            ),
            status => {
                let text = String::from_utf8_lossy(&answer.body);
                let text = printable(text.trim_end());
                format!(
                    "the proxy on {address} (admin.address) does not show its tasks: {status}: {text}"
                )
            }
        };
        Err(Failure::new(Exit::Failed, reason))
    }

    fn read_tasks(&self, page: &ListedPage) -> Result<Vec<ShownTask>, Failure> {
        let tasks = page.tasks.iter();
        tasks.map(|task| self.read_task(task.get())).collect()
    }

    fn read_task(&self, json: &str) -> Result<ShownTask, Failure> {
        ShownTask::of_json(json.to_owned()).map_err(|_| self.not_understood())
    }

    fn not_understood(&self) -> Failure {
        let address = self.address;
        let reason = format!("{address} (admin.address) answers with something that is not a task");
        Failure::new(Exit::Failed, reason)
    }
}

// === impl Filter ===

impl Filter {
    /// Returns the query for the first page of the list.
    fn query(&self) -> ListQuery {
        ListQuery {
            state: self.state,
            client: self.client.clone(),
            since: self.since,
            limit: MOST,
            ..ListQuery::default()
        }
    }

    fn passes(&self, record: &TaskRecord) -> bool {
        self.state.is_none_or(|state| state == record.state)
            && self
                .client
                .as_ref()
                .is_none_or(|client| *client == record.client)
            && self.since.is_none_or(|since| since <= record.created_at)
    }
}

// === impl ShownTask ===

impl ShownTask {
    /// Reads the JSON text of a task.
    pub(super) fn of_json(json: String) -> Result<Self, serde_json::Error> {
        let members = serde_json::from_str(&json)?;
        Ok(Self { json, members })
    }

    /// Shows a record as a proxy shows it; `None` never, since every record has all members.
    fn of_record(record: &TaskRecord) -> Option<Self> {
        let json = serde_json::to_string(&TaskView::from(record)).ok()?;
        Self::of_json(json).ok()
    }

    /// Returns the task as JSON, in one line.
    pub(super) fn json(&self) -> &str {
        &self.json
    }

    /// Returns true if nothing more is expected of the task.
    pub(super) fn is_ended(&self) -> bool {
        let state = TaskState::from_word(&self.members.status);
        state.is_some_and(TaskState::is_ended)
    }
}

/// Breaks a JSON text of one line into lines. The order of the members stays.
pub(super) fn pretty(json: &str) -> String {
    let mut lines = String::new();
    let (mut depth, mut in_text, mut is_escaped) = (0_usize, false, false);
    let mut characters = json.chars().peekable();
    let new_line = |lines: &mut String, depth: usize| {
        lines.push('\n');
        lines.push_str(&"  ".repeat(depth));
    };
    while let Some(c) = characters.next() {
        if in_text {
            in_text = is_escaped || c != '"';
            is_escaped = !is_escaped && c == '\\';
            lines.push(c);
            continue;
        }
        match c {
            '{' | '[' => {
                lines.push(c);
                if matches!(characters.peek(), Some('}' | ']')) {
                    lines.extend(characters.next());
                    continue;
                }
                depth += 1;
                new_line(&mut lines, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut lines, depth);
                lines.push(c);
            }
            ',' => {
                lines.push(c);
                new_line(&mut lines, depth);
            }
            ':' => lines.push_str(": "),
            _ => {
                in_text = c == '"';
                lines.push(c);
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn json_is_broken_into_lines_as_by_serde() {
        for value in [
            json!({ "a": r#"x": {[, \"#, "b": [], "c": {}, "d": [1, { "e": null }], "f": "\\" }),
            json!([[], [[1.5, true]], "…"]),
        ] {
            let value: Value = value;
            assert_eq!(
                pretty(&value.to_string()),
                serde_json::to_string_pretty(&value).unwrap()
            );
        }
    }
}

//! A strict stand-in for the Kling API, so that a client can be tested without an account or a network.
//!
//! It serves every documented path of both generations of the API (see the table in `endpoints`), and
//! checks credentials against literals of its own. Tasks succeed after some time, and link to playable
//! results. Words in a request ask for faults, such as `sandbox:1303`, `sandbox:failed`, `sandbox:slow=5s`,
//! `sandbox:html`, `sandbox:reset` and `sandbox:lost`.
//!
//! A request goes from `routes` through `body` and `create_request` to `tasks`. The response is a
//! `task_view` of a task.

mod authorization;
mod billing;
mod body;
mod create_request;
mod endpoints;
mod fault;
mod files;
mod ids;
mod immediate;
mod list_query;
mod listing;
mod packs;
mod page;
mod presets;
mod reply;
mod results;
mod routes;
mod task;
mod task_view;
mod tasks;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::http::header::{DATE, HeaderValue};
use axum::http::{Method, Request, Response, Uri};
use tokio::time::Instant;
use tower::{Service, ServiceExt};

use crate::clock::Clock;
use files::Files;
use reply::Reply;
use task::{Status, Task};
use task_view::TaskView;
use tasks::Tasks;

/// Access key of the sandbox's only account.
pub const ACCESS_KEY: &str = "sandboxAccessKeyForTestsOnly0000";

/// Secret key of the sandbox's only account. It protects nothing.
pub const SECRET_KEY: &str = "sandboxSecretKeyForTestsOnly0000";

/// API key of the sandbox's only account, valid for every path.
pub const API_KEY: &str = "api-sandboxKeyForTestsOnly000000";

/// Options that decide how the sandbox behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time from the creation of a task to its end, at a speed of 1. The task is `submitted` for the first
    /// third.
    pub task_time: Duration,
    /// Number by which the time of every task is divided, at least 1.
    pub speed: u32,
    /// Time that a create takes to answer. The task is made before it.
    pub latency: Duration,
    /// Slots of each pack for running tasks; above that 1303. A video holds one slot, an image task `n`.
    pub concurrency: usize,
    /// Tasks of somebody else that hold a slot of each pack and never end.
    pub foreign: u32,
    /// Form of the result URLs.
    pub results: Results,
    /// Seconds that the sandbox's clock is ahead of the machine's clock.
    pub clock_offset: i64,
    /// Decides all ids: the same requests in the same order get the same ids.
    pub seed: u64,
    /// Base of the result URLs. If it is `None`, `http://` and the address of the sandbox's own listener.
    pub public_url: Option<String>,
}

/// Form of the result URLs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Results {
    /// URLs of the sandbox, which end with `Expires`.
    Link,
    /// `data:` URLs, which contain the file, for clients that do not download from loopback.
    Data,
}

/// The sandbox as a service, to be served on any connection.
#[derive(Clone)]
pub struct Sandbox {
    account: Arc<Account>,
    router: Router,
}

/// Error that asks for the connection to be dropped without a response (`sandbox:reset`).
///
/// hyper drops a connection if its service fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox was asked to drop the connection")]
pub struct Reset;

/// State that all requests share.
struct Account {
    clock: Arc<dyn Clock>,
    clock_offset: i64,
    latency: Duration,
    files: Files,
    tasks: Mutex<Tasks>,
}

/// Last second that a `Date` header can express.
const END_OF_TIME: Duration = Duration::from_secs(253_402_300_799);

// === impl Sandbox ===

impl Sandbox {
    /// Creates a sandbox without tasks, to be served at `address`.
    pub fn new(options: Options, address: SocketAddr, clock: Arc<dyn Clock>) -> Self {
        let tasks = Tasks::new(&options);
        let base = options
            .public_url
            .unwrap_or_else(|| format!("http://{address}"));
        let account = Arc::new(Account {
            clock,
            clock_offset: options.clock_offset,
            latency: options.latency,
            files: Files::new(&base, options.results),
            tasks: Mutex::new(tasks),
        });
        let created_at = account.now();
        account
            .tasks()
            .add_foreign(options.foreign, created_at, Instant::now());
        Self {
            router: routes::router(account.clone()),
            account,
        }
    }
}

impl Service<Request<Body>> for Sandbox {
    type Response = Response<Body>;
    type Error = Reset;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Reset>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Reset>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        *request.uri_mut() = tidy(request.uri());
        let answer = self.router.clone().oneshot(request);
        let account = self.account.clone();
        Box::pin(async move {
            let Ok::<_, Infallible>(mut response) = answer.await;
            if let Some(reply) = response.extensions_mut().remove::<Reply>() {
                let request_id = account.tasks().ids.request();
                response = reply.render(request_id)?;
            }
            let date = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + account.now());
            if let Ok(date) = HeaderValue::try_from(date) {
                response.headers_mut().insert(DATE, date);
            }
            Ok(response)
        })
    }
}

/// Returns true if a request reads a result file. Any web page may show such a file, as it may show Kling's
/// files.
///
/// Only a path in the form of a result's URL counts: other rules apply to such a request, so no server may
/// take its path for another one.
pub fn is_for_file(request: &Request<Body>) -> bool {
    let is_read = [Method::GET, Method::HEAD].contains(request.method());
    is_read && files::is_path(request.uri().path())
}

/// Drops empty path segments, which real clients send: `…/kolors-virtual-try-on//<id>`, `…/image2video/`.
fn tidy(uri: &Uri) -> Uri {
    let mut target = String::new();
    for segment in uri.path().split('/').filter(|segment| !segment.is_empty()) {
        target.push('/');
        target.push_str(segment);
    }
    if target.is_empty() {
        target.push('/');
    }
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    target.parse().unwrap_or_else(|_| uri.clone())
}

// === impl Account ===

impl Account {
    /// Returns the time by the sandbox's clock, since the epoch.
    fn now(&self) -> Duration {
        let now = self
            .clock
            .now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let offset = Duration::from_secs(self.clock_offset.unsigned_abs());
        let shifted = if self.clock_offset < 0 {
            now.saturating_sub(offset)
        } else {
            now.saturating_add(offset)
        };
        shifted.min(END_OF_TIME)
    }

    fn task_view<'a>(&'a self, task: &'a Task, status: Status) -> TaskView<'a> {
        TaskView {
            task,
            status,
            files: &self.files,
        }
    }

    /// Locks the tasks, with all deductions until now. The lock is never held across an await.
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.settle(Instant::now());
        tasks
    }
}

//! The admin listener: health, metrics and control. None of it can be reached through the data listener.
//!
//! Probes and scrapers connect to the pod address, so health and metrics are open to everyone who can
//! connect. They show nothing of requests, keys or settings.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Method, StatusCode};
use serde::Serialize;
use tokio::sync::Notify;

use crate::error::Error;
use crate::layer::guard::rules::Rules;
use crate::layer::local::tasks::TASKS;
use crate::lifecycle::{Lifecycle, Phase};
use crate::reloadable::Reloadable;
use crate::telemetry;
use crate::telemetry::metrics::Metrics;

/// Longest wait of a probe before it counts as failed.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Path of the list of all paths.
const INDEX: &str = "/";
/// Path of the request that ends the process.
const QUIT: &str = "/quit";
/// Path of the startup probe.
const STARTUP: &str = "/health/startup";
/// Path of the liveness probe.
const LIVE: &str = "/health/live";
/// Path of the readiness probe.
pub const READY: &str = "/health/ready";
/// Path of the metrics.
const METRICS: &str = "/metrics";

/// Content security policy that allows no inline code, and no files of other origins.
const OWN_FILES_ONLY: HeaderValue = HeaderValue::from_static("default-src 'self'");

/// State that the endpoints show.
#[derive(Clone)]
struct AdminState {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    rules: Reloadable<Rules>,
}

/// Requests that this machine alone may send: they change the state of the process, or read tasks.
#[derive(Clone)]
pub struct Control {
    /// Notified to end the process; `None` if `admin.quit` does not allow it.
    pub quit: Option<Arc<Notify>>,
    /// True if every user of this machine can connect to the data listener, and so may see tasks. A Unix
    /// socket is for one user alone.
    pub shows_tasks: bool,
}

/// The body of a health endpoint.
#[derive(Serialize)]
struct Health {
    status: &'static str,
    phase: &'static str,
    reasons: Vec<&'static str>,
}

// === impl Health ===

impl Health {
    /// Answers with this body and a newline.
    fn answer(&self, status: StatusCode) -> Response {
        // A struct of texts cannot fail to serialise.
        let mut body = serde_json::to_vec(self).unwrap_or_default();
        body.push(b'\n');
        let media_type = HeaderValue::from_static("application/json");
        (status, [(CONTENT_TYPE, media_type)], body).into_response()
    }
}

// === impl Control ===

impl Control {
    /// Answers `/` with links, and runs the action that any other request names. The list of tasks is among
    /// the links if it `shows_tasks`.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] for an unknown path, or if `admin.quit` is off; [`Error::MethodNotAllowed`]
    /// for a method that the path does not have.
    pub fn answer(&self, request: &Request, shows_tasks: bool) -> Result<Response, Error> {
        match (&self.quit, request.uri().path(), request.method()) {
            (quit, INDEX, &Method::GET | &Method::HEAD) => Ok(index(quit.is_some(), shows_tasks)),
            (Some(quit), QUIT, &Method::POST) => {
                quit.notify_one();
                Ok(health(Phase::Stopping, true))
            }
            (_, INDEX, _) | (Some(_), QUIT, _) => Err(Error::MethodNotAllowed),
            _ => Err(Error::NotFound("nothing is at this path")),
        }
    }
}

/// Builds the routes for health and metrics.
pub fn router(
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    rules: Reloadable<Rules>,
) -> Router {
    Router::new()
        .route(STARTUP, get(startup))
        .route(LIVE, get(live))
        .route(READY, get(ready))
        .route(METRICS, get(exposition))
        .with_state(AdminState {
            lifecycle,
            metrics,
            rules,
        })
}

/// Lists all paths, as a page with links.
fn index(quit: bool, shows_tasks: bool) -> Response {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>kling-proxy</title>\n\
         <h1>kling-proxy {}: admin listener</h1>\n<ul>\n",
        env!("CARGO_PKG_VERSION")
    );
    let tasks = (TASKS, "tasks that the proxy remembers");
    let health = [
        (READY, "ready for requests (200), or why not (503)"),
        (LIVE, "the process answers (200)"),
        (STARTUP, "the start is over (200)"),
        (METRICS, "metrics for Prometheus"),
    ];
    for (path, meaning) in health.into_iter().chain(shows_tasks.then_some(tasks)) {
        let line = format!("<li><a href=\"{path}\">{path}</a>: {meaning}\n");
        page.push_str(&line);
    }
    if quit {
        page.push_str("<li><code>POST /quit</code>: ends the proxy as SIGTERM does\n");
    }
    page.push_str("</ul>\n</html>\n");
    let media_type = HeaderValue::from_static("text/html; charset=utf-8");
    ([(CONTENT_TYPE, media_type)], page).into_response()
}

/// Answers the startup probe: ok once the start is over.
async fn startup(State(shown): State<AdminState>) -> Response {
    let phase = shown.lifecycle.phase();
    health(phase, phase > Phase::Starting)
}

/// Answers the liveness probe: always ok, because a process that answers needs no restart.
async fn live(State(shown): State<AdminState>) -> Response {
    health(shown.lifecycle.phase(), true)
}

/// Answers the readiness probe: ok if new requests may be sent to this process.
async fn ready(State(shown): State<AdminState>) -> Response {
    let phase = shown.lifecycle.phase();
    if phase == Phase::Ready && telemetry::is_stuck() {
        return unavailable(
            phase,
            "log lines are lost: standard error does not take them",
        );
    }
    let tokens = &shown.rules.load().client_tokens;
    if phase == Phase::Ready && tokens.as_ref().is_some_and(|tokens| tokens.is_none()) {
        return unavailable(
            phase,
            "no client token is accepted: access.client_tokens_file was emptied, or is wrong",
        );
    }
    health(phase, phase == Phase::Ready)
}

/// Adds headers that keep a browser from running anything in a response, which may contain text of
/// upstream.
pub fn set_security_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONTENT_SECURITY_POLICY, OWN_FILES_ONLY);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn exposition(State(shown): State<AdminState>) -> Response {
    match shown.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot render metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn health(phase: Phase, well: bool) -> Response {
    match (well, phase) {
        (true, _) => Health {
            status: "ok",
            phase: phase.name(),
            reasons: vec![],
        }
        .answer(StatusCode::OK),
        (false, Phase::Starting) => unavailable(phase, "no token has been minted yet"),
        (false, _) => unavailable(phase, "the proxy is shutting down"),
    }
}

fn unavailable(phase: Phase, reason: &'static str) -> Response {
    let health = Health {
        status: "unavailable",
        phase: phase.name(),
        reasons: vec![reason],
    };
    health.answer(StatusCode::SERVICE_UNAVAILABLE)
}

//! The admin listener: health, metrics and control, never reachable through the data listener.
//!
//! Probes and scrapers come by pod address, so health and metrics answer anyone who can connect;
//! they show nothing of requests, keys or settings.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Method, StatusCode};
use serde::Serialize;
use tokio::sync::Notify;

use crate::error::Error;
use crate::layer::guard::rules::Rules;
use crate::lifecycle::{Lifecycle, Phase};
use crate::reloadable::Reloadable;
use crate::telemetry;
use crate::telemetry::metrics::Metrics;

/// How long a probe waits before it counts as failed.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Where the process is told to end.
const QUIT: &str = "/quit";
/// Where readiness is told.
pub const READY: &str = "/health/ready";

/// No inline code, and nothing from elsewhere.
const OWN_FILES_ONLY: HeaderValue = HeaderValue::from_static("default-src 'self'");

/// What is shown.
#[derive(Clone)]
struct AdminState {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    rules: Reloadable<Rules>,
}

/// What changes the state of the process, for this machine alone.
#[derive(Clone)]
pub struct Control {
    /// Told to end the process; `None` where that is not allowed (`admin.quit`).
    pub quit: Option<Arc<Notify>>,
}

/// The body of a health endpoint.
#[derive(Serialize)]
struct Health {
    status: &'static str,
    phase: &'static str,
    reasons: Vec<&'static str>,
}

// === impl Control ===

impl Control {
    /// Does what a request asks for.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] and [`Error::MethodNotAllowed`].
    pub fn answer(&self, request: &Request) -> Result<Response, Error> {
        match (&self.quit, request.uri().path(), request.method()) {
            (Some(quit), QUIT, &Method::POST) => {
                quit.notify_one();
                Ok(health(Phase::Stopping, true))
            }
            (Some(_), QUIT, _) => Err(Error::MethodNotAllowed),
            _ => Err(Error::NotFound),
        }
    }
}

/// The routes of health and metrics.
pub fn router(
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    rules: Reloadable<Rules>,
) -> Router {
    Router::new()
        .route("/health/startup", get(startup))
        .route("/health/live", get(live))
        .route(READY, get(ready))
        .route("/metrics", get(exposition))
        .with_state(AdminState {
            lifecycle,
            metrics,
            rules,
        })
}

/// Whether the start is over.
async fn startup(State(shown): State<AdminState>) -> Response {
    let phase = shown.lifecycle.phase();
    health(phase, phase > Phase::Starting)
}

/// Whether a restart would not help: it answers.
async fn live(State(shown): State<AdminState>) -> Response {
    health(shown.lifecycle.phase(), true)
}

/// Whether new requests should come here.
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

/// Makes a browser that shows an answer run nothing of it: upstream's text may be in there.
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
        (true, _) => Json(Health {
            status: "ok",
            phase: phase.name(),
            reasons: vec![],
        })
        .into_response(),
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
    (StatusCode::SERVICE_UNAVAILABLE, Json(health)).into_response()
}

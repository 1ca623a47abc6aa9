//! The admin listener: health and metrics, never reachable through the data listener.
//!
//! Probes and scrapers come by pod address, so these answer anyone who can connect; they show
//! nothing of requests, keys or settings.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde::Serialize;

use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;

/// How long a probe waits before it counts as failed.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// Where readiness is told.
pub const READY: &str = "/health/ready";

/// What is shown.
#[derive(Clone)]
struct Shown {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
}

/// The body of a health endpoint.
#[derive(Serialize)]
struct Health {
    status: &'static str,
    phase: &'static str,
    reasons: Vec<&'static str>,
}

/// All routes of the admin listener.
pub fn router(lifecycle: Arc<Lifecycle>, metrics: Arc<Metrics>) -> Router {
    Router::new()
        .route("/health/startup", get(startup))
        .route("/health/live", get(live))
        .route(READY, get(ready))
        .route("/metrics", get(exposition))
        .with_state(Shown { lifecycle, metrics })
}

/// Whether the start is over.
async fn startup(State(shown): State<Shown>) -> Response {
    let phase = shown.lifecycle.phase();
    health(phase, phase > Phase::Starting)
}

/// Whether a restart would not help: it answers.
async fn live(State(shown): State<Shown>) -> Response {
    health(shown.lifecycle.phase(), true)
}

/// Whether new requests should come here.
async fn ready(State(shown): State<Shown>) -> Response {
    let phase = shown.lifecycle.phase();
    health(phase, phase == Phase::Ready)
}

async fn exposition(State(shown): State<Shown>) -> Response {
    match shown.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot render metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn health(phase: Phase, well: bool) -> Response {
    let (code, status) = if well {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
    };
    let reasons = match (well, phase) {
        (true, _) => vec![],
        (false, Phase::Starting) => vec!["no token has been minted yet"],
        (false, _) => vec!["the proxy is shutting down"],
    };
    (
        code,
        Json(Health {
            status,
            phase: phase.name(),
            reasons,
        }),
    )
        .into_response()
}

//! Turns every error into the one response of `interface.md`, section 5. Inside of this layer a
//! request may fail; outside it cannot.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER,
};
use http::{HeaderMap, StatusCode};
use hyper::ext::ReasonPhrase;
use pin_project_lite::pin_project;
use serde::Serialize;
use serde_json::value::RawValue;
use tower::{Layer, Service};

use crate::effect::Effect;
use crate::error::{self, Error, Failure};
use crate::request_id::RequestId;
use crate::service_code::Row;

const ERROR_TYPE: HeaderName = HeaderName::from_static("kling-proxy-error");
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Which status an error has (`errors.status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statuses {
    /// That of the vendor's table.
    Documented,
    /// Another than 429 where sending again cannot help, for clients that retry every 429.
    Actionable,
}

/// Which body an error of upstream has (`errors.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Ours.
    Kling,
    /// Upstream's, untouched, with its status; our headers are added.
    Upstream,
}

/// Adds [`Normalise`] to a service.
#[derive(Clone, Copy, Debug)]
pub struct NormaliseLayer {
    /// See [`Statuses`].
    pub statuses: Statuses,
    /// See [`Format`].
    pub format: Format,
}

/// Answers errors.
#[derive(Clone)]
pub struct Normalise<S> {
    inner: S,
    layer: NormaliseLayer,
}

pin_project! {
    /// Waits for the answer or the error.
    pub struct NormaliseFuture<F> {
        #[pin]
        inner: F,
        layer: NormaliseLayer,
        effect: Effect,
        request_id: Option<RequestId>,
    }
}

/// The body of section 5.
#[derive(Serialize)]
struct ErrorBody<'a> {
    code: i64,
    message: &'a str,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a RawValue>,
    error: Detail<'a>,
}

#[derive(Serialize)]
struct Detail<'a> {
    r#type: &'static str,
    source: &'static str,
    upstream_status: Option<u16>,
    definition: &'static str,
    explanation: &'static str,
    solution: &'static str,
    retryable: bool,
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    excerpt: Option<&'a str>,
}

// === impl NormaliseLayer ===

impl<S> Layer<S> for NormaliseLayer {
    type Service = Normalise<S>;

    fn layer(&self, inner: S) -> Normalise<S> {
        Normalise {
            inner,
            layer: *self,
        }
    }
}

impl NormaliseLayer {
    fn respond(self, error: Error, effect: Effect, request_id: &str) -> Response {
        let retryable = error.retryable(effect);
        let failure = Failure::from(&error);
        let row = error.row();
        let wait = row.map_or(error::UNKNOWN_WAIT, Row::wait);
        let body = body(&error, effect, request_id);
        let status = self.status(&error);
        let mut response = match error {
            Error::Service { answer, .. } | Error::BadResponse { answer, .. } => {
                match self.format {
                    Format::Upstream => Response::from_parts(answer.head, answer.body.into_inner()),
                    Format::Kling => {
                        let mut head = answer.head;
                        head.headers.remove(CONTENT_LENGTH);
                        head.headers.remove(CONTENT_ENCODING);
                        head.headers.insert(CONTENT_TYPE, JSON);
                        head.status = status;
                        // Upstream's words for its own status.
                        head.extensions.remove::<ReasonPhrase>();
                        Response::from_parts(head, Body::from(body))
                    }
                }
            }
            _ => {
                let mut response = Response::new(Body::from(body));
                *response.status_mut() = status;
                response.headers_mut().insert(CONTENT_TYPE, JSON);
                response
            }
        };
        let status = response.status();
        let headers = response.headers_mut();
        add_advice(headers, status, &failure, retryable, wait);
        response.extensions_mut().insert(failure);
        response
    }

    fn status(self, error: &Error) -> StatusCode {
        match (self.statuses, error.code()) {
            (Statuses::Actionable, 1100..=1102) => StatusCode::PAYMENT_REQUIRED,
            (Statuses::Actionable, 1304) => StatusCode::FORBIDDEN,
            _ => error.status(),
        }
    }
}

// === impl Normalise ===

impl<S> Service<Request> for Normalise<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = NormaliseFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Every layer inside is ready always: what limits requests answers them.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        NormaliseFuture {
            layer: self.layer,
            effect: Effect::of(&request),
            request_id: request.extensions().get().cloned(),
            inner: self.inner.call(request),
        }
    }
}

// === impl NormaliseFuture ===

impl<F> Future for NormaliseFuture<F>
where
    F: Future<Output = Result<Response, Error>>,
{
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Poll::Ready(Ok(match ready!(this.inner.poll(cx)) {
            Ok(response) => response,
            Err(error) => {
                let request_id = this.request_id.as_ref().map_or("", RequestId::as_str);
                this.layer.respond(error, *this.effect, request_id)
            }
        }))
    }
}

/// What a client is told besides the body: what failed, and whether and when to send again.
fn add_advice(
    headers: &mut HeaderMap,
    status: StatusCode,
    failure: &Failure,
    retryable: bool,
    wait: std::time::Duration,
) {
    headers.insert(ERROR_TYPE, HeaderValue::from_static(failure.kind));
    headers.insert(
        SHOULD_RETRY,
        HeaderValue::from_static(if retryable { "true" } else { "false" }),
    );
    let waits = matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    );
    if !retryable {
        // Clients that obey it would send again whatever `x-should-retry` says.
        headers.remove(RETRY_AFTER);
    } else if waits && !headers.contains_key(RETRY_AFTER) {
        headers.insert(RETRY_AFTER, HeaderValue::from(wait.as_secs()));
    }
}

fn body(error: &Error, effect: Effect, request_id: &str) -> Vec<u8> {
    let row = error.row();
    let said = match error {
        Error::Service { envelope, .. } => Some(envelope),
        _ => None,
    };
    let own_message = match (said, row) {
        (Some(_), Some(row)) => row.explanation.to_owned(),
        _ => error::chain(error),
    };
    let excerpt = match error {
        Error::BadResponse { excerpt, .. } => excerpt.as_deref(),
        _ => None,
    };
    let body = ErrorBody {
        code: error.code(),
        message: said
            .and_then(|said| said.message.as_deref())
            .unwrap_or(&own_message),
        request_id: said
            .and_then(|said| said.request_id.as_deref())
            .unwrap_or(request_id),
        data: said.and_then(|said| said.data.as_deref()),
        error: Detail {
            r#type: error.kind(),
            source: row.map_or("upstream", Row::source),
            upstream_status: error.answer().map(|answer| answer.head.status.as_u16()),
            definition: row.map_or("Unknown service code", |row| row.definition),
            explanation: row.map_or("Kling sent a code that its table does not list", |row| {
                row.explanation
            }),
            solution: row.map_or("See the message, and Kling's documentation", |row| {
                row.solution
            }),
            retryable: error.retryable(effect),
            attempts: u32::from(error.was_sent()),
            hint: hint(error, effect),
            excerpt,
        },
    };
    // A struct of texts and numbers cannot fail to serialise.
    serde_json::to_vec(&body).unwrap_or_default()
}

/// Advice where the proxy knows more than the table.
fn hint(error: &Error, effect: Effect) -> Option<&'static str> {
    let may_have_worked =
        effect == Effect::Create && !error.retryable(effect) && error.retryable(Effect::Read);
    if may_have_worked {
        return Some(
            "the task may exist and be billed: before sending again, look it up by its \
             external_task_id or in the list of tasks",
        );
    }
    let wants_api_key = |message: &str| message.contains("does not support AK/SK");
    match error {
        Error::Service { envelope, .. } => match envelope.code {
            1002 if envelope.message.as_deref().is_some_and(wants_api_key) => Some(
                "this path takes an API key only: set KLING_API_KEY for the proxy, or use the \
                 path below /v1",
            ),
            1000..=1002 => Some(
                "keys of one region are unknown in another: `upstream.url` must be the host of \
                 the region that issued them",
            ),
            1003 | 1004 => Some("this machine's clock and upstream's differ: correct this one's"),
            1303 => Some(
                "all keys of the account share its slots, and a task holds one until it ends: \
                 poll those that run, then send this again",
            ),
            1304 => Some("the account admits some addresses only: add this machine's public one"),
            _ => None,
        },
        _ => None,
    }
}

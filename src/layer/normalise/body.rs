//! The body of an error, as docs/errors.md describes it.

use http::StatusCode;

use crate::effect::Effect;
use crate::error::{self, Error};
use crate::facts::Facts;
use crate::json::Object;
use crate::service_code::Needs;

/// Most bodies are shorter, in bytes.
const USUAL: usize = 1536;

/// Renders an error of a request with this effect and these facts.
pub(super) fn render(error: &Error, effect: Effect, facts: Option<&Facts>) -> String {
    let mut body = Object::with_capacity(USUAL);
    body.value("code", error.code());
    let own_id = facts.map_or("", |facts| facts.id().as_str());
    if let Error::Service { envelope, .. } = error {
        let message = envelope.message.as_deref();
        body.text("message", message.unwrap_or(error.row().explanation));
        let id = envelope.request_id.as_deref();
        body.text("request_id", id.unwrap_or(own_id));
        if let Some(data) = &envelope.data {
            body.raw("data", data.get());
        }
    } else {
        body.text("message", &error::chain(error));
        body.text("request_id", own_id);
    }
    body.raw("error", &detail(error, effect, facts));
    body.end()
}

/// What the proxy knows of an error, as JSON.
fn detail(error: &Error, effect: Effect, facts: Option<&Facts>) -> String {
    let row = error.row();
    let mut detail = Object::with_capacity(USUAL);
    detail.text("type", error.kind());
    detail.text("source", row.source());
    let status = error.answer().map(|answer| answer.head.status.as_u16());
    detail.value("upstream_status", status);
    detail.text("definition", row.definition);
    detail.text("explanation", row.explanation);
    detail.text("solution", row.solution);
    detail.value("retryable", error.retryable(effect));
    detail.value("attempts", facts.map_or(0, Facts::attempts));
    if let Some(hint) = hint(error, effect) {
        detail.text("hint", hint);
    }
    if let Error::BadResponse {
        excerpt: Some(excerpt),
        ..
    } = error
    {
        detail.text("excerpt", excerpt);
    }
    detail.end()
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
    match error {
        Error::Service { envelope, .. } => {
            let message = envelope.message.as_deref().unwrap_or_default();
            match error.row().needs(message) {
                Some(Needs::ApiKey) => Some(
                    "this path takes an API key only: set KLING_API_KEY for the proxy, or use the \
                     path below /v1",
                ),
                Some(Needs::KeyPair) | None => error.row().hint,
            }
        }
        Error::EgressRefused(StatusCode::PROXY_AUTHENTICATION_REQUIRED) => Some(
            "the egress proxy wants credentials, or others: set user and password in \
             `upstream.proxy`, as in http://user:password@proxy.example:3128",
        ),
        Error::EgressRefused(_) => Some(
            "the egress proxy of `upstream.proxy` must allow CONNECT to the host of `upstream.url`",
        ),
        _ => error.row().hint,
    }
}

//! The body of an error, as docs/errors.md describes it.

use serde::Serialize;
use serde_json::value::RawValue;

use crate::effect::Effect;
use crate::error::{self, Error};
use crate::facts::Facts;

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

/// Most bodies are shorter, in bytes.
const USUAL: usize = 1536;

/// Renders an error of a request with this effect and these facts.
pub(super) fn render(error: &Error, effect: Effect, facts: Option<&Facts>) -> Vec<u8> {
    let request_id = facts.map_or("", |facts| facts.id().as_str());
    let row = error.row();
    let said = match error {
        Error::Service { envelope, .. } => Some(envelope),
        _ => None,
    };
    let own_message = match said {
        Some(_) => row.explanation.to_owned(),
        None => error::chain(error),
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
            source: row.source(),
            upstream_status: error.answer().map(|answer| answer.head.status.as_u16()),
            definition: row.definition,
            explanation: row.explanation,
            solution: row.solution,
            retryable: error.retryable(effect),
            attempts: facts.map_or(0, Facts::attempts),
            hint: hint(error, effect),
            excerpt,
        },
    };
    let mut json = Vec::with_capacity(USUAL);
    // A struct of texts and numbers cannot fail to serialise, nor a vector to grow.
    let _ = serde_json::to_writer(&mut json, &body);
    json
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
                "the proxy's credential was refused, not what the client sent: check the keys of \
                 the proxy, and that `upstream.url` is the region that issued them",
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

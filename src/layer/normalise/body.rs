//! The JSON body of an error response, as docs/errors.md describes it.

use std::borrow::Cow;

use http::StatusCode;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::{self, Error, TokenSource};
use crate::kling::idempotency::Effect;
use crate::kling::service_code::Needs;
use crate::request::context::RequestContext;

/// Kling's envelope with one more member, `error`. The members and their order are a public interface.
#[derive(Serialize)]
pub(super) struct ErrorBody<'a> {
    code: i64,
    message: Cow<'a, str>,
    request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a RawValue>,
    error: Detail<'a>,
}

/// The `error` member: the row of the code, and facts about this request that the proxy knows.
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

/// Size that most bodies stay below, in bytes.
const USUAL_SIZE: usize = 2 << 10;

// === impl ErrorBody ===

impl<'a> ErrorBody<'a> {
    /// Describes an error of a request with this effect and context.
    pub(super) fn new(error: &'a Error, effect: Effect, context: &'a RequestContext) -> Self {
        let (mut message, mut request_id, mut data) = (None, None, None);
        if let Error::Service { envelope, .. } = error {
            let text = envelope.message.as_deref();
            message = Some(Cow::from(text.unwrap_or(error.row().explanation)));
            request_id = envelope.request_id.as_deref();
            data = envelope.data.as_deref();
        }
        Self {
            code: error.code(),
            message: message.unwrap_or_else(|| error::chain(error).into()),
            request_id: request_id.unwrap_or_else(|| context.id().as_str()),
            data,
            error: Detail::new(error, effect, context),
        }
    }

    /// Renders the body as JSON and a newline, so that a shell's prompt stands on its own line.
    pub(super) fn render(&self) -> Vec<u8> {
        let mut json = Vec::with_capacity(USUAL_SIZE);
        // No member can fail to serialize, and a vector takes all that is written to it.
        let _ = serde_json::to_writer(&mut json, self);
        json.push(b'\n');
        json
    }
}

// === impl Detail ===

impl<'a> Detail<'a> {
    fn new(error: &'a Error, effect: Effect, context: &RequestContext) -> Self {
        let row = error.row();
        let excerpt = match error {
            Error::BadResponse { excerpt, .. } => excerpt.as_deref(),
            _ => None,
        };
        Self {
            r#type: error.kind(),
            source: row.source(),
            upstream_status: error.answer().map(|answer| answer.head.status.as_u16()),
            definition: row.definition,
            explanation: row.explanation,
            solution: solution(error),
            retryable: error.retryable(effect),
            attempts: context.attempts(),
            hint: hint(error, effect),
            excerpt,
        }
    }
}

/// The advice of the table. `run` ignores the file of tokens that this advice names.
fn solution(error: &Error) -> &'static str {
    match error {
        Error::ClientTokenInvalid(TokenSource::Run) => {
            "Send `$KLING_API_KEY`, which `run` has set, in `kling-proxy-token` or as \
             `Authorization: Bearer`"
        }
        _ => error.row().solution,
    }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::response::Response;
    use http::{HeaderMap, HeaderValue};

    use super::*;
    use crate::error::Answer;
    use crate::kling::envelope;
    use crate::request::id::RequestId;
    use crate::telemetry::metrics::Metrics;

    fn context() -> RequestContext {
        let id = HeaderValue::from_static("ours");
        let headers = [(http::HeaderName::from_static("x-request-id"), id)];
        let id = RequestId::of(&HeaderMap::from_iter(headers));
        let context = RequestContext::new(id, Arc::new(Metrics::new().unwrap()).enter());
        context.attempted();
        context
    }

    fn rendered(error: &Error, effect: Effect, context: &RequestContext) -> String {
        String::from_utf8(ErrorBody::new(error, effect, context).render()).unwrap()
    }

    #[test]
    fn error_of_kling_has_its_members_and_ours_behind_them() {
        let mut answer = Response::default();
        *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        let envelope = br#"{"code":1303,"message":"say \"no\"","request_id":"9f0c","data":{"n": 12345678901234567890}}"#;
        let error = Error::Service {
            answer: Answer::boxed(answer),
            envelope: envelope::read(envelope).unwrap(),
        };
        assert_eq!(
            rendered(&error, Effect::Create, &context()),
            concat!(
                r#"{"code":1303,"message":"say \"no\"","request_id":"9f0c","#,
                r#""data":{"n": 12345678901234567890},"#,
                r#""error":{"type":"concurrency_limited","source":"upstream","upstream_status":429,"#,
                r#""definition":"Trigger strategy","#,
                r#""explanation":"Concurrency or QPS exceeds the prepaid resource package limit","#,
                r#""solution":"Reduce the request frequency, try again later, or contact customer "#,
                r#"service to increase the limit","#,
                r#""retryable":true,"attempts":1,"#,
                r#""hint":"all keys of an account share its slots, and a task holds a slot until "#,
                r#"it ends: wait for running tasks, then send this again"}}"#,
                "\n",
            )
        );
    }

    #[test]
    fn error_of_the_proxy_has_the_same_members() {
        assert_eq!(
            rendered(
                &Error::NotFound("nothing is at this reserved path"),
                Effect::Read,
                &context()
            ),
            concat!(
                r#"{"code":9007,"message":"nothing is at this reserved path","request_id":"ours","#,
                r#""error":{"type":"not_found","source":"proxy","upstream_status":null,"#,
                r#""definition":"Refused by the proxy","#,
                r#""explanation":"Paths below `/_proxy` are reserved by the proxy, and nothing "#,
                r#"is served at this path","#,
                r#""solution":"Health and metrics are on the admin listener, `admin.address`","#,
                r#""retryable":false,"attempts":1}}"#,
                "\n",
            )
        );
        let error = Error::BadResponse {
            answer: Answer::boxed(Response::default()),
            excerpt: Some("<html>".to_owned()),
            is_bare: true,
        };
        let body = rendered(&error, Effect::Read, &context());
        let end = "\"retryable\":true,\"attempts\":1,\"excerpt\":\"<html>\"}}\n";
        assert!(body.contains(r#""request_id":"ours","#), "{body}");
        assert!(body.ends_with(end), "{body}");
    }
}

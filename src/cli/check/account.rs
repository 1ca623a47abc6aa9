//! Sends one authenticated read request, and reads Kling's response to the credential.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::{AUTHORIZATION, CONTENT_TYPE, DATE};
use http::{HeaderMap, HeaderValue, StatusCode};
use tokio::time::timeout;

use super::network::Target;
use super::report::{Fault, Finding, StepResult};
use crate::auth::token::{Credential, Validity};
use crate::cli::Exit;
use crate::cli::http_client::{self, Fetched};
use crate::clock::Clock;
use crate::error::chain;
use crate::kling::envelope::{self, Envelope};
use crate::kling::service_code::{self, Row};
use crate::telemetry::printable;

/// Longest wait for the response. A person waits for it, so `upstream.response_timeout` counts only if it is
/// shorter.
const PATIENCE: Duration = Duration::from_secs(15);
/// Period for which costs are requested. Kling does not list resource packs that were bought earlier, and
/// some packs are valid for a year.
const SPAN: Duration = Duration::from_hours(400 * 24);

/// Credential to check, with the periods and the clock that its tokens are made by.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) credential: Credential,
    pub(super) validity: Validity,
    pub(super) clock: Arc<dyn Clock>,
}

/// Response of upstream in Kling's form, with the times of the request.
pub(super) struct ApiResponse {
    pub(super) envelope: Envelope,
    /// Upstream's message, made safe to print, without secrets.
    pub(super) message: String,
    /// Time of upstream's clock, from the `Date` header.
    pub(super) date: Option<SystemTime>,
    /// Time of our clock before the request.
    pub(super) asked: SystemTime,
    /// Time of our clock after the response.
    pub(super) answered: SystemTime,
}

/// Requests the costs of the account. The request is free, and both kinds of credential can make it.
pub(super) async fn ask(target: &Target, credentials: &Credentials) -> StepResult<ApiResponse> {
    let asked = credentials.clock.now();
    let authorization = credentials
        .credential
        .authorization(credentials.validity, asked)
        .map_err(|error| {
            let advice = "copy the key again, and nothing else";
            Fault::new(
                Exit::Settings,
                "malformed_credential",
                chain(&error),
                advice,
            )
        })?;
    let limit = target.timeouts.response.min(PATIENCE);
    let exchange = exchange(target, authorization.clone(), asked);
    let Fetched {
        status,
        headers,
        body,
        ..
    } = match timeout(limit, exchange).await {
        Ok(exchanged) => exchanged?,
        Err(_) => {
            return Err(Fault::new(
                Exit::Unavailable,
                "no_answer",
                format!("no answer within {}", humantime::format_duration(limit)),
                "try again; if it stays silent, look at Kling's status page and at what is in \
                 between",
            ));
        }
    };
    // A success code under the HTTP status of an error proves nothing.
    let envelope = envelope::read_beginning(&body)
        .filter(|envelope| envelope.code != service_code::SUCCESS || status.is_success());
    let Some(envelope) = envelope else {
        return Err(not_kling(status, &headers));
    };
    let said = envelope.message.as_deref().unwrap_or("no message");
    let answer = ApiResponse {
        message: credentials.quote(said, &authorization),
        date: date(&headers),
        asked,
        answered: credentials.clock.now(),
        envelope,
    };
    let text = format!("{status}, code {}", answer.envelope.code);
    Ok(Finding::new(answer, text))
}

// === impl ApiResponse ===

impl ApiResponse {
    /// Returns the row of upstream's code.
    pub(super) fn row(&self) -> &'static Row {
        service_code::sent_by_kling(self.envelope.code)
    }
}

// === impl Credentials ===

impl Credentials {
    /// Returns a text of upstream's made safe to print, or a placeholder if the text repeats a secret.
    fn quote(&self, text: &str, authorization: &HeaderValue) -> String {
        let bearer = authorization.to_str().unwrap_or_default();
        let token = bearer.trim_start_matches("Bearer ");
        let secrets = match &self.credential {
            Credential::Pair {
                access_key,
                secret_key,
            } => vec![access_key.expose(), secret_key.expose()],
            Credential::ApiKey(key) => vec![key.expose()],
        };
        let mut secrets = token.split('.').chain(secrets);
        if secrets.any(|secret| text.contains(secret)) {
            "[redacted: it repeats the credential]".to_owned()
        } else {
            printable(text).into_owned()
        }
    }
}

/// Sends the request and reads the response. A redirect is returned like any other response.
async fn exchange(
    target: &Target,
    authorization: HeaderValue,
    now: SystemTime,
) -> Result<Fetched, Fault> {
    let milliseconds = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis()
    };
    let (start, end) = (milliseconds(now - SPAN), milliseconds(now));
    let origin = &target.origin;
    let url = format!("{origin}/account/costs?start_time={start}&end_time={end}");
    let client = target.client()?;
    let headers = HeaderMap::from_iter([(AUTHORIZATION, authorization)]);
    http_client::fetch(&client, url, headers)
        .await
        .map_err(|error| lost(&error))
}

/// Describes a request that got no response.
fn lost(error: &reqwest::Error) -> Fault {
    let (r#type, advice) = if is_no_http(error) {
        (
            "not_http",
            "the server at upstream.url does not speak HTTP: look at upstream.url",
        )
    } else {
        (
            "disconnected",
            "try again; if it stays so, something in between ends the connection",
        )
    };
    // The outer error only adds the address, which the report shows already.
    let error = error.source().unwrap_or(error);
    Fault::new(Exit::Unavailable, r#type, chain(error), advice)
}

/// Returns true if the cause is a response that is not HTTP.
fn is_no_http(error: &(dyn Error + 'static)) -> bool {
    let own = error.downcast_ref::<hyper::Error>();
    own.is_some_and(hyper::Error::is_parse) || error.source().is_some_and(is_no_http)
}

fn date(headers: &HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()
}

/// Describes a response that is not in Kling's form: another server sent it, or a gateway in between.
fn not_kling(status: StatusCode, headers: &HeaderMap) -> Fault {
    let media = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media = printable(media.unwrap_or("without a content type"));
    let text = format!("{status}, {media}: not in Kling's form");
    if status.is_redirection() {
        Fault::new(
            Exit::Unavailable,
            "redirected",
            text,
            "redirects are never followed: set upstream.url to where Kling's API itself is",
        )
    } else {
        Fault::new(
            Exit::Unavailable,
            "upstream_bad_response",
            text,
            "a gateway in between answers, or upstream.url is no Kling API: look at what \
             curl -v shows of it",
        )
    }
}

//! One authenticated read, and what Kling makes of the credential.

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

/// A person waits for the answer, so `upstream.response_timeout` counts only if it is shorter.
const PATIENCE: Duration = Duration::from_secs(15);
/// Packs that were bought earlier are not told, and some are good for a year.
const SPAN: Duration = Duration::from_hours(400 * 24);

/// What shows who we are.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) credential: Credential,
    pub(super) validity: Validity,
    pub(super) clock: Arc<dyn Clock>,
}

/// What upstream answered, in Kling's form.
pub(super) struct ApiResponse {
    pub(super) envelope: Envelope,
    /// What upstream says, fit to be shown.
    pub(super) message: String,
    /// Upstream's clock.
    pub(super) date: Option<SystemTime>,
    /// Our clock before and after.
    pub(super) asked: SystemTime,
    pub(super) answered: SystemTime,
}

/// Reads what the account has cost: free, and good for either kind of credential.
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
    // Under the status of an error, the code of a success says nothing.
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
    /// A foreign text, unless it repeats a secret.
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

/// Sends the request and reads the response. A redirect is a response like others.
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
    // The address stands in the report already.
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

/// What answers is something else, or something in between.
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

//! Tells an answer from an error, by the status and by the service code in the body.
//!
//! A success passes as it came, held only until its `code` is known; an error's body is read, within
//! bounds, so that what it says can be told in our form.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use futures_util::FutureExt;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, response};
use http_body::Body as _;
use http_body_util::BodyExt;
use sync_wrapper::SyncWrapper;
use tokio::time::{Instant, timeout_at};

use super::download::{Download, Step};
use super::text::Text;
use crate::effect::Effect;
use crate::envelope::{self, Envelope, Peek};
use crate::error::{Answer, Error};
use crate::task::Task;

/// As much of a body as is read to understand it, as sent and decoded, each.
const BOUND: usize = 64 << 10;
/// A success whose code is not known by then passes.
const HOLD: Duration = Duration::from_millis(200);
/// An error body that takes longer counts as cut off.
const ERROR_BODY: Duration = Duration::from_secs(10);
/// As much of a body that is no envelope as a client is shown, in characters.
const EXCERPT: usize = 512;

/// Passes a success, and makes an error of everything else that is one.
///
/// That to a create has the [`Task`] it made among its extensions: the log names it.
///
/// # Errors
///
/// [`Error::Service`] and [`Error::BadResponse`].
pub(super) async fn judge(
    mut head: response::Parts,
    body: Download,
    effect: Effect,
) -> Result<Response, Error> {
    let status = head.status;
    if status.is_client_error() || status.is_server_error() {
        let mut reader = Reader::new(&head.headers, body);
        Box::pin(reader.read_error()).await;
        let envelope = reader.envelope().filter(|envelope| envelope.code != 0);
        let excerpt = match envelope {
            Some(_) => None,
            None => excerpt(reader.text.seen()),
        };
        let answer = Box::new(Answer {
            head,
            body: SyncWrapper::new(reader.into_body()),
        });
        return Err(match envelope {
            Some(envelope) => Error::Service { answer, envelope },
            None => Error::BadResponse { answer, excerpt },
        });
    }
    if !status.is_success() || !is_json(&head.headers) || body.is_end_stream() {
        return Ok(Response::from_parts(head, Body::new(body)));
    }
    let mut reader = Reader::new(&head.headers, body);
    let mut patience = Patience::of(HOLD);
    match (reader.peek(&mut patience).await, effect) {
        (Peek::Code(0), Effect::Create) => {
            Box::pin(reader.read_within(&mut patience)).await;
            head.extensions.insert(Task::answered(reader.text.seen()));
        }
        (Peek::Code(0) | Peek::NoEnvelope | Peek::Undecided, _) => {}
        (Peek::Code(_), _) => {
            Box::pin(reader.read_error()).await;
            if let Some(envelope) = reader.envelope() {
                let answer = Box::new(Answer {
                    head,
                    body: SyncWrapper::new(reader.into_body()),
                });
                return Err(Error::Service { answer, envelope });
            }
        }
    }
    Ok(Response::from_parts(head, reader.into_body()))
}

/// Reads ahead in a body, and can put everything back.
struct Reader {
    body: Download,
    steps: VecDeque<Step>,
    text: Text,
    size: usize,
    end: End,
}

/// How long a body may keep somebody waiting. It counts from the first wait on: mostly all is there,
/// and nobody looks at a clock.
struct Patience {
    limit: Duration,
    deadline: Option<Instant>,
}

/// How a body ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    NotYet,
    Whole,
    Cut,
}

// === impl Reader ===

impl Reader {
    fn new(headers: &HeaderMap, body: Download) -> Self {
        let end = if body.is_end_stream() {
            End::Whole
        } else {
            End::NotYet
        };
        Self {
            body,
            steps: VecDeque::new(),
            text: Text::new(headers, BOUND),
            size: 0,
            end,
        }
    }

    /// Reads until the code is known, or cannot be known in time.
    async fn peek(&mut self, patience: &mut Patience) -> Peek {
        let mut worth_a_look = 1;
        loop {
            let seen = self.text.seen();
            // Looking anew at each byte would take the square of the body's size.
            if seen.len() >= worth_a_look || self.is_over() {
                worth_a_look = seen.len() + seen.len() / 4;
                match envelope::peek(seen) {
                    Peek::Undecided if !self.is_over() => {}
                    decided => return decided,
                }
            }
            if !patience.lasts(self.read()).await {
                return Peek::Undecided;
            }
        }
    }

    /// Reads an error's body as far as the bounds allow.
    async fn read_error(&mut self) {
        if !self.read_within(&mut Patience::of(ERROR_BODY)).await {
            self.end = End::Cut;
        }
    }

    /// Reads as far as the bounds allow. Tells whether that was possible in time.
    async fn read_within(&mut self, patience: &mut Patience) -> bool {
        while !self.is_over() {
            if !patience.lasts(self.read()).await {
                return false;
            }
        }
        true
    }

    async fn read(&mut self) {
        match self.body.frame().await {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.size += data.len();
                    self.text.push(data);
                }
                self.steps.push_back(Ok(frame));
                if self.body.is_end_stream() {
                    self.end = End::Whole;
                }
            }
            Some(Err(error)) => {
                self.steps.push_back(Err(error));
                self.end = End::Cut;
            }
            None => self.end = End::Whole,
        }
    }

    fn is_over(&self) -> bool {
        self.end != End::NotYet || self.size >= BOUND || self.text.is_full()
    }

    /// What the body says; nothing if it was cut off.
    fn envelope(&self) -> Option<Envelope> {
        match self.end {
            End::Whole if !self.text.is_full() => envelope::read(self.text.seen()),
            End::Whole | End::NotYet => envelope::read_beginning(self.text.seen()),
            End::Cut => None,
        }
    }

    /// The whole body as it came.
    fn into_body(self) -> Body {
        let Self {
            mut body, steps, ..
        } = self;
        body.unread(steps);
        Body::new(body)
    }
}

// === impl Patience ===

impl Patience {
    fn of(limit: Duration) -> Self {
        Self {
            limit,
            deadline: None,
        }
    }

    /// Waits for something. Tells whether it came in time.
    async fn lasts(&mut self, step: impl Future<Output = ()>) -> bool {
        let mut step = pin!(step);
        if step.as_mut().now_or_never().is_some() {
            return true;
        }
        let limit = self.limit;
        let deadline = *self.deadline.get_or_insert_with(|| Instant::now() + limit);
        timeout_at(deadline, step).await.is_ok()
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return false;
    };
    let value = value.as_bytes();
    let end = value.iter().position(|b| *b == b';');
    let essence = value[..end.unwrap_or(value.len())].trim_ascii();
    essence.eq_ignore_ascii_case(b"application/json")
        || essence
            .last_chunk()
            .is_some_and(|suffix: &[u8; 5]| suffix.eq_ignore_ascii_case(b"+json"))
}

/// How a text begins; nothing of what is not text.
fn excerpt(bytes: &[u8]) -> Option<String> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        // A character that the bound cut through is no reason.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let is_text = !text.is_empty()
        && text
            .chars()
            .all(|c| !c.is_control() || matches!(c, '\t' | '\n' | '\r'));
    is_text.then(|| text.chars().take(EXCERPT).collect())
}

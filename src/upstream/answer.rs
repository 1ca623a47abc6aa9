//! Tells an answer from an error, by the status and by the service code in the body.
//!
//! A success passes as it came, held only until its `code` is known; an error's body is read, within
//! bounds, so that what it says can be told in our form. An answer that breaks off before the first byte
//! of its body becomes an error too, if that shows while its code is awaited; any other answer is not held
//! for that, only what has come already is looked at.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::download::Download;
use super::text::Text;
use crate::error::BoxError;
use crate::kling::envelope::{self, Envelope, Peek};
use crate::kling::service_code;
use crate::request::headers;

/// As much of a body as is read to understand it, as sent and decoded, each.
const BOUND: usize = 64 << 10;
/// Turns of the event loop in which the beginning of a body that has come shows: a connection of hyper's
/// brings it in the turn after it is asked for.
const TURNS: u32 = 2;
/// A success whose code is not known by then passes.
const HOLD: Duration = Duration::from_millis(200);
/// An error body that takes longer counts as cut off.
const ERROR_BODY: Duration = Duration::from_secs(10);
/// As much of a body that is no envelope as a client is shown, in characters.
const EXCERPT: usize = 512;

/// What an answer is.
pub(super) enum Verdict {
    /// Kling says that it did what was asked. It passes.
    Done,
    /// It passes.
    Success,
    /// An error, whose body says this.
    Service(Envelope),
    /// An error whose body is no envelope, and how that begins where it is text.
    Bare(Option<String>),
    /// It broke off before the first byte of its body.
    Broken(BoxError),
}

/// Strips an answer of what must not reach the client, and judges it by its status and by what is read
/// ahead of its body.
pub(super) async fn judge(answer: &mut http::Response<Download>) -> Verdict {
    let is_json = headers::strip_response(answer.headers_mut());
    let status = answer.status();
    if status.is_client_error() || status.is_server_error() {
        return Box::pin(judge_error(answer)).await;
    }
    if answer.body().is_read() {
        return Verdict::Success;
    }
    let mut reader = AheadReader::of(answer);
    let mut verdict = Verdict::Success;
    if status.is_success() && is_json {
        match timeout(HOLD, reader.peek()).await {
            Ok(Peek::Code(service_code::SUCCESS)) => return Verdict::Done,
            Ok(Peek::NoEnvelope | Peek::Undecided) | Err(_) => {}
            Ok(Peek::Code(_)) => {
                Box::pin(reader.read_error()).await;
                if let Some(envelope) = reader.envelope() {
                    verdict = Verdict::Service(envelope);
                }
            }
        }
    } else {
        Box::pin(reader.glance()).await;
    }
    match reader.body.take_failure() {
        Some(failure) => Verdict::Broken(failure),
        None => verdict,
    }
}

async fn judge_error(answer: &mut http::Response<Download>) -> Verdict {
    let mut reader = AheadReader::of(answer);
    reader.read_error().await;
    match reader
        .envelope()
        .filter(|envelope| envelope.code != service_code::SUCCESS)
    {
        Some(envelope) => Verdict::Service(envelope),
        None => Verdict::Bare(excerpt(reader.text.seen())),
    }
}

/// Reads ahead in a body.
struct AheadReader<'a> {
    body: &'a mut Download,
    text: Text,
    size: usize,
    end: BodyEnd,
}

/// How a body ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyEnd {
    NotYet,
    Whole,
    Cut,
}

// === impl AheadReader ===

impl<'a> AheadReader<'a> {
    fn of(answer: &'a mut http::Response<Download>) -> Self {
        let text = Text::new(answer.headers(), BOUND);
        let body = answer.body_mut();
        let end = if body.is_read() {
            BodyEnd::Whole
        } else {
            BodyEnd::NotYet
        };
        Self {
            body,
            text,
            size: 0,
            end,
        }
    }

    /// Reads until the code is known, or cannot be known from what is kept.
    async fn peek(&mut self) -> Peek {
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
            self.read().await;
        }
    }

    /// Reads what is there already, without waiting.
    async fn glance(&mut self) {
        for _ in 0..TURNS {
            if self.read().now_or_never().is_some() {
                return;
            }
            yield_now().await;
        }
        let _ = self.read().now_or_never();
    }

    /// Reads an error's body as far as the bounds allow.
    async fn read_error(&mut self) {
        let read = async {
            while !self.is_over() {
                self.read().await;
            }
        };
        if timeout(ERROR_BODY, read).await.is_err() {
            self.end = BodyEnd::Cut;
        }
    }

    async fn read(&mut self) {
        poll_fn(|cx| self.poll_read(cx)).await;
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.body.poll_ahead(cx)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.size += data.len();
                    self.text.push(data);
                }
                if self.body.is_read() {
                    self.end = BodyEnd::Whole;
                }
            }
            Some(Err(_)) => self.end = BodyEnd::Cut,
            None => self.end = BodyEnd::Whole,
        }
        Poll::Ready(())
    }

    fn is_over(&self) -> bool {
        self.end != BodyEnd::NotYet || self.size >= BOUND || self.text.is_full()
    }

    /// What the body says; nothing if it was cut off.
    fn envelope(&self) -> Option<Envelope> {
        match self.end {
            BodyEnd::Whole if !self.text.is_full() => envelope::read(self.text.seen()),
            BodyEnd::Whole | BodyEnd::NotYet => envelope::read_beginning(self.text.seen()),
            BodyEnd::Cut => None,
        }
    }
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

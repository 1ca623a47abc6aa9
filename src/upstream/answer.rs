//! Distinguishes a success from an error, by the status and by the service code in the body.
//!
//! The body of a success passes unchanged, and is held only until its `code` is known. The body of an error
//! is read, within limits, so that the proxy can report the error in its own form.
//!
//! A response that breaks off before the first byte of its body becomes an error too, if that shows while its
//! code is awaited. Any other response is not held for this check: only data that has already arrived is
//! read.

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

/// Most bytes of a body that are read to understand it. Encoded and decoded bytes are limited separately.
const BOUND: usize = 64 << 10;
/// Turns of the event loop after which body data that has arrived can be read. A connection of hyper delivers
/// data in the turn after it was asked for it.
const TURNS: u32 = 2;
/// Longest time that a success is held. If its code is not known by then, it passes.
const HOLD: Duration = Duration::from_millis(200);
/// Longest time for reading the body of an error. A body that takes longer counts as cut off.
const ERROR_BODY: Duration = Duration::from_secs(10);
/// Most characters that a client is shown of a body that is no envelope.
const EXCERPT: usize = 512;

/// Classification of a response, by its status and the beginning of its body.
pub(super) enum Verdict {
    /// A success that its service code confirms. It passes.
    Done,
    /// No error is known, but no service code confirms the success. It passes.
    Success,
    /// An error with a service code. Its body is this envelope.
    Service(Envelope),
    /// An error without a service code.
    Bare {
        /// Beginning of the body, if that is text.
        excerpt: Option<String>,
        /// True if the whole body is known to hold no envelope.
        is_bare: bool,
    },
    /// The response broke off before the first byte of its body.
    Broken(BoxError),
}

/// Removes the headers that must not reach the client, and judges a response by its status and by the
/// beginning of its body, which is read ahead.
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
    match reader.envelope() {
        Some(envelope) if envelope.code != service_code::SUCCESS => Verdict::Service(envelope),
        envelope => Verdict::Bare {
            excerpt: excerpt(reader.text.seen()),
            is_bare: envelope.is_none() && reader.end == BodyEnd::Whole,
        },
    }
}

/// Reads the beginning of a body ahead, up to [`BOUND`].
struct AheadReader<'a> {
    body: &'a mut Download,
    text: Text,
    size: usize,
    end: BodyEnd,
}

/// End of a body, as far as it was read.
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

    /// Reads until the code is known, or cannot become known from the bytes that are kept.
    async fn peek(&mut self) -> Peek {
        let mut worth_a_look = 1;
        loop {
            let seen = self.text.seen();
            // To parse again after each byte would take time in the square of the body's size.
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

    /// Reads the data that has already arrived, without waiting for more.
    async fn glance(&mut self) {
        for _ in 0..TURNS {
            if self.read().now_or_never().is_some() {
                return;
            }
            yield_now().await;
        }
        let _ = self.read().now_or_never();
    }

    /// Reads the body of an error as far as the limits allow.
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

    /// Returns the envelope in the body; `None` if there is none, or if the body was cut off.
    fn envelope(&self) -> Option<Envelope> {
        match self.end {
            BodyEnd::Whole if !self.text.is_full() => envelope::read(self.text.seen()),
            BodyEnd::Whole | BodyEnd::NotYet => envelope::read_beginning(self.text.seen()),
            BodyEnd::Cut => None,
        }
    }
}

/// Returns the beginning of a text; `None` if the bytes are not text.
fn excerpt(bytes: &[u8]) -> Option<String> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        // The limit may have cut through the last character. The rest is text nevertheless.
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

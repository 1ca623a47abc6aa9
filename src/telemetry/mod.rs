//! Sets up what is logged, where and how.

mod line;
pub mod metrics;
mod queue;

use std::borrow::Cow;
use std::io::IsTerminal;
use std::sync::Once;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

use self::line::JsonLine;
use self::queue::{DROPPED, Lines, QUEUE};

/// How log lines look (`log.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `Pretty` on a terminal, else `Json`.
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// A hold on which lines are logged, to change that while running.
pub struct Filter(Handle<Targets, Registry>);

// === impl Filter ===

impl Filter {
    /// Logs what this filter lets through from now on.
    pub fn set(&self, filter: Targets) {
        if let Err(error) = self.0.reload(filter) {
            tracing::warn!(%error, "cannot change what is logged");
        }
    }
}

/// Logs to standard error from now on, as the first caller in the process says.
///
/// Lines are let through by target and level. `EnvFilter` also looks at the fields of spans, for
/// which it brings a regular expression engine: a twentieth of the program.
pub fn init(format: LogFormat, filter: Targets) -> Filter {
    let (filter, handle) = reload::Layer::new(filter);
    let terminal = std::io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(Lines);
    let lines = match (format, terminal) {
        (LogFormat::Json, _) | (LogFormat::Auto, false) => {
            lines.json().event_format(JsonLine).boxed()
        }
        (LogFormat::Pretty, _) | (LogFormat::Auto, true) => lines.with_ansi(terminal).boxed(),
    };
    start_writing();
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    // Only a test that sets up twice gets here; the first setting stands.
    if let Err(error) = subscriber.try_init() {
        tracing::debug!(%error, "logging is set up already");
    }
    Filter(handle)
}

/// Writes a line for the person at the terminal, behind the log lines before it.
pub fn print(line: &str) {
    start_writing();
    QUEUE.push(line.as_bytes(), true);
}

/// Starts the thread that writes lines. Without it they fill the queue, which readiness tells.
fn start_writing() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| drop(QUEUE.start()));
}

/// Waits until all lines are written, for at most a second: the process is about to end.
pub fn finish() {
    QUEUE.flush(LAST_LINES);
}

/// Returns true if log lines were lost and none could be written since.
pub fn is_stuck() -> bool {
    QUEUE.is_stuck()
}

/// How many log lines were lost since the start.
pub fn lines_dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// How long the end of the process waits for the reader of the log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// As much of a foreign text as is logged, in bytes.
const LONGEST: usize = 1024;

/// The beginning of a foreign text, with everything escaped that is not seen where it is printed:
/// control characters, of which JSON leaves U+0080 to U+009F as they are; line and paragraph
/// separators, which some readers take for the end of a line; and format characters, which can turn a
/// line around or hide a part of it.
pub fn printable(text: &str) -> Cow<'_, str> {
    let end = text.floor_char_boundary(LONGEST);
    let (text, rest) = text.split_at(end);
    let special = |byte| !matches!(byte, b' '..=b'~');
    // Mostly it is plain ASCII, which unlike characters is looked at in many bytes at a time.
    let plain = !text
        .bytes()
        .fold(false, |found, byte| found | special(byte));
    if rest.is_empty() && (plain || !text.contains(is_unseen)) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + '…'.len_utf8());
    for c in text.chars() {
        if is_unseen(c) {
            escaped.extend(c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    if !rest.is_empty() {
        escaped.push('…');
    }
    escaped.into()
}

/// Whether a character does something to a text, rather than being seen in it.
fn is_unseen(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    matches!(
        c.general_category(),
        Control | Format | LineSeparator | ParagraphSeparator
    )
}

/// The target of the log lines of creates.
pub const CREATES: &str = "kling_proxy::creates";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_in_a_text_is_escaped() {
        for (text, printed) in [
            ("a b~", "a b~"),
            ("日本語 é e\u{301} हिन्दी 👍", "日本語 é e\u{301} हिन्दी 👍"),
            ("a\r\n\0\u{7f}\u{9b}", r"a\u{d}\u{a}\u{0}\u{7f}\u{9b}"),
            ("a\u{2028}b\u{2029}c", r"a\u{2028}b\u{2029}c"),
            ("\u{202e}gnp.exe\u{202c}", r"\u{202e}gnp.exe\u{202c}"),
            ("\u{2066}\u{2069}\u{61c}", r"\u{2066}\u{2069}\u{61c}"),
            (
                "\u{200b}\u{200d}\u{feff}\u{ad}",
                r"\u{200b}\u{200d}\u{feff}\u{ad}",
            ),
            ("\u{e0041}", r"\u{e0041}"),
        ] {
            assert_eq!(printable(text), printed);
        }
    }
}

//! Sets up the log: its lines, their format and their destination.

mod fit;
mod line;
pub mod metrics;
mod pretty;
mod queue;

use std::borrow::Cow;
use std::io::IsTerminal;
use std::sync::Once;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

pub use self::fit::{columns, cut};
use self::line::JsonLine;
use self::pretty::{PrettyLine, SpanId};
use self::queue::{DROPPED, Lines, QUEUE};

/// Format of log lines (`log.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `Pretty` on a terminal, else `Json`.
    Auto,
    /// Text for people, cut to the width of a terminal, with colours there.
    Pretty,
    /// One JSON object per line.
    Json,
}

/// Handle to change the filter of log lines at run time.
pub struct Filter(Handle<Targets, Registry>);

// === impl Filter ===

impl Filter {
    /// Applies this filter to all later log lines.
    pub fn set(&self, filter: Targets) {
        if let Err(error) = self.0.reload(filter) {
            tracing::warn!(%error, "cannot change what is logged");
        }
    }
}

/// Starts logging to standard error, with this format and filter. Only the first call in a process has
/// an effect.
///
/// The filter compares target and level. `EnvFilter` compares the fields of spans too, and needs a
/// regular expression engine for that, which is a twentieth of the program.
pub fn init(format: LogFormat, filter: Targets) -> Filter {
    let (filter, handle) = reload::Layer::new(filter);
    let terminal = std::io::stderr().is_terminal();
    let lines = fmt::layer().with_writer(Lines);
    let lines = match (format, terminal) {
        (LogFormat::Json, _) | (LogFormat::Auto, false) => {
            lines.json().event_format(JsonLine).boxed()
        }
        (LogFormat::Pretty, _) | (LogFormat::Auto, true) => lines
            .fmt_fields(SpanId)
            .event_format(PrettyLine::new(terminal))
            .boxed(),
    };
    start_writing();
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    // Only a test that sets up logging twice gets here; the first setup stays.
    if let Err(error) = subscriber.try_init() {
        tracing::debug!(%error, "logging is set up already");
    }
    Filter(handle)
}

/// Returns the filter for a log whose `log.filter` is not set. On a terminal it also passes successful
/// reads, unless the lines are JSON: a terminal on which nothing happens looks as if the proxy were stuck.
pub fn default_filter(filter: Targets, format: LogFormat) -> Targets {
    if format != LogFormat::Json && std::io::stderr().is_terminal() {
        filter.with_target(READS, LevelFilter::DEBUG)
    } else {
        filter
    }
}

/// Writes a line for the user at the terminal, after the log lines before it.
pub fn print(line: &str) {
    start_writing();
    QUEUE.push(line.as_bytes(), true);
}

/// Starts the thread that writes lines. If it cannot start, lines fill the queue, and readiness reports
/// that.
fn start_writing() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| drop(QUEUE.start()));
}

/// Waits until all lines are written, for at most one second, because the process is about to end.
pub fn finish() {
    QUEUE.flush(LAST_LINES);
}

/// Returns true if log lines were lost and none could be written since.
pub fn is_stuck() -> bool {
    QUEUE.is_stuck()
}

/// Returns the number of log lines lost since the start.
pub fn lines_dropped() -> u64 {
    DROPPED.load(Relaxed)
}

/// Longest wait for the reader of the log at the end of the process.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Longest part of a foreign text that is logged, in bytes.
const LONGEST: usize = 1024;

/// Returns the beginning of a foreign text, with invisible characters escaped: control characters, of
/// which JSON leaves U+0080 to U+009F unescaped; line and paragraph separators, which some readers take
/// for the end of a line; and format characters, which can reverse a line or hide a part of it.
pub fn printable(text: &str) -> Cow<'_, str> {
    let end = text.floor_char_boundary(LONGEST);
    let (text, rest) = text.split_at(end);
    let special = |byte| !matches!(byte, b' '..=b'~');
    // Usually the text is plain ASCII. Checking bytes is faster than checking characters, since many
    // bytes are checked at a time.
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

/// Returns true if a character is invisible and only has an effect on the text around it.
fn is_unseen(c: char) -> bool {
    use GeneralCategory::{Control, Format, LineSeparator, ParagraphSeparator};
    matches!(
        c.general_category(),
        Control | Format | LineSeparator | ParagraphSeparator
    )
}

/// Target of the log lines about creates.
pub const CREATES: &str = "kling_proxy::creates";

/// Target of the log lines about the outcome of reads.
pub const READS: &str = "kling_proxy::layer::trace";

/// Name of an event about a create whose outcome gets another line later. A terminal leaves it out; JSON
/// lines do not show names.
pub const INTERIM: &str = "interim";

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

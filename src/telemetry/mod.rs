//! Sets up what is logged, where and how.

mod line;
mod lines;

use std::borrow::Cow;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Handle;

use self::line::JsonLine;
use self::lines::Lines;
pub use self::lines::{flush, unhurried};

/// How log lines look (`log.format`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `Pretty` on a terminal, else `Json`.
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// A hold on which lines are logged, to change that while running.
pub struct Filter(Box<dyn Fn(EnvFilter) + Send>);

// === impl Filter ===

impl Filter {
    fn of<S: 'static>(handle: Handle<EnvFilter, S>) -> Self {
        Self(Box::new(move |filter| {
            if let Err(error) = handle.reload(filter) {
                tracing::warn!(%error, "cannot change what is logged");
            }
        }))
    }

    /// Logs what this filter lets through from now on.
    pub fn set(&self, filter: EnvFilter) {
        (self.0)(filter);
    }
}

/// Logs to standard error from now on, as the first caller in the process says.
pub fn init(format: Format, filter: EnvFilter) -> Filter {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lines);
    let terminal = std::io::stderr().is_terminal();
    let (filter, set) = match (format, terminal) {
        (Format::Json, _) | (Format::Auto, false) => {
            let builder = builder
                .json()
                .event_format(JsonLine)
                .with_filter_reloading();
            (Filter::of(builder.reload_handle()), builder.try_init())
        }
        (Format::Pretty, _) | (Format::Auto, true) => {
            let builder = builder.with_ansi(terminal).with_filter_reloading();
            (Filter::of(builder.reload_handle()), builder.try_init())
        }
    };
    // Only a test that sets up twice gets here; the first setting stands.
    if let Err(error) = set {
        tracing::debug!(error, "logging is set up already");
    }
    filter
}

/// As much of a foreign text as is logged, in bytes.
const LONGEST: usize = 1024;

/// The beginning of a foreign text, without control characters: JSON leaves those of U+0080 to
/// U+009F as they are, and some terminals obey them.
pub fn printable(text: &str) -> Cow<'_, str> {
    let end = text.floor_char_boundary(LONGEST);
    let (text, rest) = text.split_at(end);
    let special = |byte| !matches!(byte, b' '..=b'~');
    // Mostly it is plain ASCII, which unlike characters is looked at in many bytes at a time.
    let plain = !text
        .bytes()
        .fold(false, |found, byte| found | special(byte));
    if rest.is_empty() && (plain || !text.contains(char::is_control)) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + '…'.len_utf8());
    for c in text.chars() {
        if c.is_control() {
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

//! Sets up what is logged, where and how.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

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

/// Logs to standard error from now on, as the first caller in the process says.
pub fn init(format: Format, filter: EnvFilter) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let terminal = std::io::stderr().is_terminal();
    let set = match (format, terminal) {
        (Format::Json, _) | (Format::Auto, false) => builder
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .try_init(),
        (Format::Pretty, _) | (Format::Auto, true) => builder.with_ansi(terminal).try_init(),
    };
    // Only a test that sets up twice gets here; the first setting stands.
    if let Err(error) = set {
        tracing::debug!(error, "logging is set up already");
    }
}

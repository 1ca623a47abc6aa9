//! What a proxy is started with, kept to be read again.

use std::ffi::OsString;

use crate::cli::SettingsArgs;
use crate::credentials::Places;
use crate::settings::{Row, Settings};
use crate::telemetry::Filter;

/// The settings in force, and where they came from.
pub(super) struct Configuration {
    pub(super) args: SettingsArgs,
    pub(super) environment: Vec<(OsString, OsString)>,
    pub(super) settings: Settings,
    pub(super) rows: Vec<Row>,
    /// What decides which lines are logged.
    pub(super) filter: Filter,
    /// Whether the embedded sandbox is upstream; its credential never changes.
    pub(super) sandboxed: bool,
}

// === impl Configuration ===

impl Configuration {
    /// Where to look for a credential.
    pub(super) fn places(&self) -> Places<'_> {
        Places {
            environment: &self.environment,
            configured: &self.settings.credentials,
        }
    }
}

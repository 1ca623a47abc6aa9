//! What a proxy is started with, kept to be read again.

use crate::auth::credentials::Places;
use crate::cli::SettingsArgs;
use crate::environment::Environment;
use crate::settings::{SettingRow, Settings};
use crate::telemetry::Filter;

/// The settings in force, and where they came from.
pub(in crate::cli) struct Configuration {
    pub(in crate::cli) args: SettingsArgs,
    pub(in crate::cli) environment: Environment,
    pub(in crate::cli) settings: Settings,
    pub(in crate::cli) rows: Vec<SettingRow>,
    /// What decides which lines are logged.
    pub(in crate::cli) filter: Filter,
    /// Whether the embedded sandbox is upstream; its credential never changes.
    pub(in crate::cli) sandboxed: bool,
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

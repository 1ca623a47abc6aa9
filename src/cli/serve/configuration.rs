//! The configuration that a proxy is started with. A reload reads it again.

use crate::auth::credentials::Places;
use crate::cli::SettingsArgs;
use crate::environment::Environment;
use crate::settings::{SettingRow, Settings};
use crate::telemetry::Filter;

/// The settings in force, and the flags and environment that they come from.
pub(in crate::cli) struct Configuration {
    pub(in crate::cli) args: SettingsArgs,
    pub(in crate::cli) environment: Environment,
    pub(in crate::cli) settings: Settings,
    pub(in crate::cli) rows: Vec<SettingRow>,
    /// Handle to change the log filter at run time.
    pub(in crate::cli) filter: Filter,
    /// True if the embedded sandbox is upstream. Its credential never changes.
    pub(in crate::cli) sandboxed: bool,
    /// The command line that is recommended if there is no credential.
    pub(in crate::cli) trial: &'static str,
}

// === impl Configuration ===

impl Configuration {
    /// Returns the places to look for a credential.
    pub(super) fn places(&self) -> Places<'_> {
        Places {
            environment: &self.environment,
            configured: &self.settings.credentials,
        }
    }
}

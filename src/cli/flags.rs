//! The flags that commands share, and the commands that each flag has an effect on.

use std::mem;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, CommandFactory, Id};

use super::{CommandLine, Exit, Failure};
use crate::environment::Environment;
use crate::settings::{Flags, SettingProblem, SettingRow, Settings};
use crate::telemetry;

#[derive(Args, Clone, Copy)]
pub(super) struct WithSandbox {
    /// Use the embedded Kling API as upstream: no account, no network
    #[arg(long, conflicts_with = "upstream")]
    pub(super) sandbox: bool,
}

/// Settings of the command line; they override variables and file.
#[derive(Args)]
pub(super) struct SettingsArgs {
    /// Configuration file instead of the one in the configuration folder
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on for clients [default: 127.0.0.1:5546]
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Short for --listen 127.0.0.1:PORT
    #[arg(long, global = true, value_name = "PORT", conflicts_with = "listen")]
    port: Option<u16>,
    /// Address to listen on for health and metrics, or "off" [default: 127.0.0.1:5547]
    #[arg(long, global = true, value_name = "ADDRESS")]
    admin: Option<String>,
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help = "URL of the API [default: https://api-singapore.klingai.com]"
    )]
    upstream: Option<String>,
    /// Log lines: auto, pretty or json [default: auto]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Levels and targets of the lines to log, as in RUST_LOG [default: info]
    #[arg(long, global = true, value_name = "FILTER")]
    log_filter: Option<String>,
}

/// Builds the command line for clap. Flags of settings may stand before and after a command. The help of a
/// command shows only the flags that have an effect on it.
pub(super) fn command_line() -> clap::Command {
    let command = CommandLine::command();
    let shared = command.get_arguments().filter(|flag| flag.is_global_set());
    let shared: Vec<_> = shared.cloned().collect();
    command.mut_subcommands(|command| {
        let name = command.get_name().to_owned();
        let idle = shared.iter().filter(|flag| !heeds(&name, flag.get_id()));
        // Otherwise clap would add them without hiding them.
        let hidden: Vec<_> = idle.map(|flag| flag.clone().hide(true)).collect();
        command.args(hidden)
    })
}

/// Returns true if a flag that commands share has an effect on this command.
fn heeds(command: &str, flag: &Id) -> bool {
    let flag = flag.as_str();
    match command {
        "serve" | "check" => true,
        "run" => !["listen", "port", "admin"].contains(&flag),
        "settings" => flag != "sandbox",
        "sandbox" => ["config", "log_format", "log_filter"].contains(&flag),
        "health" | "wait" | "tasks" => ["config", "admin"].contains(&flag),
        "token" => flag == "config",
        _ => false,
    }
}

/// Refuses flags that have no effect on the command, since the user expects one.
pub(super) fn refuse_idle(matches: &ArgMatches) -> Result<(), Failure> {
    let command = matches.subcommand_name().unwrap_or("serve");
    let given = |flag: &&Id| matches.value_source(flag.as_str()) == Some(ValueSource::CommandLine);
    let idle = matches
        .ids()
        .filter(given)
        .find(|flag| !heeds(command, flag));
    match idle {
        Some(flag) => {
            let flag = flag.as_str().replace('_', "-");
            let reason = format!("--{flag} has no effect on `{command}`");
            Err(Failure::new(Exit::Usage, reason))
        }
        None => Ok(()),
    }
}

// === impl SettingsArgs ===

impl SettingsArgs {
    fn flags(&self) -> Flags {
        let port = self.port.map(|port| format!("127.0.0.1:{port}"));
        let values = [
            ("listen.address", "--listen", &self.listen),
            ("listen.address", "--port", &port),
            ("admin.address", "--admin", &self.admin),
            ("upstream.url", "--upstream", &self.upstream),
            ("log.format", "--log-format", &self.log_format),
            ("log.filter", "--log-filter", &self.log_filter),
        ];
        let given = values
            .into_iter()
            .filter_map(|(key, flag, value)| Some((key, flag, value.as_ref()?.clone())));
        Flags {
            config: self.config.clone(),
            values: given.collect(),
        }
    }

    /// Reads and checks all settings. If `log.filter` is not set, the filter depends on standard error.
    pub(super) fn load(
        &self,
        environment: &Environment,
    ) -> Result<(Settings, Vec<SettingRow>), Failure> {
        let loaded = Settings::load(&self.flags(), environment);
        let (mut settings, rows) = loaded.map_err(|problems| Failure {
            exit: Exit::Settings,
            lines: problems.iter().map(SettingProblem::to_string).collect(),
        })?;
        if has_default(&rows, "log.filter") {
            let log = &mut settings.log;
            log.filter = telemetry::default_filter(mem::take(&mut log.filter), log.format);
        }
        Ok((settings, rows))
    }
}

/// Returns true if no source sets this key.
pub(super) fn has_default(rows: &[SettingRow], key: &str) -> bool {
    rows.iter().any(|row| row.key == key && row.is_default())
}

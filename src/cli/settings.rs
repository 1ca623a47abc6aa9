//! `kling-proxy settings`: prints the effective settings as a configuration file, with the source of each
//! value in a comment.

use super::{Failure, SettingsArgs, say};
use crate::auth::credentials::{Error, Places};
use crate::environment::Environment;
use crate::error::chain;

pub(super) fn run(args: &SettingsArgs, environment: &Environment) -> Result<(), Failure> {
    let (settings, rows) = args.load(environment)?;
    let lines: Vec<_> = rows
        .iter()
        .map(|row| format!("{} = {}", row.key, row.value))
        .collect();
    let width = lines.iter().map(String::len).max().unwrap_or_default();
    for (line, row) in lines.iter().zip(&rows) {
        say(format_args!("{line:width$}  # {}", row.source));
    }
    let command = !settings.credentials.command.is_empty();
    say(
        match (Places {
            environment,
            configured: &settings.credentials,
        })
        .find()
        {
            Ok(found) => format!(
                "# credential: {} from {}",
                found.credential.kind(),
                found.source
            ),
            Err(Error::Missing) if command => {
                "# credential: what credentials.command prints".to_owned()
            }
            Err(error) => format!("# {}", chain(&error)),
        },
    );
    Ok(())
}

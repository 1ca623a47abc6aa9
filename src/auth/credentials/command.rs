//! A command that prints a credential, for those who keep keys in a password manager or a vault.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::{self, Child};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{Error, Found, Key, api_key, key, pair, without_secrets};
use crate::auth::secret::Secret;
use crate::environment::Environment;

/// A command line, run without a shell.
#[derive(Clone, Copy)]
pub struct CredentialCommand<'a> {
    pub(super) words: &'a [String],
    pub(super) environment: &'a Environment,
}

/// What is wrong with a command. It shows nothing of what was printed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started or waited for.
    #[error("cannot run it")]
    Run(#[from] std::io::Error),
    /// It did not end.
    #[error("it did not end within {LONGEST:?}")]
    Slow,
    /// It says that it failed.
    #[error("it ended with {0}")]
    Failed(std::process::ExitStatus),
    /// It printed something else.
    #[error(
        "want one JSON object, {{\"access_key\":…,\"secret_key\":…}} or {{\"api_key\":…}}, on its \
         standard output"
    )]
    Output,
}

/// What it prints.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Printed {
    #[serde(rename = "access_key")]
    access: Option<Secret>,
    #[serde(rename = "secret_key")]
    secret: Option<Secret>,
    #[serde(rename = "api_key")]
    api: Option<Secret>,
}

/// The key that names a command.
pub(super) const PLACE: &str = "credentials.command";
/// It may have to ask a server, but not a person.
const LONGEST: Duration = Duration::from_secs(10);
/// More than any credential.
const MOST: u64 = 64 << 10;

// === impl CredentialCommand ===

impl CredentialCommand<'_> {
    /// Runs the command and reads what it prints. What it writes to standard error is for people.
    ///
    /// # Errors
    ///
    /// [`Error::Command`], and what is wrong with the keys.
    pub async fn run(self) -> Result<Found, Error> {
        let mut child = self.spawn()?;
        let group = child.id();
        let Ok(printed) = timeout(LONGEST, output(&mut child)).await else {
            end(group);
            return Err(CommandError::Slow.into());
        };
        let printed = printed?;
        let printed: Printed =
            serde_json::from_slice(&printed).map_err(|_| CommandError::Output)?;
        let read = |name: &str, text: Option<Secret>| -> Result<Option<Key>, Error> {
            let place = format!("{PLACE}, {name}");
            text.map(|text| key(place, text.expose())).transpose()
        };
        let found = if printed.api.is_some() {
            read("api_key", printed.api)?.map(api_key).transpose()?
        } else {
            pair(
                ("access_key", read("access_key", printed.access)?),
                ("secret_key", read("secret_key", printed.secret)?),
            )?
        };
        let found = found.ok_or(CommandError::Output)?;
        Ok(Found {
            source: PLACE.to_owned(),
            ..found
        })
    }

    fn spawn(self) -> Result<Child, CommandError> {
        let (program, arguments) = self.words.split_first().ok_or(CommandError::Output)?;
        let child = process::Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(without_secrets(self.environment).cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()?;
        Ok(child)
    }
}

/// What a command prints until it ends well.
async fn output(child: &mut Child) -> Result<Zeroizing<Vec<u8>>, CommandError> {
    let mut printed = Zeroizing::new(Vec::new());
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MOST).read_to_end(&mut printed).await?;
    }
    let status = child.wait().await?;
    if status.success() {
        Ok(printed)
    } else {
        Err(CommandError::Failed(status))
    }
}

/// Ends a command that is too slow, and what it has started.
fn end(group: Option<u32>) {
    let group = group.and_then(|group| Pid::from_raw(group.cast_signed()));
    if let Some(group) = group
        && let Err(error) = kill_process_group(group, Signal::KILL)
    {
        tracing::debug!(%error, "cannot end a command");
    }
}

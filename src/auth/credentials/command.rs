//! Runs a command that prints a credential, for keys that are kept in a password manager or a vault.

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

/// Command line that prints a credential. It runs without a shell.
#[derive(Clone, Copy)]
pub struct CredentialCommand<'a> {
    pub(super) words: &'a [String],
    pub(super) environment: &'a Environment,
}

/// Failure of a credential command. Its text contains nothing of the command's output.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command could not be started, read from or waited for.
    #[error("cannot run it")]
    Run(#[from] std::io::Error),
    /// The command did not end within its time limit.
    #[error("it did not end within {LONGEST:?}")]
    Slow,
    /// The command ended with an exit status that means failure.
    #[error("it ended with {0}")]
    Failed(std::process::ExitStatus),
    /// The output is not a JSON object of the expected form, or no command is set.
    #[error(
        "want one JSON object, {{\"access_key\":…,\"secret_key\":…}} or {{\"api_key\":…}}, on its \
         standard output"
    )]
    Output,
}

/// JSON object that the command prints.
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

/// Name of the setting that holds the command line.
pub(super) const PLACE: &str = "credentials.command";
/// Longest time that the command may run: enough to ask a server, too short to ask a person.
const LONGEST: Duration = Duration::from_secs(10);
/// Largest output that is read, in bytes: more than any credential needs.
const MOST: u64 = 64 << 10;

// === impl CredentialCommand ===

impl CredentialCommand<'_> {
    /// Runs the command and reads the credential from its standard output. Its standard error is that of
    /// this process, so that people see its messages.
    ///
    /// # Errors
    ///
    /// [`Error::Command`] if the command fails; [`Error::Half`] or [`Error::Malformed`] if its keys cannot be
    /// used.
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

/// Reads the output of a command, at most [`MOST`] bytes, and waits until it ends with success.
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

/// Kills a command that is too slow, with all processes of its group.
fn end(group: Option<u32>) {
    let group = group.and_then(|group| Pid::from_raw(group.cast_signed()));
    if let Some(group) = group
        && let Err(error) = kill_process_group(group, Signal::KILL)
    {
        tracing::debug!(%error, "cannot end a command");
    }
}

//! `kling-proxy run`: runs a command with its own proxy, which nobody else can use.

mod environment;
mod signals;

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use tokio::process::{Child, Command};
use tracing_subscriber::filter::{LevelFilter, Targets};

use self::signals::ForwardedSignals;
use super::flags::has_default;
use super::serve::{
    Configuration, EMBEDDED_SANDBOX, Listeners, Proxy, Running, SdNotify, fitting_connections,
    hide_memory, raise_descriptor_limit,
};
use super::{Exit, Failure, SettingsArgs, runtime};
use crate::auth::client_token::ClientTokens;
use crate::auth::secret::Secret;
use crate::environment::Environment;
use crate::layer::guard::rules::{Purpose, Rules};
use crate::telemetry;

/// Level of log lines other than those of creates, if `log.filter` is not set: standard error is for the
/// output of the command.
const QUIET: LevelFilter = LevelFilter::WARN;

/// The command line that needs no account.
const TRIAL: &str = "kling-proxy run --sandbox -- COMMAND";

/// Runs a command and returns its exit code, or 128 plus the signal's number if a signal ended it.
pub(super) fn run(
    with_sandbox: bool,
    command: &[OsString],
    args: SettingsArgs,
    environment: &Environment,
) -> Result<ExitCode, Failure> {
    let (mut settings, rows) = args.load(environment)?;
    if has_default(&rows, "log.filter") {
        let creates = (telemetry::CREATES, LevelFilter::INFO);
        settings.log.filter = Targets::new().with_default(QUIET).with_targets([creates]);
    }
    let filter = telemetry::init(settings.log.format, settings.log.filter.clone());
    hide_memory();
    let (listeners, address) = Listeners::private()?;
    // These settings are for a proxy that several clients share.
    settings.access.client_tokens_file = None;
    settings.access.allowed_hosts = vec![address.ip().to_string(), "localhost".to_owned()];
    settings.shutdown.delay = Duration::ZERO;
    settings.state.url.prefer_memory();
    // Without the warning of `serve`: one command opens no more connections, and standard error is for
    // its output.
    let fitting = fitting_connections(&settings.limits, EMBEDDED_SANDBOX);
    settings.limits.connections = settings.limits.connections.min(fitting);
    let configuration = Configuration {
        args,
        environment: environment.clone(),
        settings,
        rows,
        filter,
        sandboxed: with_sandbox,
        trial: TRIAL,
    };
    let proxy = Proxy::set_up(&configuration, || Ok(listeners))?;
    let token = admit_one(&proxy)?;
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| Failure::new(Exit::Usage, "no command"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(environment::variables(environment, address, &token));

    let failed = |error: io::Error| Failure::because(Exit::Failed, &error);
    let runtime = runtime().map_err(failed)?;
    let ended = runtime.block_on(async {
        let mut signals = ForwardedSignals::new().map_err(failed)?;
        let mut running =
            proxy.start(configuration, SdNotify::new(&Environment::default()), None)?;
        let child = command.spawn().map_err(|error| {
            let exit = match error.kind() {
                io::ErrorKind::NotFound => Exit::NotFound,
                _ => Exit::NotExecutable,
            };
            let program = program.display();
            Failure::new(exit, format!("cannot run {program}: {error}"))
        })?;
        // After the spawn, so that the command gets the limit that we were started with.
        raise_descriptor_limit();
        let status = accompany(child, &mut running, &mut signals).await?;
        running.end(signals.insist()).await?;
        Ok(ExitCode::from(code(status)))
    });
    // Does not wait for a name resolution that is still running.
    runtime.shutdown_background();
    ended
}

/// Makes the proxy refuse all requests without a new token, and returns that token. It is in no file.
fn admit_one(proxy: &Proxy) -> Result<Secret, Failure> {
    let (tokens, token) = ClientTokens::random(Arc::clone(&proxy.shared.clock))
        .map_err(|_| Failure::new(Exit::Failed, "the system has no random numbers"))?;
    let rules = &proxy.shared.rules;
    let rules_of_settings = Rules::clone(&rules.load());
    rules.store(Rules {
        client_tokens: Some(Arc::new(tokens)),
        purpose: Purpose::Run,
        ..rules_of_settings
    });
    Ok(token)
}

/// Waits for the command to end, and passes signals on to it. If the proxy fails, sends SIGTERM to the
/// command.
async fn accompany(
    mut command: Child,
    running: &mut Running,
    signals: &mut ForwardedSignals,
) -> Result<ExitStatus, Failure> {
    let failed = |error: io::Error| Failure::because(Exit::Failed, &error);
    loop {
        tokio::select! {
            status = command.wait() => return status.map_err(failed),
            signal = signals.next() => signals.pass_on(signal, &command),
            failure = running.died() => {
                // The command's requests get no response any more.
                signals.pass_on(rustix::process::Signal::TERM, &command);
                command.wait().await.map_err(failed)?;
                return Err(failure);
            }
        }
    }
}

/// Returns the exit code that a shell would return: after a signal, 128 plus its number.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(Exit::Failed as u8)
}

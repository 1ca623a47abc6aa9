//! `kling-proxy serve`: builds the parts of the proxy, runs them, and ends them in order.

mod client_tokens;
mod configuration;
mod half_pair;
mod listeners;
mod process;
mod reload;
mod running;
mod set_up;
mod systemd;

use tokio::time::Instant;

pub(super) use self::configuration::Configuration;
pub(super) use self::listeners::Listeners;
pub(super) use self::process::{
    EMBEDDED_SANDBOX, NO_UPSTREAM, fitting_connections, hide_memory, limit_connections,
    raise_descriptor_limit,
};
pub(super) use self::running::Running;
pub(super) use self::set_up::{Proxy, embedded_sandbox, sandbox_credential};
pub(super) use self::systemd::SdNotify;
use super::signal::{self, Signals};
use super::{Exit, Failure, SettingsArgs, TRIAL, runtime, say};
use crate::environment::Environment;
use crate::telemetry;

pub(super) fn run(
    with_sandbox: bool,
    args: SettingsArgs,
    environment: Environment,
) -> Result<(), Failure> {
    let (mut settings, rows) = args.load(&environment)?;
    if with_sandbox {
        settings.state.url.prefer_memory();
    }
    let filter = telemetry::init(settings.log.format, settings.log.filter.clone());
    if settings.listen.unsafe_allow_remote && settings.access.client_tokens_file.is_none() {
        tracing::warn!("listen.unsafe_allow_remote: whoever can connect can spend your key");
    }
    raise_descriptor_limit();
    hide_memory();
    // Before a command is run, which would inherit the sockets of a service manager.
    let inherited = systemd::sockets(&environment)?;
    let configuration = Configuration {
        args,
        environment,
        settings,
        rows,
        filter,
        sandboxed: with_sandbox,
        trial: TRIAL,
    };
    let open = || Listeners::open(&configuration, inherited);
    let proxy = Proxy::set_up(&configuration, open)?;
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let ended = runtime.block_on(serve(proxy, configuration));
    // Does not wait for a name resolution that is still running.
    runtime.shutdown_background();
    ended
}

/// Serves until a signal or the admin listener asks the proxy to end, and then ends in order.
async fn serve(proxy: Proxy, configuration: Configuration) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::because(Exit::Failed, &error);
    let mut signals = Signals::new().map_err(failed)?;
    let hang_up = signal::hang_up().map_err(failed)?;
    announce(&proxy);
    let sd_notify = SdNotify::new(&configuration.environment);
    let mut running = proxy.start(configuration, sd_notify, Some(hang_up))?;
    let first = tokio::select! {
        () = signals.next() => Some(Instant::now()),
        asked = running.asked_to_end() => {
            asked?;
            None
        }
    };
    running.end(signals.again(first)).await
}

/// Prints one line per listener, with the port that it got, and the place of the tasks.
fn announce(proxy: &Proxy) {
    let origin = &proxy.shared.origin;
    for listener in &proxy.listeners.data {
        say(format_args!("proxy    {listener} -> {origin}"));
    }
    for listener in &proxy.listeners.admin {
        say(format_args!("admin    {listener}"));
    }
    if let Some((listener, _)) = &proxy.sandbox {
        say(format_args!("sandbox  {listener}"));
    }
    match &proxy.store.file {
        Some(file) => say(format_args!("tasks    {}", file.display())),
        None => say(format_args!("tasks    in memory")),
    }
}

//! `kling-proxy sandbox`: the embedded Kling API alone.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Semaphore, watch};

use super::serve::{NO_UPSTREAM, limit_connections, raise_descriptor_limit};
use super::signal::Signals;
use super::{Exit, Failure, SettingsArgs, runtime, say, taken_port};
use crate::clock::SystemClock;
use crate::environment::Environment;
use crate::layer::guard::rules::Rules;
use crate::sandbox::{ACCESS_KEY, API_KEY, SECRET_KEY, Sandbox};
use crate::server::{self, ConnectionLimits, Listener, Stop, Worker};
use crate::settings::{SettingProblem, Settings};
use crate::stack;
use crate::telemetry;
use crate::telemetry::metrics::Metrics;

pub(super) fn run(
    address: SocketAddr,
    args: &SettingsArgs,
    environment: &Environment,
) -> Result<(), Failure> {
    let (settings, _) = args.load(environment)?;
    refuse_exposed(address, &settings)?;
    telemetry::init(settings.log.format, settings.log.filter.clone());
    let failed = |error: std::io::Error| Failure::because(Exit::Failed, &error);
    let free = SocketAddr::new(address.ip(), 0);
    let listener = taken_port::bind(address, &format!("--address {free}"))?;
    let address = listener.local_addr().map_err(failed)?;
    let metrics = Metrics::new().map_err(|error| Failure::because(Exit::Failed, &error))?;
    // The rules check host, web origin and body size. The sandbox checks everything else, as Kling does.
    let rules = Rules::of_hosts(
        settings.access.allowed_hosts,
        settings.access.allowed_origins,
        settings.limits.request_body,
    );
    let sandbox = Sandbox::new(settings.sandbox, address, Arc::new(SystemClock));
    let sandbox = stack::sandbox(sandbox, rules, settings.errors, metrics);
    raise_descriptor_limit();
    let connections = limit_connections(&settings.limits, NO_UPSTREAM);
    let limits = ConnectionLimits {
        connections: Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS))),
        heads: Arc::default(),
        evictor: None,
        header_timeout: settings.limits.header_timeout,
        idle: settings.upstream.timeouts.idle,
    };
    let runtime = runtime();
    runtime.map_err(failed)?.block_on(async {
        let mut signals = Signals::new().map_err(failed)?;
        say(format_args!("sandbox  http://{address}"));
        say(format_args!("access key: {ACCESS_KEY}"));
        say(format_args!("secret key: {SECRET_KEY}"));
        say(format_args!("api key: {API_KEY}"));
        let (_stop, stopped) = watch::channel(Stop::Never);
        tokio::select! {
            ended = server::run(vec![Listener::Tcp(listener)], Worker::alone(), sandbox, limits, stopped) => { ended.map_err(failed)?; }
            // No request of the sandbox is worth waiting for.
            () = signals.next() => {}
        }
        Ok(())
    })
}

/// Refuses an address that other machines can reach, unless `listen.unsafe_allow_remote` is set. For the
/// proxy, client tokens suffice as well; the sandbox does not ask for them.
fn refuse_exposed(address: SocketAddr, settings: &Settings) -> Result<(), Failure> {
    if address.ip().is_loopback() || settings.listen.unsafe_allow_remote {
        return Ok(());
    }
    let reason = format!(
        "{address} can be reached from other machines, and the sandbox's keys are known to all: \
         set listen.unsafe_allow_remote = true to let everyone who can connect use the sandbox"
    );
    let problem = SettingProblem::new("--address", reason);
    Err(Failure::new(Exit::Settings, problem.to_string()))
}

//! `kling-proxy sandbox`: the embedded Kling API alone.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{Semaphore, watch};

use super::signal::Signals;
use super::{Exit, Failure, SettingsArgs, runtime, say};
use crate::clock::SystemClock;
use crate::sandbox::{ACCESS_KEY, API_KEY, SECRET_KEY, Sandbox};
use crate::server::{self, Limits, Listener, Stop, Worker};
use crate::telemetry;

pub(super) fn run(
    address: SocketAddr,
    args: &SettingsArgs,
    environment: &[(OsString, OsString)],
) -> Result<(), Failure> {
    let (settings, _) = args.load(environment)?;
    telemetry::init(settings.log.format, settings.log.filter);
    let failed = |error: std::io::Error| Failure::because(Exit::Failed, &error);
    let listener = server::bind(address).map_err(|error| {
        Failure::new(Exit::Failed, format!("cannot listen on {address}: {error}"))
    })?;
    let address = listener.local_addr().map_err(failed)?;
    let sandbox = Sandbox::new(settings.sandbox, address, Arc::new(SystemClock));
    let limits = Limits {
        connections: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
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
            // Nothing that it does is worth waiting for.
            () = signals.next() => {}
        }
        Ok(())
    })
}

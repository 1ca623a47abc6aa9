//! `kling-proxy sandbox`: the embedded Kling API alone.

use std::ffi::OsString;
use std::sync::Arc;

use tokio::sync::{Semaphore, watch};

use super::serve::signal;
use super::{Exit, Failure, SandboxArgs, say};
use crate::clock::SystemClock;
use crate::sandbox::{ACCESS_KEY, SECRET_KEY, Sandbox};
use crate::server::{self, Limits};
use crate::telemetry;

pub(super) fn run(args: &SandboxArgs, environment: &[(OsString, OsString)]) -> Result<(), Failure> {
    let (settings, _) = args.settings.load(environment)?;
    telemetry::init(settings.log.format, settings.log.filter);
    let failed = |error: std::io::Error| Failure::because(Exit::Failed, &error);
    let listener = server::bind(args.address).map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("cannot listen on {}: {error}", args.address),
        )
    })?;
    let address = listener.local_addr().map_err(failed)?;
    let sandbox = Sandbox::new(settings.sandbox, address, Arc::new(SystemClock));
    let limits = Limits {
        connections: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS)),
        header_timeout: settings.limits.header_timeout,
        drain: settings.shutdown.drain,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(failed)?.block_on(async {
        let (stop, stopped) = watch::channel(false);
        say(format_args!("sandbox  http://{address}"));
        say(format_args!("access key: {ACCESS_KEY}"));
        say(format_args!("secret key: {SECRET_KEY}"));
        let mut signals = signal::Signals::new().map_err(failed)?;
        let serving = server::run(vec![listener], sandbox, limits, stopped);
        tokio::pin!(serving);
        tokio::select! {
            ended = &mut serving => { ended.map_err(failed)?; }
            () = signals.next() => {
                stop.send_replace(true);
                tokio::select! {
                    ended = serving => { ended.map_err(failed)?; }
                    () = signals.next() => return Err(Failure::new(Exit::Failed, "stopped at once")),
                }
            }
        }
        Ok(())
    })
}

//! `kling-proxy serve`: puts the parts together, runs them, and ends them in order.
//!
//! Requests are served by a few threads with a runtime each, which share nothing that locks: a
//! connection, its requests and the connections that they use upstream stay on one thread. This
//! thread keeps what is not a request: signals, the admin listener, the sandbox, and the connection
//! that is ready for whichever of them has none. Changed files have a thread to wait on.

mod configuration;
mod listeners;
mod process;
mod reload;
mod set_up;
mod systemd;

use std::ffi::OsString;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc, watch as latch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;

use self::configuration::Configuration;
use self::listeners::Listeners;
use self::process::{hide_memory, raise_descriptor_limit};
use self::reload::Reload;
use self::set_up::Proxy;
use self::systemd::Manager;
use super::signal::{self, Signals};
use super::{Exit, Failure, SettingsArgs, runtime, say};
use crate::admin::Control;
use crate::lifecycle::{Lifecycle, Phase};
use crate::sandbox::Sandbox;
use crate::server::{self, Limits, Listener, SocketFile};
use crate::settings::Warmth;
use crate::stack::Shared;
use crate::telemetry;
use crate::upstream::Origin;

/// More would not make the Kling API faster, and each keeps connections of its own.
const MOST_THREADS: usize = 4;
/// The admin listener's own bound: probes and scrapers are few.
const ADMIN_CONNECTIONS: usize = 64;

pub(super) fn run(
    with_sandbox: bool,
    args: SettingsArgs,
    environment: Vec<(OsString, OsString)>,
) -> Result<(), Failure> {
    let (settings, rows) = args.load(&environment)?;
    let filter = telemetry::init(settings.log.format, settings.log.filter.clone());
    if settings.listen.unsafe_allow_remote && settings.access.client_tokens_file.is_none() {
        tracing::warn!("listen.unsafe_allow_remote: whoever can connect can spend your key");
    }
    raise_descriptor_limit();
    hide_memory();
    let configuration = Configuration {
        args,
        environment,
        settings,
        rows,
        filter,
        sandboxed: with_sandbox,
    };
    let proxy = Proxy::set_up(&configuration)?;
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let ended = runtime.block_on(proxy.run(configuration));
    // A name that is still being resolved must not keep the process.
    runtime.shutdown_background();
    ended
}

// === impl Proxy ===

impl Proxy {
    async fn run(self, configuration: Configuration) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::because(Exit::Failed, &error);
        let Self {
            shared,
            limits,
            listeners,
            sandbox,
            delay,
        } = self;
        let Shared {
            tokens, lifecycle, ..
        } = shared.clone();
        let mut signals = Signals::new().map_err(failed)?;
        let hang_up = signal::hang_up().map_err(failed)?;
        tokens
            .bearer()
            .map_err(|error| Failure::because(Exit::Settings, &error))?;
        announce(&listeners, &shared.origin, sandbox.as_ref());
        let exposed = listeners.are_exposed();
        let Listeners {
            data,
            admin,
            socket_file,
            certificate,
        } = listeners;

        let quit = Arc::new(Notify::new());
        let (stop, stopped) = latch::channel(false);
        let mut threads = start_threads(&data, &shared, &limits, &stopped).map_err(failed)?;
        drop(data);
        // These serve until the last request has ended, so nobody tells them to stop.
        let (_serving, never) = latch::channel(false);
        let mut others = JoinSet::new();
        let own = |connections| Limits {
            connections: Arc::new(Semaphore::new(connections)),
            ..limits.clone()
        };
        if let Some((listener, sandbox)) = sandbox {
            let limits = own(Semaphore::MAX_PERMITS);
            others.spawn(server::run(vec![listener], sandbox, limits, never.clone()));
        }
        if !admin.is_empty() {
            let local = admin.iter().all(Listener::is_local);
            let control = local.then(|| Control {
                quit: configuration.settings.admin.quit.then(|| quit.clone()),
            });
            let (router, limits) = (shared.admin(control), own(ADMIN_CONNECTIONS));
            others.spawn(server::run(admin, router, limits, never));
        }
        let Warmth { probe, keep } = configuration.settings.upstream.warmth;
        let upstream = shared.upstream.clone();
        tokio::spawn(async move {
            if probe {
                upstream.warm_up().await;
            }
            if !keep.is_zero() {
                upstream.keep_warm(keep).await;
            }
        });
        let manager = Arc::new(Manager::new(&configuration.environment));
        let reload = Reload {
            configuration,
            shared,
            certificate,
            exposed,
            manager: Arc::clone(&manager),
            ran: None,
            half_new: None,
        };
        reload.start(hang_up).map_err(failed)?;
        lifecycle.enter(Phase::Ready);
        manager.ready();

        tokio::select! {
            () = signals.next() => {}
            () = quit.notified() => {}
            ended = threads.recv() => return Err(died(ended.and_then(Result::err))),
            Some(ended) = others.join_next() => {
                return Err(died(ended.ok().and_then(Result::err)));
            }
        }
        tracing::info!("shutting down");
        lifecycle.enter(Phase::Stopping);
        manager.stopping();
        tokio::select! {
            ended = end(&lifecycle, delay, socket_file, &stop, threads) => ended,
            () = signals.next() => {
                Err(Failure::new(Exit::Failed, "stopped at once by a second signal"))
            }
        }
    }
}

/// One line a listener, with the port that it got.
fn announce(listeners: &Listeners, origin: &Origin, sandbox: Option<&(Listener, Sandbox)>) {
    for listener in &listeners.data {
        say(format_args!("proxy    {listener} -> {origin}"));
    }
    for listener in &listeners.admin {
        say(format_args!("admin    {listener}"));
    }
    if let Some((listener, _)) = sandbox {
        say(format_args!("sandbox  {listener}"));
    }
}

/// How a thread ended.
type Ended = io::Result<Cut>;

/// What had to be cut in the end.
#[derive(Default)]
struct Cut {
    connections: usize,
    /// Many of them those of the connections.
    creates: usize,
}

/// Starts the threads that serve requests. The channel closes when all have ended.
fn start_threads(
    listeners: &[Listener],
    shared: &Shared,
    limits: &Limits,
    stopped: &latch::Receiver<bool>,
) -> io::Result<mpsc::UnboundedReceiver<Ended>> {
    let (sender, ended) = mpsc::unbounded_channel();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for index in 0..cores.min(MOST_THREADS) {
        let listeners = listeners
            .iter()
            .map(Listener::try_clone)
            .collect::<io::Result<Vec<_>>>()?;
        let (shared, limits, stopped) = (shared.clone(), limits.clone(), stopped.clone());
        let sender = sender.clone();
        let runtime = runtime()?;
        thread::Builder::new()
            .name(format!("requests-{index}"))
            .spawn(move || {
                let ended = runtime.block_on(serve(listeners, &shared, limits, stopped));
                runtime.shutdown_background();
                // Nobody listens any more after a second signal.
                let _ = sender.send(ended);
            })?;
    }
    Ok(ended)
}

/// What a thread does: serves connections, and after the word to stop waits for them, and for creates
/// whose clients have gone. Tells what had to be cut.
async fn serve(
    listeners: Vec<Listener>,
    shared: &Shared,
    limits: Limits,
    stopped: latch::Receiver<bool>,
) -> Ended {
    let carried = TaskTracker::new();
    let (drain, mut told) = (limits.drain, stopped.clone());
    let connections = server::run(listeners, shared.stack(&carried), limits, stopped);
    let deadline = async {
        // A sender that has gone is the word to stop too.
        let _ = told.wait_for(|stop| *stop).await;
        Ok(Instant::now() + drain)
    };
    let (connections, deadline) = tokio::try_join!(connections, deadline)?;
    carried.close();
    // Whether in time or not: what is left then is what is cut.
    let _ = timeout_at(deadline, carried.wait()).await;
    Ok(Cut {
        connections,
        creates: carried.len(),
    })
}

/// Ends in order: not ready but serving, as it is already, then nothing new, then what is in flight.
async fn end(
    lifecycle: &Lifecycle,
    delay: Duration,
    socket_file: Option<SocketFile>,
    stop: &latch::Sender<bool>,
    mut threads: mpsc::UnboundedReceiver<Ended>,
) -> Result<(), Failure> {
    tokio::time::sleep(delay).await;
    lifecycle.enter(Phase::Draining);
    // Before the socket is closed: then nobody finds a file that does not answer.
    drop(socket_file);
    stop.send_replace(true);
    let mut cut = Cut::default();
    while let Some(ended) = threads.recv().await {
        let ended = ended.map_err(|error| Failure::because(Exit::Failed, &error))?;
        cut.connections += ended.connections;
        cut.creates += ended.creates;
    }
    if cut.connections + cut.creates > 0 {
        tracing::warn!(
            cut.connections,
            cut.creates,
            "shutdown.drain is over: what was in flight is cut"
        );
    }
    tracing::info!("shut down");
    Ok(())
}

/// A thread or listener that ended although nobody told it to.
fn died(error: Option<io::Error>) -> Failure {
    match error {
        Some(error) => Failure::because(Exit::Failed, &error),
        None => Failure::new(Exit::Failed, "a listener ended unexpectedly"),
    }
}

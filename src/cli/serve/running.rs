//! A proxy while it runs, and how it ends.
//!
//! Requests are served by a few threads with a runtime each: from its first byte on a connection, its
//! requests and the connections that they use upstream stay on one of them, and none waits for
//! another's lock. The thread that starts them keeps what is not a request: signals, the admin
//! listener, and the connection that is ready for whichever of them has none. The sandbox has a thread
//! of its own, so that its work delays no answer of the admin listener, and so have changed files.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch as latch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::client_tokens::ClientTokensFile;
use super::configuration::Configuration;
use super::half_pair::HalfPair;
use super::listeners::Listeners;
use super::process::share_of_descriptors;
use super::reload::Reload;
use super::set_up::Proxy;
use super::systemd::SdNotify;
use crate::admin::Control;
use crate::cli::{Exit, Failure, runtime};
use crate::lifecycle::{Lifecycle, Phase};
use crate::sandbox::Sandbox;
use crate::server::{self, ConnectionLimits, Evictor, Listener, SocketFile, Stop, Worker};
use crate::settings::WarmUp;
use crate::stack::Shared;
use crate::telemetry::metrics::Metrics;

/// More would not make the Kling API faster, and each keeps connections of its own.
const MOST_THREADS: usize = 4;
/// The admin listener's own bound. Probes and scrapers are few; the more places there are, the longer
/// has a probe to send its request while silent connections come without a pause.
const ADMIN_CONNECTIONS: usize = 256;

/// How long clients have to read the answers that they get at the end of the drain.
const LAST_ANSWERS: Duration = Duration::from_millis(200);
/// How long the threads have after that to log what they give up.
const LAST_LINES: Duration = Duration::from_millis(600);

/// A proxy that serves.
pub(in crate::cli) struct Running {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    sd_notify: Arc<SdNotify>,
    delay: Duration,
    drain: Duration,
    socket_file: Option<SocketFile>,
    /// Told by the admin listener to end.
    quit: Arc<Notify>,
    /// Tells the threads to end.
    stop: latch::Sender<Stop>,
    threads: mpsc::UnboundedReceiver<Ended>,
    others: JoinSet<io::Result<usize>>,
    /// They serve until the last request has ended, so nobody tells them to stop.
    _serving: latch::Sender<Stop>,
}

/// How a thread ended.
type Ended = io::Result<Cut>;

/// How the threads ended.
#[derive(Default)]
struct Cut {
    /// Connections that had to be cut.
    connections: usize,
    /// Creates that had to be cut, many of them those of the connections.
    creates: usize,
    /// Why a thread failed, if one did.
    failure: Option<io::Error>,
}

// === impl Proxy ===

impl Proxy {
    /// Serves from now on. `hang_up` is the word to read the settings again.
    pub(in crate::cli) fn start(
        self,
        configuration: Configuration,
        sd_notify: SdNotify,
        hang_up: Option<Signal>,
    ) -> Result<Running, Failure> {
        let failed = |error: io::Error| Failure::because(Exit::Failed, &error);
        let Self {
            shared,
            limits,
            listeners,
            sandbox,
            delay,
            drain,
        } = self;
        let exposed = listeners.are_exposed();
        let Listeners {
            data,
            admin,
            socket_file,
            certificate,
        } = listeners;

        let quit = Arc::new(Notify::new());
        let (serving, never) = latch::channel(Stop::Never);
        let mut others = JoinSet::new();
        if let Some((listener, sandbox)) = sandbox {
            let limits = own_connections(&limits, share_of_descriptors(3));
            let ended = start_sandbox(listener, sandbox, limits, never.clone()).map_err(failed)?;
            others.spawn(ended);
        }
        if !admin.is_empty() {
            let quit = configuration.settings.admin.quit.then(|| quit.clone());
            others.spawn(serve_admin(admin, &shared, quit, &limits, never));
        }
        keep_warm(&shared, configuration.settings.upstream.warmth);
        let lifecycle = Arc::clone(&shared.lifecycle);
        let metrics = Arc::clone(&shared.metrics);
        let sd_notify = Arc::new(sd_notify);
        let reload = Reload {
            configuration,
            shared: shared.clone(),
            certificate,
            exposed,
            sd_notify: Arc::clone(&sd_notify),
            ran: None,
            half_new: HalfPair::default(),
            client_tokens_file: ClientTokensFile::default(),
        };
        reload.start(hang_up).map_err(failed)?;
        // At last: from now on clients may take all descriptors.
        let (stop, stopped) = latch::channel(Stop::Never);
        let threads = start_threads(data, &shared, &limits, &stopped).map_err(failed)?;
        lifecycle.enter(Phase::Ready);
        sd_notify.ready();
        Ok(Running {
            lifecycle,
            metrics,
            sd_notify,
            delay,
            drain,
            socket_file,
            quit,
            stop,
            threads,
            others,
            _serving: serving,
        })
    }
}

// === impl Running ===

impl Running {
    /// Waits for the word to end by `POST /quit`.
    pub(in crate::cli) async fn asked_to_end(&mut self) -> Result<(), Failure> {
        let quit = Arc::clone(&self.quit);
        tokio::select! {
            () = quit.notified() => Ok(()),
            failure = self.died() => Err(failure),
        }
    }

    /// Waits for a part that ends although nobody told it to.
    pub(in crate::cli) async fn died(&mut self) -> Failure {
        let error = tokio::select! {
            ended = self.threads.recv() => ended.and_then(Result::err),
            Some(ended) = self.others.join_next() => ended.ok().and_then(Result::err),
        };
        match error {
            Some(error) => Failure::because(Exit::Failed, &error),
            None => Failure::new(Exit::Failed, "a listener ended unexpectedly"),
        }
    }

    /// Ends in order: not ready but serving, as it is already, then nothing new, then what is in
    /// flight. If somebody has `insisted`, what is in flight is given up at once.
    ///
    /// # Errors
    ///
    /// A thread failed, or somebody has insisted.
    pub(in crate::cli) async fn end(
        mut self,
        insisted: impl Future<Output = ()>,
    ) -> Result<(), Failure> {
        tracing::info!("shutting down");
        self.lifecycle.enter(Phase::Stopping);
        self.sd_notify.stopping();
        let mut insisted = pin!(insisted);
        let mut is_insisted = tokio::select! {
            () = sleep(self.delay) => false,
            () = &mut insisted => true,
        };
        self.lifecycle.enter(Phase::Draining);
        // Before the socket is closed: then nobody finds a file that does not answer.
        drop(self.socket_file.take());
        self.stop.send_replace(Stop::Drain);
        let (drain, mut cut) = (self.drain, Cut::default());
        let mut is_over = false;
        if !is_insisted {
            tokio::select! {
                () = self.ended(&mut cut) => is_over = true,
                () = sleep(drain) => {}
                () = insisted => is_insisted = true,
            }
        }
        if !is_over {
            self.give_up(&mut cut, is_insisted).await;
        }
        tracing::info!("shut down");
        if let Some(error) = cut.failure {
            return Err(Failure::because(Exit::Failed, &error));
        }
        if is_insisted {
            let message = "stopped at once by a second signal";
            return Err(Failure::new(Exit::Failed, message));
        }
        Ok(())
    }

    /// Answers what is still in flight, and cuts what does not end by that.
    async fn give_up(&mut self, cut: &mut Cut, is_insisted: bool) {
        let requests = self.metrics.in_flight();
        self.lifecycle.enter(Phase::Ended);
        let _ = timeout(LAST_ANSWERS, self.ended(cut)).await;
        self.stop.send_replace(Stop::Now);
        // A thread that is stuck does not keep the process.
        let _ = timeout(LAST_LINES, self.ended(cut)).await;
        tracing::warn!(
            cut.requests = requests,
            cut.connections,
            cut.creates,
            "{}: what was in flight is cut",
            if is_insisted {
                "a second signal"
            } else {
                "shutdown.drain is over"
            }
        );
    }

    /// Waits until all threads have ended, and adds up what they cut.
    async fn ended(&mut self, cut: &mut Cut) {
        while let Some(ended) = self.threads.recv().await {
            match ended {
                Ok(ended) => {
                    cut.connections += ended.connections;
                    cut.creates += ended.creates;
                }
                Err(error) => cut.failure = Some(error),
            }
        }
    }
}

/// ConnectionLimits like these, for a listener with connections of its own.
fn own_connections(limits: &ConnectionLimits, connections: usize) -> ConnectionLimits {
    ConnectionLimits {
        connections: Arc::new(Semaphore::new(connections)),
        heads: Arc::default(),
        ..limits.clone()
    }
}

/// Serves health, metrics and, on this machine only, control.
fn serve_admin(
    listeners: Vec<Listener>,
    shared: &Shared,
    quit: Option<Arc<Notify>>,
    limits: &ConnectionLimits,
    stop: latch::Receiver<Stop>,
) -> impl Future<Output = io::Result<usize>> + use<> {
    let local = listeners.iter().all(Listener::is_local);
    let router = shared.admin(local.then_some(Control { quit }));
    let most = share_of_descriptors(8).min(ADMIN_CONNECTIONS);
    let limits = ConnectionLimits {
        evictor: Some(Arc::new(Evictor::new(most))),
        ..own_connections(limits, Semaphore::MAX_PERMITS)
    };
    server::run(listeners, Worker::alone(), router, limits, stop)
}

/// Asks upstream once, and keeps a connection ready, as far as the settings want that.
fn keep_warm(shared: &Shared, WarmUp { probe, keep }: WarmUp) {
    let upstream = shared.upstream.clone();
    tokio::spawn(async move {
        if probe {
            upstream.warm_up().await;
        }
        if !keep.is_zero() {
            upstream.keep_warm(keep).await;
        }
    });
}

/// Serves the sandbox by a thread of its own. The future waits for its end.
fn start_sandbox(
    listener: Listener,
    sandbox: Sandbox,
    limits: ConnectionLimits,
    stop: latch::Receiver<Stop>,
) -> io::Result<impl Future<Output = io::Result<usize>> + use<>> {
    let runtime = runtime()?;
    let (sender, ended) = oneshot::channel();
    thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(move || {
            let (listeners, worker) = (vec![listener], Worker::alone());
            let served = server::run(listeners, worker, sandbox, limits, stop);
            // Nobody listens any more at the end of the process.
            let _ = sender.send(runtime.block_on(served));
        })?;
    Ok(async { ended.await.map_err(io::Error::other)? })
}

/// Starts the threads that serve requests. The channel closes when all have ended.
fn start_threads(
    mut listeners: Vec<Listener>,
    shared: &Shared,
    limits: &ConnectionLimits,
    stopped: &latch::Receiver<Stop>,
) -> io::Result<mpsc::UnboundedReceiver<Ended>> {
    let (sender, ended) = mpsc::unbounded_channel();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let workers = Worker::group(cores.min(MOST_THREADS));
    let runtimes = workers.iter().map(|_| runtime());
    let runtimes = runtimes.collect::<io::Result<Vec<_>>>()?;
    for (index, (worker, runtime)) in workers.into_iter().zip(runtimes).enumerate() {
        // The first one gets all.
        let listeners = std::mem::take(&mut listeners);
        let (shared, limits, stopped) = (shared.clone(), limits.clone(), stopped.clone());
        let sender = sender.clone();
        thread::Builder::new()
            .name(format!("requests-{index}"))
            .spawn(move || {
                let ended = runtime.block_on(serve(listeners, worker, &shared, limits, stopped));
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
    worker: Worker,
    shared: &Shared,
    limits: ConnectionLimits,
    stop: latch::Receiver<Stop>,
) -> Ended {
    let detached = TaskTracker::new();
    let mut now = stop.clone();
    let connections = server::run(listeners, worker, shared.stack(&detached), limits, stop).await?;
    detached.close();
    tokio::select! {
        () = detached.wait() => {}
        // A sender that has gone is the word to stop too.
        _ = now.wait_for(|stop| *stop == Stop::Now) => {}
    }
    Ok(Cut {
        connections,
        creates: detached.len(),
        failure: None,
    })
}

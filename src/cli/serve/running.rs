//! The run of a proxy, and its shutdown.
//!
//! A few threads with a runtime each serve the requests. From its first byte on, a connection stays on
//! one of these threads, with its requests and the connections that they use upstream. So no thread waits
//! for a lock of another.
//!
//! The thread that starts them does everything else: signals, the admin listener, and the warm
//! connection, which is ready for a thread that has no connection to upstream. The sandbox has its own
//! thread, so that its work does not delay responses of the admin listener. The reload of changed files
//! has its own thread as well.

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
use crate::tasks::ledger::Ledger;
use crate::tasks::store::Store;
use crate::telemetry::metrics::Metrics;

/// Most threads that serve requests. More would not make the Kling API faster, and each keeps its own
/// connections.
const MOST_THREADS: usize = 4;
/// Most connections of the admin listener, which do not count as connections of clients. Probes and
/// scrapers are few. The oldest connection is closed for a new one, so with a larger bound a probe has
/// more time to send its request while silent connections arrive without a pause.
const ADMIN_CONNECTIONS: usize = 256;

/// Time for clients to read the responses that they get at the end of the drain.
const LAST_ANSWERS: Duration = Duration::from_millis(200);
/// Time for the threads, after that, to log the requests that they give up.
const LAST_LINES: Duration = Duration::from_millis(600);
/// Time for the store, at the end, to write what it has not written yet.
const LAST_WRITES: Duration = Duration::from_secs(1);

/// A proxy that serves requests, with the handles to end it.
pub(in crate::cli) struct Running {
    lifecycle: Arc<Lifecycle>,
    metrics: Arc<Metrics>,
    ledger: Ledger,
    sd_notify: Arc<SdNotify>,
    delay: Duration,
    drain: Duration,
    socket_file: Option<SocketFile>,
    /// Notified by the admin listener when `POST /quit` asks the proxy to end.
    quit: Arc<Notify>,
    /// Asks the threads that serve requests to end.
    stop: latch::Sender<Stop>,
    threads: mpsc::UnboundedReceiver<Ended>,
    others: JoinSet<io::Result<usize>>,
    /// Keeps the sandbox and the admin listener running until it is dropped: they serve until the last
    /// request has ended.
    _serving: latch::Sender<Stop>,
}

/// Result of a thread that serves requests.
type Ended = io::Result<Cut>;

/// The work that one thread, or all threads together, had to cut.
#[derive(Default)]
struct Cut {
    /// Connections that had to be cut.
    connections: usize,
    /// Creates that had to be cut. Many of them came over the connections that were cut.
    creates: usize,
    /// Error of a thread that failed, if one did.
    failure: Option<io::Error>,
}

// === impl Proxy ===

impl Proxy {
    /// Starts to serve. `hang_up` is the stream of signals to read the settings again.
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
            store,
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
            let control = Control {
                quit: configuration.settings.admin.quit.then(|| quit.clone()),
                shows_tasks: data.iter().any(|listener| listener.address().is_some()),
            };
            others.spawn(serve_admin(admin, &shared, control, &limits, never));
        }
        let keep = configuration.settings.state.keep;
        start_store(shared.ledger.clone(), store.store, keep).map_err(failed)?;
        if configuration.settings.state.watch {
            tokio::spawn(shared.watcher().run());
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
        // Last, because from now on clients may take all descriptors.
        let (stop, stopped) = latch::channel(Stop::Never);
        let threads = start_threads(data, &shared, &limits, &stopped).map_err(failed)?;
        lifecycle.enter(Phase::Ready);
        sd_notify.ready();
        Ok(Running {
            lifecycle,
            metrics,
            ledger: shared.ledger,
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
    /// Waits until `POST /quit` asks the proxy to end. Returns an error if a part of the proxy fails
    /// before that.
    pub(in crate::cli) async fn asked_to_end(&mut self) -> Result<(), Failure> {
        let quit = Arc::clone(&self.quit);
        tokio::select! {
            () = quit.notified() => Ok(()),
            failure = self.died() => Err(failure),
        }
    }

    /// Waits until a part of the proxy ends that was not asked to, and returns the failure.
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

    /// Ends in order. First the proxy still serves, but is not ready (`shutdown.delay`). Then it accepts
    /// nothing new, and waits for the requests in flight (`shutdown.drain`). When `insisted` completes, it
    /// gives them up at once.
    ///
    /// # Errors
    ///
    /// Returns an error if a thread has failed, or if `insisted` has completed.
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
        // Removed before the socket is closed, so that no client finds the file of a closed socket.
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
        self.ledger.close(LAST_WRITES).await;
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

    /// Answers the requests that are still in flight, and cuts the connections and creates that do not
    /// end by that.
    async fn give_up(&mut self, cut: &mut Cut, is_insisted: bool) {
        let requests = self.metrics.in_flight();
        self.lifecycle.enter(Phase::Ended);
        let _ = timeout(LAST_ANSWERS, self.ended(cut)).await;
        self.stop.send_replace(Stop::Now);
        // The time limit is for a thread that is stuck: the process does not wait for it.
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

    /// Waits until all threads have ended, and adds up the connections and creates that they cut.
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

/// Runs the store of tasks on a thread of its own, until the process ends.
fn start_store(ledger: Ledger, store: Box<dyn Store>, keep: Duration) -> io::Result<()> {
    let runtime = runtime()?;
    thread::Builder::new()
        .name("store".to_owned())
        .spawn(move || runtime.block_on(ledger.run(store, keep)))?;
    Ok(())
}

/// Returns the same limits, for a listener whose connections are counted separately.
fn own_connections(limits: &ConnectionLimits, connections: usize) -> ConnectionLimits {
    ConnectionLimits {
        connections: Arc::new(Semaphore::new(connections)),
        heads: Arc::default(),
        ..limits.clone()
    }
}

/// Serves health and metrics, and also control if only this machine can connect.
fn serve_admin(
    listeners: Vec<Listener>,
    shared: &Shared,
    control: Control,
    limits: &ConnectionLimits,
    stop: latch::Receiver<Stop>,
) -> impl Future<Output = io::Result<usize>> + use<> {
    let local = listeners.iter().all(Listener::is_local);
    let router = shared.admin(local.then_some(control));
    let most = share_of_descriptors(8).min(ADMIN_CONNECTIONS);
    let limits = ConnectionLimits {
        evictor: Some(Arc::new(Evictor::new(most))),
        ..own_connections(limits, Semaphore::MAX_PERMITS)
    };
    server::run(listeners, Worker::alone(), router, limits, stop)
}

/// Starts a task that sends a first request to upstream and then keeps a connection ready, if the
/// settings ask for it.
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

/// Serves the sandbox on its own thread. The returned future waits until the thread ends.
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
            // The receiver is dropped at the end of the process.
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
        // The first thread gets all listeners.
        let listeners = std::mem::take(&mut listeners);
        let (shared, limits, stopped) = (shared.clone(), limits.clone(), stopped.clone());
        let sender = sender.clone();
        thread::Builder::new()
            .name(format!("requests-{index}"))
            .spawn(move || {
                let ended = runtime.block_on(serve(listeners, worker, &shared, limits, stopped));
                runtime.shutdown_background();
                // The receiver is dropped after a second signal.
                let _ = sender.send(ended);
            })?;
    }
    Ok(ended)
}

/// Serves connections on one thread. When asked to stop, waits for them and for creates whose clients have
/// disconnected. Returns the numbers of connections and creates that it had to cut.
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
        // If the sender is dropped, the thread has to stop too.
        _ = now.wait_for(|stop| *stop == Stop::Now) => {}
    }
    Ok(Cut {
        connections,
        creates: detached.len(),
        failure: None,
    })
}

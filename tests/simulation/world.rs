//! Carries out a plan in simulated time.

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use kling_proxy::internals::{
    Clock, ConnectionLimits, Credential, Environment, Flags, ListQuery, Listener, Metrics, Parts,
    Phase, Purpose, Rules, Secret, Settings, Shared, Sqlite, Stop, Worker, serve,
};
use tokio::runtime;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::TaskTracker;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};

use crate::books::Books;
use crate::client::Client;
use crate::log::{Capture, capture};
use crate::plan::{Ending, Plan};
use crate::upstream::Upstream;

/// Shared state of a run: its books, its plan and its time.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) books: Arc<Mutex<Books>>,
    pub(crate) plan: Arc<Plan>,
    start: Instant,
}

/// Wall clock of a run, which follows the simulated time.
struct SimulatedClock(Instant);

/// Time that clients have to read the last responses.
const LAST_ANSWERS: Duration = Duration::from_millis(200);
/// Time after the last request. It is longer than the proxy waits for any late response.
const AFTERMATH: Duration = Duration::from_secs(400);

// === impl World ===

impl World {
    /// Returns the milliseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap()
    }

    pub(crate) fn note<T>(&self, change: impl FnOnce(&mut Books) -> T) -> T {
        change(&mut self.books.lock().unwrap())
    }

    pub(crate) async fn until(&self, milliseconds: u64) {
        sleep_until(self.start + Duration::from_millis(milliseconds)).await;
    }
}

impl Clock for SimulatedClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_hours(500_000) + self.0.elapsed()
    }
}

/// Carries out a plan, and returns the books.
pub(crate) fn run(plan: &Plan) -> Books {
    // Decides the waits between attempts.
    fastrand::seed(plan.seed);
    let runtime = runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let books = Arc::new(Mutex::new(Books::new(plan)));
    let ours = Targets::new().with_target("kling_proxy", LevelFilter::INFO);
    let lines = tracing_subscriber::registry().with(Capture.with_filter(ours));
    let _lines = tracing::subscriber::set_default(lines);
    capture(Some(Arc::clone(&books)));
    runtime.block_on(async {
        let world = World {
            books: Arc::clone(&books),
            plan: Arc::new(plan.clone()),
            start: Instant::now(),
        };
        simulate(world).await;
    });
    // Tasks that still run are dropped, and may write to the log.
    drop(runtime);
    capture(None);
    Arc::into_inner(books).unwrap().into_inner().unwrap()
}

async fn simulate(world: World) {
    let shared = proxy(&world);
    shared.lifecycle.enter(Phase::Ready);
    let (connect, listener) = mpsc::channel(1);
    let (stop, stopped) = watch::channel(Stop::Never);
    let creates = TaskTracker::new();
    let limits = ConnectionLimits {
        connections: Arc::new(Semaphore::new(1_000)),
        heads: Arc::default(),
        evictor: None,
        header_timeout: Duration::from_mins(1),
        idle: Duration::from_secs(30),
    };
    let serving = tokio::spawn(serve(
        vec![Listener::Memory(listener)],
        Worker::alone(),
        shared.stack(&creates),
        limits,
        stopped,
    ));
    if world.plan.keep_warm {
        let upstream = shared.upstream.clone();
        tokio::spawn(async move {
            upstream.warm_up().await;
            upstream.keep_warm(Duration::from_mins(10)).await;
        });
    }
    tokio::spawn(store(&shared));
    let mut clients = JoinSet::new();
    for index in 0..world.plan.wishes.len() {
        let client = Client::new(world.clone(), index, connect.clone());
        clients.spawn(client.run());
    }
    if let Some(Ending { at, .. }) = world.plan.end {
        world.until(at).await;
    } else {
        while clients.join_next().await.is_some() {}
        sleep(AFTERMATH).await;
    }
    let now = world.now();
    world.note(|books| books.told_to_end = Some(now));
    // This is the order in which `serve` stops.
    shared.lifecycle.enter(Phase::Draining);
    stop.send_replace(Stop::Drain);
    creates.close();
    let mut all_ended = pin!(async {
        serving.await.unwrap().unwrap();
        creates.wait().await;
    });
    let drain = Duration::from_millis(world.note(|books| books.drain));
    if timeout(drain, &mut all_ended).await.is_err() {
        shared.lifecycle.enter(Phase::Ended);
        if timeout(LAST_ANSWERS, &mut all_ended).await.is_err() {
            stop.send_replace(Stop::Now);
        }
    }
    let now = world.now();
    world.note(|books| books.ended = Some(now));
    let all = ListQuery {
        limit: usize::MAX >> 1,
        ..ListQuery::default()
    };
    let stored = shared.ledger.read(move |store| store.list(&all)).await;
    let stored = stored.unwrap().tasks.into_iter();
    let stored = stored.map(|record| (record.request_id, (record.state, record.task_id)));
    world.note(|books| books.stored = stored.collect());
    drop(shared);
    // This lets the clients see that the proxy has ended.
    drop(connect);
    while clients.join_next().await.is_some() {}
}

/// Runs the store of tasks, in memory.
fn store(shared: &Shared) -> impl Future<Output = ()> + use<> {
    let store = Sqlite::in_memory("simulation".to_owned(), SystemTime::UNIX_EPOCH).unwrap();
    let ledger = shared.ledger.clone();
    async move { ledger.run(Box::new(store), Duration::MAX).await }
}

/// Returns the real stack, with the default settings.
fn proxy(world: &World) -> Shared {
    let (settings, _) = Settings::load(&Flags::default(), &Environment::default()).unwrap();
    let [access_key, secret_key] = ["access", "secret"].map(|key| Secret::from(key.repeat(5)));
    Shared::new(Parts {
        credential: Credential::Pair {
            access_key,
            secret_key,
        },
        validity: settings.token,
        rules: Rules {
            allowed_hosts: settings.access.allowed_hosts,
            allowed_origins: Vec::new(),
            allowed_methods: Vec::new(),
            allowed_paths: Vec::new(),
            client_tokens: None,
            request_body: settings.limits.request_body,
            in_flight: settings.limits.in_flight,
            purpose: Purpose::Serve,
        },
        errors: settings.errors,
        retry: settings.retry,
        replay: settings.replay,
        origin: "https://kling.test".parse().unwrap(),
        sandboxed: false,
        admin: None,
        dial: Arc::new(Upstream::new(world.clone())),
        timeouts: settings.upstream.timeouts,
        waiting: settings.state.waiting,
        clock: Arc::new(SimulatedClock(Instant::now())),
        metrics: Arc::new(Metrics::new().unwrap()),
    })
}

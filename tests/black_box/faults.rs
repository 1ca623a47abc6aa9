//! Bad days: whatever upstream, its connections, its clients and their signals do, a create that may
//! have worked is not sent again, each task is in the log, and each request is answered in time.
//!
//! The proxy has its defaults, but for `upstream.response_timeout`: late answers are to come in time for
//! a test.

mod books;
mod client;
mod kling;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use serde_json::Value;

use self::{
    books::Entry,
    client::{Order, Outcome, REPLAY_BODY, Try},
    kling::{FAULTS, Fault, Kling, is_create, order_of, task},
};
use crate::support::{
    Command, Connection, KeyFiles, PATIENCE, Proxy, Signal, Upstream, Way, given, post,
};

/// `FAULTS_SEED` asks for another.
const SEED: u64 = 20_260_701;
/// Creates, and as many polls: enough for each fault to meet each kind of request. `FAULTS_COUNT`
/// asks for more.
const COUNT: u64 = 1_500;
/// Clients that send at once.
const CLIENTS: usize = 40;
/// Changes of the pair of keys.
const ROTATIONS: usize = 5;
/// The longest time to an answer: 5 s to connect, three times 500 ms for upstream to answer, 3 s between
/// the attempts, and as much again for a machine that does something else meanwhile.
const LONGEST: Duration = PATIENCE;

/// How the proxy is told to end.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Signal,
    Quit,
}

/// What the log says of the end of a create, in all of its lines.
#[derive(Debug, Default)]
struct Told {
    tasks: BTreeSet<String>,
    /// It was never sent, or was refused.
    cancelled: bool,
    /// What else became of it: the type of an error, or that nobody knows.
    failures: BTreeSet<String>,
    /// External ids in lines at `warn`.
    warned: BTreeSet<String>,
}

/// What is known of one request when all is over.
struct Row<'a> {
    seed: u64,
    http2: bool,
    sent: &'a Try,
    entry: Entry,
    told: Option<&'a Told>,
    /// Whether the connection that it came over was ended by upstream, then or later.
    ended: bool,
}

/// Tasks of one order: the first, and one for each time that its client risked another.
#[derive(Default)]
struct Tasks {
    made: usize,
    risked: usize,
}

// === impl Ending ===

impl Ending {
    /// Tells the proxy to end while requests are in flight.
    fn begin(self, proxy: &Proxy) {
        if let Self::Quit = self {
            let admin = proxy.listener("admin");
            let answer = Connection::to(admin).send(post("/quit", "")).answer();
            assert_eq!(answer.status(), 200);
        }
        proxy.signal(Signal::TERM);
    }
}

// === impl Told ===

impl Told {
    /// What the lines of a log say of creates, by the name of the request.
    fn by(log: &str) -> BTreeMap<String, Self> {
        let mut told: BTreeMap<String, Self> = BTreeMap::new();
        for line in log.lines() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let text = |key: &str| line[key].as_str().map(ToOwned::to_owned);
            let Some(name) = text("request_id").filter(|name| is_create(name)) else {
                continue;
            };
            let message = text("message").unwrap_or_default();
            if ["sending", "sending again"].contains(&&*message) {
                continue;
            }
            let told = told.entry(name).or_default();
            told.tasks.extend(text("task.id"));
            told.cancelled |= message.contains("no task was made");
            told.failures.extend(text("error.type"));
            if message.contains("may exist") {
                told.failures.insert(message);
            }
            if line["level"] == "WARN" {
                told.warned.extend(text("task.external_id"));
            }
        }
        told
    }
}

// === impl Row ===

impl Row<'_> {
    /// Fails unless each rule for one request holds.
    fn check(&self) {
        let Self {
            seed, sent, entry, ..
        } = self;
        let Try {
            name,
            outcome,
            took,
            size,
        } = sent;
        let row = format!("seed {seed}, {sent:?}, {entry:?}, {:?}", self.told);
        if let Outcome::Wrong(what) = outcome {
            panic!("{what}: {row}");
        }
        assert!(*took < LONGEST, "too late: {row}");
        if let Outcome::Broken { ending } = *outcome {
            let not_taken = ending && entry.begun == 0;
            let broken = entry.fault == Some(Fault::CutInside) || self.http2 && self.ended;
            assert!(not_taken || broken, "no answer: {row}");
        }
        if !is_create(name) {
            return;
        }
        assert!(entry.begun - entry.refused <= 1, "sent again: {row}");
        assert!(entry.done <= 1, "done twice: {row}");
        // A larger body is read while it is sent, and only behind it that its client has left.
        assert!(*size <= REPLAY_BODY || entry.begun <= 1, "not kept: {row}");
        assert!(
            *size > REPLAY_BODY || !entry.begun_late,
            "nobody waits for it: {row}"
        );
        let Some(told) = self.told else {
            let no_trace = matches!(outcome, Outcome::Broken { .. } | Outcome::Left);
            assert!(no_trace && entry.begun == 0, "lost: {row}");
            return;
        };
        assert!(!told.cancelled || entry.done == 0, "not cancelled: {row}");
        match *outcome {
            Outcome::Well => assert!(self.is_named(), "task not named: {row}"),
            Outcome::Failed {
                retryable,
                attempts,
            } => {
                assert!(!retryable || entry.done == 0, "done again: {row}");
                assert!(entry.begun as u64 <= attempts, "more attempts: {row}");
            }
            Outcome::Broken { .. } | Outcome::Left | Outcome::Wrong(_) => {}
        }
        if entry.done == 1 {
            let named = self.is_named();
            assert!(named || !self.is_known(), "task not named: {row}");
            let order = order_of(name);
            assert!(
                named || told.warned.contains(order),
                "no external id: {row}"
            );
        }
    }

    /// Whether the log names its task.
    fn is_named(&self) -> bool {
        let task = task(&self.sent.name);
        self.told.is_some_and(|told| told.tasks.contains(&task))
    }

    /// Whether the task was told to the proxy, beyond doubt. The end of a connection over HTTP/2 may
    /// overtake the answers before it.
    fn is_known(&self) -> bool {
        self.entry.answered && !(self.http2 && self.ended)
    }

    /// Whether its client knew that there may be a task, and that another request may make another.
    fn is_risk(&self) -> bool {
        match self.sent.outcome {
            Outcome::Failed { retryable, .. } => !retryable,
            Outcome::Broken { .. } => self.entry.begun > 0,
            // It was being sent by then.
            Outcome::Left => self.told.is_some_and(|told| !told.cancelled),
            _ => false,
        }
    }
}

/// Sends all orders, changes the keys meanwhile, and has the proxy end before the last are answered.
fn run(kling: &Kling, orders: &[Order], files: &KeyFiles, proxy: &Proxy, end: Ending) -> Vec<Try> {
    let next = AtomicUsize::new(0);
    let serve = |address: SocketAddr| {
        let mut kept = None;
        let mut tries = Vec::new();
        while let Some(order) = orders.get(next.fetch_add(1, Relaxed)) {
            tries.extend(order.place(kling, address, &mut kept));
        }
        tries
    };
    thread::scope(|scope| {
        let address = proxy.address;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| scope.spawn(move || serve(address)))
            .collect();
        let books = &kling.books;
        for generation in 1..=ROTATIONS {
            let enough = orders.len() * generation / (ROTATIONS + 2);
            books.expect("answers", |pages| pages.told >= enough);
            books.note(|pages| pages.generation = generation);
            files.write(generation);
            proxy.signal(Signal::HUP);
            books.expect("the new key", |pages| pages.shown == generation);
        }
        books.expect("answers", |pages| pages.told >= orders.len() * 9 / 10);
        books.note(|pages| pages.ending = true);
        end.begin(proxy);
        let joined = clients.into_iter().map(|client| client.join().unwrap());
        joined.flatten().collect()
    })
}

#[expect(clippy::print_stdout, reason = "how to run it again")]
fn survives_a_bad_day(protocol: &str, way: Way, end: Ending) {
    let seed = given("FAULTS_SEED").unwrap_or(SEED);
    let count = given("FAULTS_COUNT").unwrap_or(COUNT);
    println!("FAULTS_SEED={seed} FAULTS_COUNT={count}");
    let upstream = Upstream::lenient(protocol);
    let kling = Kling::at(&upstream, protocol == "h2", seed);
    let command = Command::new([])
        .upstream(&upstream)
        .setting("upstream.warm_up", "")
        .setting("upstream.keep_warm", "")
        .setting("upstream.response_timeout", "500ms")
        .setting("admin.quit", "true");
    let (files, command) = KeyFiles::of(way, command);
    let proxy = command.start();
    let tries = run(&kling, &Order::all(count, seed), &files, &proxy, end);
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0), "seed {seed}");
    assert!(!log.contains("secret-key-"), "seed {seed}: a key is logged");
    check(&kling, &tries, &Told::by(&log));
}

/// Fails unless each rule holds, for each request and for each order.
fn check(kling: &Kling, tries: &[Try], told: &BTreeMap<String, Told>) {
    let seed = kling.seed;
    let pages = kling.books.pages();
    assert_eq!(pages.complaints, BTreeSet::new(), "seed {seed}");
    let mut orders: BTreeMap<&str, Tasks> = BTreeMap::new();
    let mut late = 0;
    for sent in tries {
        let name = &sent.name;
        let entry = pages.requests.get(name).cloned().unwrap_or_default();
        let connection = pages.connections.get(&entry.connection);
        let row = Row {
            seed,
            http2: kling.http2,
            sent,
            entry,
            told: told.get(name),
            ended: connection.is_some_and(|connection| connection.ended),
        };
        row.check();
        if is_create(name) {
            late += usize::from(row.is_named() && row.entry.fault == Some(Fault::Late));
            let Tasks { made, risked } = orders.entry(order_of(name)).or_default();
            *made += row.entry.done;
            assert!(*made <= 1 + *risked, "seed {seed}: two tasks of {name}");
            *risked += usize::from(row.is_risk());
        }
    }
    assert!(late > 0, "seed {seed}: no late answer was named");
    let all: BTreeSet<_> = FAULTS.into_iter().chain([Fault::Nothing]).collect();
    assert_eq!(pages.faults, all, "faults of seed {seed}");
}

#[test]
fn no_fault_of_upstream_repeats_a_create_or_loses_a_task() {
    survives_a_bad_day("http/1.1", Way::Rename, Ending::Signal);
}

#[test]
fn no_fault_over_http_2_repeats_a_create_or_loses_a_task() {
    survives_a_bad_day("h2", Way::Swap, Ending::Quit);
}

//! Bad days: whatever upstream and its connections do, a create that may have worked is not sent
//! again, and every request is answered.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::ErrorKind,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use fastrand::Rng;
use serde_json::{Value, json};

use tokio::time::Instant;

use crate::support::{
    Command, Connection, Credential, Gate, Message, Proxy, Signal, Step, Upstream, documented, get,
    given, kling, post, reply, request, send,
};

/// Creates, and as many polls: enough for each fault to meet each kind of request. `FAULTS_COUNT`
/// asks for more.
const COUNT: u64 = 800;
/// What happens when, unless `FAULTS_SEED` asks for another day.
const SEED: u64 = 18;
/// Longer than any request may take: three attempts, each of which connects, sends and is answered within
/// its limits, and a machine that stalls.
const LONGEST: Duration = Duration::from_mins(1);
/// How long upstream may take to read what was sent before its client was told.
const SLACK: Duration = Duration::from_secs(5);
/// Clients that send at once.
const CLIENTS: usize = 40;
/// What the log says of a create that was never sent, or was refused.
const CANCELLED: &str = "no task was made";
/// Requests of a hundred that nothing goes wrong with.
const WELL: u8 = 60;

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Nothing,
    /// The connection breaks when the request begins to arrive.
    BrokenBefore,
    /// The same in the middle of it.
    BrokenInside,
    /// It is carried out, and then this happens instead of an answer.
    Lost(End),
    /// It is carried out, and answered too late.
    Late,
    /// It is carried out, and the answer breaks off in its head.
    CutShort,
    /// It is carried out, and the answer breaks off in its body, before it names the task.
    CutInside,
    /// It is carried out, and never answered.
    Silent,
    /// It is carried out, and answered with this code.
    Failed(u16),
    /// The same, with this status and no code.
    Bare(u16),
    /// It is refused with this code.
    Refused(u16),
    /// It is answered, and then this happens to the connection.
    Then(End),
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Closed,
    HalfClosed,
    Reset,
}

#[rustfmt::skip]
const FAULTS: [Fault; 22] = [
    Fault::BrokenBefore, Fault::BrokenInside, Fault::Late, Fault::Silent, Fault::CutShort, Fault::CutInside,
    Fault::Lost(End::Closed), Fault::Lost(End::HalfClosed), Fault::Lost(End::Reset),
    Fault::Failed(5000), Fault::Failed(5001), Fault::Failed(5002),
    Fault::Bare(502), Fault::Bare(503), Fault::Bare(504),
    Fault::Refused(1003), Fault::Refused(1004), Fault::Refused(1302), Fault::Refused(1303),
    Fault::Then(End::Closed), Fault::Then(End::HalfClosed), Fault::Then(End::Reset),
];

/// A Kling on a bad day, and its books.
struct Kling {
    seed: u64,
    books: Mutex<Books>,
    /// Late answers wait for it.
    late: Gate,
}

#[derive(Default)]
struct Books {
    connections: usize,
    requests: BTreeMap<String, Entry>,
    faults: BTreeSet<Fault>,
    /// Connections, each a thread of upstream's, that were to end after an answer. What still comes
    /// over one is read, and cannot be answered.
    ended: HashSet<ThreadId>,
}

/// What was seen of a request, by its name.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// How often it began to arrive.
    begun: usize,
    refused: usize,
    /// How often it was carried out: tasks, for a create.
    done: usize,
    /// Whether it was answered without any fault.
    answered: bool,
    /// Whether its whole answer comes late.
    late: bool,
    /// When it was carried out last.
    done_at: Option<Instant>,
}

/// What a client wants. The name says what it is.
struct Order {
    name: String,
    leaves: Leaves,
}

/// When a client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaves {
    Never,
    /// Right after the body.
    AtOnce,
    /// After so long without an answer; then it sends the same again, as [`AGAIN`].
    After(Duration),
}

/// One request of a client.
#[derive(Debug)]
struct Attempt {
    outcome: Result<Outcome, String>,
    begun: Instant,
    ended: Instant,
}

/// How that went.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Well,
    Failed {
        retryable: bool,
    },
    /// The client left, or its answer broke off.
    Gone,
}

/// What a client that asks again adds to the name.
const AGAIN: &str = "-again";

// === impl Kling ===

impl Kling {
    /// Takes over an upstream.
    fn at(upstream: &Upstream, seed: u64) -> Arc<Self> {
        let (books, late) = (Mutex::default(), Gate::default());
        let kling = Arc::new(Self { seed, books, late });
        let (first, whole) = (Arc::clone(&kling), Arc::clone(&kling));
        upstream.interrupt(move |_, first_line| first.interrupt(first_line));
        upstream.script(move |request| whole.answer(request));
        kling
    }

    fn interrupt(&self, first_line: &str) -> Option<usize> {
        let mut books = self.books();
        if first_line.is_empty() {
            books.connections += 1;
            return (rng(self.seed, books.connections).u8(..100) < 2).then_some(0);
        }
        let name = name(first_line);
        let entry = books.requests.entry(name.clone()).or_default();
        entry.begun += 1;
        let fault = self.fault(&name, entry.begun);
        books.faults.insert(fault);
        match fault {
            Fault::BrokenBefore => Some(0),
            Fault::BrokenInside => Some(rng(self.seed, &name).usize(1..100)),
            _ => None,
        }
    }

    fn answer(&self, request: &Message) -> Vec<Step> {
        let mut books = self.books();
        let Books {
            requests, ended, ..
        } = &mut *books;
        let name = name(request.first_line());
        let entry = requests.get_mut(&name).expect("a beginning");
        let fault = self.fault(&name, entry.begun);
        if let Fault::Refused(code) = fault {
            entry.refused += 1;
            let status = if code < 1100 { 401 } else { 429 };
            return vec![send(kling(status, format!(r#"{{"code":{code}}}"#)))];
        }
        entry.done += 1;
        entry.done_at = Some(Instant::now());
        entry.late = fault == Fault::Late;
        let connection = thread::current().id();
        entry.answered |= fault == Fault::Nothing && !ended.contains(&connection);
        if let Fault::Then(_) = fault {
            ended.insert(connection);
        }
        if is_create(&name) {
            let external_id = &request.json()["external_task_id"];
            assert_eq!(external_id, name.trim_end_matches(AGAIN), "another's body");
        }
        let data = json!({ "task_id": task(&name) });
        let success = json!({ "code": 0, "message": "SUCCEED", "request_id": "up", "data": data });
        let success = kling(200, success.to_string());
        match fault {
            Fault::Late => vec![Step::Wait(self.late.clone()), send(success)],
            Fault::Silent => vec![Step::Hang],
            Fault::CutInside => vec![send(&success[..success.len() - 20]), Step::Close],
            Fault::Lost(end) => vec![end.step()],
            Fault::CutShort => vec![send(&success[..20]), Step::Close],
            Fault::Failed(code) => {
                vec![send(kling(500, format!(r#"{{"code":{code}}}"#)))]
            }
            Fault::Bare(status) => vec![send(reply(status, "content-type: text/html", "<h1>"))],
            Fault::Then(end) => vec![send(success), end.step()],
            _ => vec![send(success)],
        }
    }

    /// Depends on nothing but the seed.
    fn fault(&self, name: &str, attempt: usize) -> Fault {
        let mut rng = rng(self.seed, (name, attempt));
        if rng.u8(..100) < WELL {
            Fault::Nothing
        } else {
            FAULTS[rng.usize(..FAULTS.len())]
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap()
    }
}

// === impl End ===

impl End {
    fn step(self) -> Step {
        match self {
            Self::Closed => Step::Close,
            Self::HalfClosed => Step::HalfClose,
            Self::Reset => Step::Reset,
        }
    }
}

// === impl Order ===

impl Order {
    /// Creates and polls in a random order.
    fn all(count: u64, rng: &mut Rng) -> Vec<Self> {
        let name = |index| [format!("create-{index}"), format!("poll-{index}")];
        let mut orders: Vec<_> = (0..count)
            .flat_map(name)
            .map(|name| Self {
                leaves: match rng.u8(..10) {
                    0 if is_create(&name) => Leaves::AtOnce,
                    1 | 2 if is_create(&name) => {
                        Leaves::After(Duration::from_millis(rng.u64(1..300)))
                    }
                    _ => Leaves::Never,
                },
                name,
            })
            .collect();
        rng.shuffle(&mut orders);
        orders
    }

    /// The request by which it is asked for, under this name.
    fn request(&self, name: &str, rng: &mut Rng) -> Vec<u8> {
        if !is_create(name) {
            return get(&format!("/v1/videos/{name}"));
        }
        let size = match rng.u8(..100) {
            // More than is kept to be sent again.
            0 => 2_000_000,
            1 | 2 => 200_000,
            _ => 1_000,
        };
        let body = json!({
            "prompt": "a cat ".repeat(rng.usize(..size) / 6),
            "external_task_id": self.name,
        });
        let headers = format!("content-type: application/json\nx-request-id: {name}");
        let line = format!("POST /v1/videos/{name}");
        request(&line, &headers, body.to_string())
    }

    /// Sends it on a kept connection, or on a new one. Tells what came of each request for it.
    fn send(
        &self,
        to: SocketAddr,
        kept: &mut Option<Connection>,
        rng: &mut Rng,
    ) -> Vec<(String, Attempt)> {
        let mut attempts = Vec::new();
        let mut ask = |name: String, leaves| {
            let begun = Instant::now();
            let outcome = self.ask(&name, leaves, to, kept, rng);
            let left = outcome == Ok(Outcome::Gone);
            let ended = Instant::now();
            let outcome = Attempt {
                outcome,
                begun,
                ended,
            };
            attempts.push((name, outcome));
            left
        };
        if ask(self.name.clone(), self.leaves) && matches!(self.leaves, Leaves::After(_)) {
            ask(format!("{}{AGAIN}", self.name), Leaves::Never);
        }
        attempts
    }

    fn ask(
        &self,
        name: &str,
        leaves: Leaves,
        to: SocketAddr,
        kept: &mut Option<Connection>,
        rng: &mut Rng,
    ) -> Result<Outcome, String> {
        let mut connection = kept.take().unwrap_or_else(|| Connection::to(to));
        connection.send(self.request(name, rng));
        match leaves {
            Leaves::AtOnce => return Ok(Outcome::Gone),
            Leaves::After(patience) if !connection.is_answered_within(patience) => {
                return Ok(Outcome::Gone);
            }
            Leaves::After(_) | Leaves::Never => {}
        }
        let answer = match connection.try_answer() {
            // Its head was there.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Ok(Outcome::Gone);
            }
            answer => answer.map_err(|error| error.to_string())?,
        };
        if answer.status() != 200 {
            let retryable = documented(&answer).ok_or_else(|| format!("{answer:?}"))?;
            return Ok(Outcome::Failed { retryable });
        }
        if answer.json()["data"]["task_id"] != task(name) {
            return Err(format!("another's answer: {answer:?}"));
        }
        *kept = rng.bool().then_some(connection);
        Ok(Outcome::Well)
    }
}

/// The name of a request, which ends its path.
fn name(first_line: &str) -> String {
    let target = first_line.split(' ').nth(1).unwrap_or_default();
    target.rsplit('/').next().unwrap_or_default().to_owned()
}

fn is_create(name: &str) -> bool {
    name.starts_with("create")
}

fn task(name: &str) -> String {
    format!("task-of-{name}")
}

fn rng(seed: u64, what: impl Hash) -> Rng {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    Rng::with_seed(hasher.finish())
}

/// Notes which create a line of the log tells the outcome of: its task, or else the error, or else that
/// nothing came of it, or that nobody knows. A task is the last word.
fn told_by(line: &str, told: &mut BTreeMap<String, Value>) {
    let Ok(line) = serde_json::from_str::<Value>(line) else {
        return;
    };
    let (Some(name), Some(message)) = (line["request_id"].as_str(), line["message"].as_str())
    else {
        return;
    };
    if !is_create(name) || ["sending", "sending again"].contains(&message) {
        return;
    }
    let outcomes = ["task.id", "error.type"].map(|key| &line[key]);
    let outcome = outcomes.into_iter().find(|outcome| !outcome.is_null());
    let words = [CANCELLED, "may exist and be billed"].into_iter();
    let word = words
        .filter(|word| message.contains(word))
        .map(Value::from)
        .next();
    if let Some(outcome) = outcome.cloned().or(word) {
        told.insert(name.to_owned(), outcome);
    }
}

/// A proxy as it is by default, whose keys are in files. Only upstream has less time, so that some answers
/// come too late.
fn start(upstream: &Upstream) -> (Proxy, PathBuf) {
    let command = Command::new([])
        .upstream(upstream)
        .setting("upstream.warm_up", "")
        .setting("upstream.keep_warm", "")
        .setting("upstream.response_timeout", "500ms")
        .setting("admin.quit", "true");
    let folder = command.home();
    let [access_key, secret_key] = FILES.map(|name| folder.join(name));
    rotate(&folder, 0);
    let proxy = command
        .env("KLING_ACCESS_KEY_FILE", access_key.to_str().unwrap())
        .env("KLING_SECRET_KEY_FILE", secret_key.to_str().unwrap())
        .start();
    (proxy, folder)
}

const FILES: [&str; 2] = ["access_key", "secret_key"];

/// The pair of a generation.
fn keys(generation: usize) -> [&'static str; 2] {
    ["access", "secret"].map(|half| &*format!("{half}-key-{generation}").leak())
}

/// Replaces the files of a pair.
fn rotate(folder: &Path, generation: usize) {
    for (name, key) in FILES.into_iter().zip(keys(generation)) {
        let new = folder.join("new");
        fs::write(&new, key).unwrap();
        fs::rename(new, folder.join(name)).unwrap();
    }
}

/// How the proxy is told to end.
#[derive(Clone, Copy)]
enum Word {
    Signal,
    Quit,
}

#[expect(clippy::print_stdout, reason = "how to run it again")]
fn survives_a_bad_day(upstream: &Upstream, end: Word) {
    let seed = given("FAULTS_SEED").unwrap_or(SEED);
    let count = given("FAULTS_COUNT").unwrap_or(COUNT);
    println!("seed {seed}");
    let (proxy, folder) = start(upstream);
    // The one that the proxy sends for itself, without a credential.
    upstream.wait(|seen| seen.requests.len() == 1);
    upstream.expect([0, 1, 2, 3].map(|generation| {
        let [access_key, secret_key] = keys(generation);
        Credential::Pair(access_key, secret_key)
    }));
    let kling = Kling::at(upstream, seed);
    let (orders, next) = (Order::all(count, &mut rng(seed, 0)), AtomicUsize::new(0));
    let serve = || {
        let mut kept = None;
        let mut attempts = Vec::new();
        while let index = next.fetch_add(1, Relaxed)
            && let Some(order) = orders.get(index)
        {
            // Three times in a run.
            if index % (orders.len() / 4) == 1 {
                rotate(&folder, 4 * index / orders.len());
            }
            let mut rng = rng(seed, ("client", &order.name));
            attempts.extend(order.send(proxy.address, &mut kept, &mut rng));
        }
        attempts
    };
    let attempts: BTreeMap<_, _> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(serve)).collect();
        let joined = clients.into_iter().map(|client| client.join().unwrap());
        joined.flatten().collect()
    });
    kling.late.open();
    // What goes on without its client, and what is late, tells its end only there.
    let creates = attempts.keys().filter(|name| is_create(name)).count();
    let told = RefCell::new(BTreeMap::new());
    // Over HTTP/2 what happens to one request may happen to others too.
    let alone = upstream.ca_file.is_none();
    let is_late = |name: &String| {
        let books = kling.books();
        alone && books.requests.get(name).is_some_and(|entry| entry.late)
    };
    let all_told = |line: &str| {
        let mut told = told.borrow_mut();
        told_by(line, &mut told);
        told.len() == creates
            && told
                .iter()
                .all(|(name, told)| !is_late(name) || *told == task(name))
    };
    assert!(proxy.stderr.find(all_told).is_some(), "seed {seed}");
    let told = told.into_inner();
    match end {
        Word::Signal => proxy.signal(Signal::TERM),
        Word::Quit => {
            let quit = Connection::to(proxy.listener("admin"))
                .send(post("/quit", ""))
                .answer();
            assert_eq!(quit.status(), 200);
            proxy.signal(Signal::TERM);
        }
    }
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("credential changed"), "{log}");

    let books = kling.books();
    for (name, attempt) in &attempts {
        let entry = books.requests.get(name).cloned().unwrap_or_default();
        let row = format!("seed {seed}, {name}: {attempt:?}, {entry:?}");
        let took = attempt.ended - attempt.begun;
        assert!(took < LONGEST, "too long: {row}");
        assert!(attempt.outcome.is_ok(), "no answer: {row}");
        if is_create(name) {
            check_create(name, attempt, &entry, &told[name], alone, &row);
        }
    }
    let met = books.faults.len();
    assert_eq!(met, FAULTS.len() + 1, "faults of seed {seed}");
}

/// Checks what upstream saw of a create, what its client was told, and what the log tells of it.
fn check_create(
    name: &str,
    Attempt { outcome, ended, .. }: &Attempt,
    entry: &Entry,
    told: &Value,
    alone: bool,
    row: &str,
) {
    assert!(entry.begun - entry.refused <= 1, "sent again: {row}");
    assert!(entry.done <= 1, "done twice: {row}");
    let is = |expected: &Outcome| outcome.as_ref() == Ok(expected);
    let too_late = entry.done_at.is_some_and(|done| done > *ended + SLACK);
    assert!(
        is(&Outcome::Gone) || !too_late,
        "sent after its client was told: {row}"
    );
    assert!(!is(&Outcome::Well) || entry.done == 1, "not done: {row}");
    let cancelled = told == CANCELLED;
    assert!(
        !cancelled || is(&Outcome::Gone) && entry.done == 0,
        "no task: {row}"
    );
    let again = is(&Outcome::Failed { retryable: true });
    assert!(!again || entry.done == 0, "done again: {row}");
    // On a busy machine an answer may come late.
    let answered = entry.answered && alone && told != "upstream_timeout";
    let known = is(&Outcome::Well) || is(&Outcome::Gone) && answered;
    assert!(!known || *told == task(name), "{told}: {row}");
}

#[test]
fn no_fault_of_upstream_repeats_a_create_or_leaves_a_request_unanswered() {
    survives_a_bad_day(&Upstream::expecting(Credential::Any), Word::Signal);
}

#[test]
fn no_fault_over_http_2_repeats_a_create_or_leaves_a_request_unanswered() {
    survives_a_bad_day(&Upstream::lenient("h2"), Word::Quit);
}

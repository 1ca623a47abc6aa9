//! Bad days: whatever upstream and its connections do, a create that may have worked is not sent
//! again, and every request is answered.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, ThreadId},
    time::SystemTime,
};

use fastrand::Rng;
use serde_json::{Value, json};

use crate::support::{
    Connection, Message, Proxy, Step, Upstream, documented, get, given, kling, reply, request, send,
};

/// Creates, and as many polls: enough for each fault to meet each kind of request. `FAULTS_COUNT`
/// asks for more.
const COUNT: u64 = 1_500;
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
const FAULTS: [Fault; 20] = [
    Fault::BrokenBefore, Fault::BrokenInside, Fault::Late, Fault::CutShort,
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
}

/// What a client is to send. The name says what it is.
struct Order {
    name: String,
    /// Hang up right after the body.
    hang_up: bool,
}

/// How that went.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Well,
    Failed { retryable: bool },
    Gone,
}

// === impl Kling ===

impl Kling {
    /// Takes over an upstream.
    fn at(upstream: &Upstream, seed: u64) -> Arc<Self> {
        let books = Mutex::default();
        let kling = Arc::new(Self { seed, books });
        let (first, whole) = (Arc::clone(&kling), Arc::clone(&kling));
        upstream.interrupt(move |first_line| first.interrupt(first_line));
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
        let connection = thread::current().id();
        entry.answered |= fault == Fault::Nothing && !ended.contains(&connection);
        if let Fault::Then(_) = fault {
            ended.insert(connection);
        }
        if is_create(&name) {
            assert_eq!(request.json()["external_task_id"], *name, "another's body");
        }
        let data = json!({ "task_id": task(&name) });
        let success = json!({ "code": 0, "message": "SUCCEED", "request_id": "up", "data": data });
        let success = kling(200, success.to_string());
        match fault {
            Fault::Late => vec![Step::Hang],
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
                hang_up: is_create(&name) && rng.u8(..10) == 0,
                name,
            })
            .collect();
        rng.shuffle(&mut orders);
        orders
    }

    fn request(&self, rng: &mut Rng) -> Vec<u8> {
        if !is_create(&self.name) {
            return get(&format!("/v1/videos/{}", self.name));
        }
        let size = if rng.u8(..50) == 0 { 200_000 } else { 1_000 };
        let body = json!({
            "prompt": "a cat ".repeat(rng.usize(..size) / 6),
            "external_task_id": self.name,
        });
        let headers = format!(
            "content-type: application/json\nx-request-id: {}",
            self.name
        );
        let line = format!("POST /v1/videos/{}", self.name);
        request(&line, &headers, body.to_string())
    }

    /// Sends it on a kept connection, or on a new one.
    fn send(
        &self,
        to: SocketAddr,
        kept: &mut Option<Connection>,
        rng: &mut Rng,
    ) -> Result<Outcome, String> {
        let mut connection = kept.take().unwrap_or_else(|| Connection::to(to));
        connection.send(self.request(rng));
        if self.hang_up {
            return Ok(Outcome::Gone);
        }
        let answer = connection.try_answer().map_err(|error| error.to_string())?;
        if answer.status() != 200 {
            let retryable = documented(&answer).ok_or_else(|| format!("{answer:?}"))?;
            return Ok(Outcome::Failed { retryable });
        }
        if answer.json()["data"]["task_id"] != task(&self.name) {
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

/// Which create a line of the log tells the outcome of: its task, or else the error, or else that
/// nothing came of it.
fn told_by(line: &str) -> Option<(String, Value)> {
    let line: Value = serde_json::from_str(line).ok()?;
    let name = line["request_id"].as_str().filter(|name| is_create(name))?;
    let message = line["message"].as_str()?;
    if ["sending", "sending again"].contains(&message) {
        return None;
    }
    let outcomes = ["task.id", "error.type"].map(|key| &line[key]);
    let outcome = outcomes.into_iter().find(|outcome| !outcome.is_null());
    let cancelled = || message.contains(CANCELLED).then(|| CANCELLED.into());
    Some((name.to_owned(), outcome.cloned().or_else(cancelled)?))
}

fn survives_a_bad_day(upstream: &Upstream) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = given("FAULTS_SEED").unwrap_or(now.as_secs());
    let count = given("FAULTS_COUNT").unwrap_or(COUNT);
    let kling = Kling::at(upstream, seed);
    let proxy = Proxy::to(upstream)
        .setting("upstream.response_timeout", "500ms")
        .start();
    let (orders, next) = (Order::all(count, &mut rng(seed, 0)), AtomicUsize::new(0));
    let serve = || {
        let mut kept = None;
        let mut outcomes = Vec::new();
        while let Some(order) = orders.get(next.fetch_add(1, Relaxed)) {
            let mut rng = rng(seed, ("client", &order.name));
            let outcome = order.send(proxy.address, &mut kept, &mut rng);
            outcomes.push((order.name.as_str(), outcome));
        }
        outcomes
    };
    let outcomes: BTreeMap<_, _> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(serve)).collect();
        let joined = clients.into_iter().map(|client| client.join().unwrap());
        joined.flatten().collect()
    });
    // What goes on without its client tells its end only there.
    let told = RefCell::new(BTreeMap::new());
    let all_told = |line: &str| {
        let mut told = told.borrow_mut();
        told.extend(told_by(line));
        told.len() == usize::try_from(count).unwrap()
    };
    assert!(proxy.stderr.find(all_told).is_some(), "seed {seed}");
    let told = told.into_inner();

    let books = kling.books();
    for (name, outcome) in outcomes {
        let entry = books.requests.get(name).cloned().unwrap_or_default();
        let row = format!("seed {seed}, {name}: {outcome:?}, {entry:?}");
        let outcome = outcome.unwrap_or_else(|_| panic!("no answer: {row}"));
        if !is_create(name) {
            continue;
        }
        assert!(entry.begun - entry.refused <= 1, "sent again: {row}");
        assert!(entry.done <= 1, "done twice: {row}");
        assert!(
            outcome != Outcome::Well || entry.done == 1,
            "not done: {row}"
        );
        let cancelled = told[name] == CANCELLED;
        assert!(
            !cancelled || outcome == Outcome::Gone && entry.done == 0,
            "no task: {row}"
        );
        let again = Outcome::Failed { retryable: true };
        assert!(outcome != again || entry.done == 0, "done again: {row}");
        // Over HTTP/2 what happens to one request may happen to others too.
        let alone = upstream.ca_file.is_none();
        let known = match outcome {
            Outcome::Well => true,
            // On a busy machine an answer may come late.
            Outcome::Gone => entry.answered && alone && told[name] != "upstream_timeout",
            Outcome::Failed { .. } => false,
        };
        assert!(!known || told[name] == task(name), "{}: {row}", told[name]);
    }
    let met = books.faults.len();
    assert_eq!(met, FAULTS.len() + 1, "faults of seed {seed}");
}

#[test]
fn no_fault_of_upstream_repeats_a_create_or_leaves_a_request_unanswered() {
    survives_a_bad_day(&Upstream::ok());
}

#[test]
fn no_fault_over_http_2_repeats_a_create_or_leaves_a_request_unanswered() {
    survives_a_bad_day(&Upstream::tls("h2"));
}

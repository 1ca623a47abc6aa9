//! A Kling on a bad day. What goes wrong with a request depends on nothing but the seed and its name.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex},
    time::Duration,
};

use fastrand::Rng;
use serde_json::json;

use super::{books::Books, client::Leave};
use crate::support::{Gate, Message, Step, Upstream, kling, pair, reply, send};

/// Requests of a hundred that nothing goes wrong with.
const WELL: u8 = 60;
/// Connections of a hundred that are broken off, and that have to wait for their handshake.
const BROKEN: u8 = 2;
const HELD: u8 = 10;
/// Pairs of keys that are good at a time. A request may show the one before the newest.
const KEYS: usize = 3;
/// The longest that a connection is held back for a client to leave meanwhile.
const HOLD: Duration = Duration::from_millis(300);

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    Nothing,
    /// The connection breaks when the request begins to arrive.
    BrokenBefore,
    /// The same in the middle of it.
    BrokenInside,
    /// It is carried out, and then this happens instead of an answer.
    Lost(End),
    /// It is carried out, and answered once its client has been told something else, or has left.
    Late,
    /// It is carried out, and the answer breaks off in its head.
    CutShort,
    /// It is carried out, and the answer breaks off in its body.
    CutInside,
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
pub(super) enum End {
    Closed,
    HalfClosed,
    Reset,
}

#[rustfmt::skip]
pub(super) const FAULTS: [Fault; 22] = [
    Fault::BrokenBefore, Fault::BrokenInside, Fault::CutShort, Fault::CutInside,
    Fault::Late, Fault::Late,
    Fault::Lost(End::Closed), Fault::Lost(End::HalfClosed), Fault::Lost(End::Reset),
    Fault::Failed(5000), Fault::Failed(5001), Fault::Failed(5002),
    Fault::Bare(502), Fault::Bare(503), Fault::Bare(504),
    Fault::Refused(1003), Fault::Refused(1004), Fault::Refused(1302), Fault::Refused(1303),
    Fault::Then(End::Closed), Fault::Then(End::HalfClosed), Fault::Then(End::Reset),
];

/// Refusals, of which a client may leave before it hears.
const REFUSALS: [Fault; 2] = [Fault::Refused(1302), Fault::Refused(1303)];

pub(super) struct Kling {
    pub(super) seed: u64,
    /// Whether its connections are shared, so that the end of one is the end of many requests.
    pub(super) http2: bool,
    pub(super) books: Books,
    /// Opened when the client of a request has its answer, or has left.
    gates: Mutex<BTreeMap<String, Gate>>,
}

// === impl Kling ===

impl Kling {
    /// Takes over an upstream, which leaves it to this to judge credentials.
    pub(super) fn at(upstream: &Upstream, http2: bool, seed: u64) -> Arc<Self> {
        let kling = Arc::new(Self {
            seed,
            http2,
            books: Books::default(),
            gates: Mutex::default(),
        });
        let (first, whole) = (Arc::clone(&kling), Arc::clone(&kling));
        upstream.interrupt(move |connection, line| match line {
            "" => first.accept(connection),
            line => first.begin(connection, &name(line)),
        });
        upstream.script(move |request| whole.answer(request));
        // The books are kept here.
        upstream.forget();
        kling
    }

    /// The client of a request has its answer, or has left without one.
    pub(super) fn client_is_done(&self, name: &str, left: bool) {
        self.books.note(|pages| pages.end(name, left));
        self.gate(name).open();
    }

    fn gate(&self, name: &str) -> Gate {
        let mut gates = self.gates.lock().unwrap();
        gates.entry(name.to_owned()).or_default().clone()
    }

    fn accept(&self, connection: usize) -> Option<usize> {
        let mut rng = rng(self.seed, connection);
        if rng.u8(..100) < HELD {
            let left = self.books.pages().left;
            self.books.wait(HOLD, |pages| pages.left > left);
        }
        self.books.note(|pages| pages.accept(connection));
        (rng.u8(..100) < BROKEN).then_some(0)
    }

    fn begin(&self, connection: usize, name: &str) -> Option<usize> {
        if name.is_empty() {
            return None;
        }
        self.books.note(|pages| {
            let entry = pages.begin(name, connection);
            let fault = self.fault(name, entry.begun);
            entry.fault = Some(fault);
            if is_create(name) {
                pages.faults.insert(fault);
            }
            match fault {
                Fault::BrokenBefore => Some(0),
                Fault::BrokenInside => Some(rng(self.seed, name).usize(1..100)),
                _ => None,
            }
        })
    }

    fn answer(&self, request: &Message) -> Vec<Step> {
        let name = name(request.first_line());
        let complaint = self.complaint(request, &name);
        if name.is_empty() {
            self.books.note(|pages| pages.complaints.extend(complaint));
            return vec![send(reply(200, "", ""))];
        }
        // Such a client leaves when its request has begun, and is refused after that.
        let leaves = Leave::of(self.seed, &name) == Some(Leave::Begun);
        let fault = self.books.note(|pages| {
            pages.complaints.extend(complaint);
            let entry = pages.requests.get_mut(&name).expect("a beginning");
            let fault = entry.fault.expect("a fault");
            if let Fault::Refused(_) = fault {
                entry.refused += 1;
                entry.refused_late |= leaves;
                return fault;
            }
            entry.done += 1;
            let wire = pages.connections.get_mut(&request.connection);
            let wire = wire.expect("a connection");
            entry.answered |= matches!(fault, Fault::Nothing | Fault::Late) && !wire.ended;
            wire.ended |= fault.ends_connection(self.http2);
            fault
        });
        let waits = match fault {
            Fault::Late if !is_create(&name) => return vec![Step::Hang],
            Fault::Late => true,
            Fault::Refused(_) => leaves,
            _ => false,
        };
        let wait = waits.then(|| Step::Wait(self.gate(&name)));
        wait.into_iter().chain(self.steps(fault, &name)).collect()
    }

    /// Says what is wrong with a request: with its credential, which must be one of the newest pairs, or
    /// with its body.
    fn complaint(&self, request: &Message, name: &str) -> Option<String> {
        if name.is_empty() {
            // It opens a connection, and shows no credential.
            let credential = request.header("authorization");
            return credential.map(|_| request.first_line().to_owned());
        }
        let newest = self.books.pages().generation;
        let mut known = (newest.saturating_sub(KEYS - 1)..=newest).rev();
        let Some(shown) = known.find(|known| pair(*known).judge(request).is_ok()) else {
            return Some(request.head.clone());
        };
        self.books
            .note(|pages| pages.shown = pages.shown.max(shown));
        let is_its_own = || request.json()["external_task_id"] == order_of(name);
        let wrong = is_create(name) && !is_its_own();
        wrong.then(|| format!("another's body: {name}"))
    }

    fn steps(&self, fault: Fault, name: &str) -> Vec<Step> {
        let data = json!({ "task_id": task(name) });
        let success = json!({ "code": 0, "message": "SUCCEED", "request_id": "up", "data": data });
        let success = kling(200, success.to_string());
        let code = |status, code: u16| vec![send(kling(status, format!(r#"{{"code":{code}}}"#)))];
        match fault {
            Fault::Lost(end) => vec![end.step()],
            Fault::CutShort => vec![send(&success[..20]), Step::Close],
            Fault::CutInside => {
                let body = success.windows(4).position(|end| end == b"\r\n\r\n");
                let (body, size) = (body.expect("a body") + 4, success.len());
                let cut = rng(self.seed, name).usize(body + 1..size);
                let mut steps = vec![send(&success[..cut])];
                // Of HTTP/2 only the stream breaks off.
                steps.extend((!self.http2).then_some(Step::Close));
                steps
            }
            Fault::Failed(number) => code(500, number),
            Fault::Bare(status) => vec![send(reply(status, "content-type: text/html", "<h1>"))],
            Fault::Refused(number) if number < 1100 => code(401, number),
            Fault::Refused(number) => code(429, number),
            Fault::Then(end) => vec![send(success), end.step()],
            _ => vec![send(success)],
        }
    }

    fn fault(&self, name: &str, attempt: usize) -> Fault {
        let mut rng = rng(self.seed, (name, attempt));
        if Leave::of(self.seed, name) == Some(Leave::Begun) && rng.bool() {
            return REFUSALS[rng.usize(..REFUSALS.len())];
        }
        if rng.u8(..100) < WELL {
            Fault::Nothing
        } else {
            FAULTS[rng.usize(..FAULTS.len())]
        }
    }
}

// === impl Fault ===

impl Fault {
    fn ends_connection(self, http2: bool) -> bool {
        match self {
            Self::CutShort | Self::Lost(End::Closed) | Self::Then(End::Closed) => true,
            // Of HTTP/2 only the stream, or what comes later.
            Self::CutInside | Self::Lost(_) | Self::Then(_) => !http2,
            _ => false,
        }
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

/// The name of a request, which ends its path.
fn name(first_line: &str) -> String {
    let target = first_line.split(' ').nth(1).unwrap_or_default();
    target.rsplit('/').next().unwrap_or_default().to_owned()
}

pub(super) fn is_create(name: &str) -> bool {
    name.starts_with("create")
}

/// The name of an order, by that of one of its requests.
pub(super) fn order_of(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// The task that a request makes.
pub(super) fn task(name: &str) -> String {
    format!("task-of-{name}")
}

pub(super) fn rng(seed: u64, what: impl Hash) -> Rng {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    Rng::with_seed(hasher.finish())
}

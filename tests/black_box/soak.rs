//! A long day: mixed load for as long as one likes, after which nothing is lost and nothing has grown.
//!
//! A few seconds of it are a test like any other. What grows slowly shows in half an hour:
//!
//! ```console
//! $ SOAK_SECONDS=1800 cargo test --locked --release --test black_box soak:: -- --nocapture
//! ```

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    iter::repeat_with,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use fastrand::Rng;
use serde_json::json;

use crate::support::{
    Connection, Message, Proxy, Signal, Step, Upstream, documented, eventually, get, given, kling,
    post, reply, send,
};

/// `SOAK_SEED` asks for another.
const SEED: u64 = 20_260_701;
/// Long enough for each kind of request. `SOAK_SECONDS` asks for more; growth can be told from a
/// beginning after some minutes.
const SECONDS: u64 = 3;
/// Clients that go on at once, each with one request at a time.
const CLIENTS: usize = 36;
/// What a client waits between two requests, on average: the proxy is to be busy, not overrun.
const PAUSE: Duration = Duration::from_millis(250);
/// What a slow client waits before it goes on, or away.
const SLOWNESS: Duration = Duration::from_secs(1);
/// Far more than the connections' buffers hold.
const DOWNLOAD: usize = 8 << 20;
/// What memory must not exceed however short the run is.
const MEMORY: usize = 128 << 20;
/// By how many descriptors two thirds may differ, as more or fewer requests happen to meet.
const CHANCE: usize = 8;

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Poll,
    Create,
    /// A create with an image.
    Upload,
    /// A create that upstream has no room for at times.
    Busy,
    /// A create with a mistake.
    Rejected,
    /// A create that a gateway fails.
    Broken,
    /// A create that dribbles in.
    Slow,
    /// A create that stops somewhere, until its client goes away.
    Silent,
    /// An upload whose client goes away in the middle.
    HalfSent,
    /// A create whose client goes away at its end.
    HungUp,
    Download,
    /// A download whose client goes away in the middle.
    HalfRead,
}

#[rustfmt::skip]
const MIX: [Kind; 20] = [
    Kind::Poll, Kind::Poll, Kind::Poll, Kind::Poll, Kind::Poll, Kind::Poll, Kind::Poll,
    Kind::Create, Kind::Create, Kind::Create, Kind::Upload, Kind::Busy, Kind::Rejected, Kind::Broken,
    Kind::Slow, Kind::Silent, Kind::HalfSent, Kind::HungUp, Kind::Download, Kind::HalfRead,
];

/// A Kling, and its books.
struct Kling {
    /// Videos are all of it, images are parts.
    pixels: String,
    books: Mutex<Books>,
}

struct Books {
    /// Requests by their names: creates until they are carried out, all others until they are
    /// answered. What is not in here must not arrive.
    open: BTreeMap<String, Kind>,
    /// Creates that succeeded.
    tasks: usize,
    /// Says when there is no room.
    rng: Rng,
}

/// One of many, with a connection that it keeps until it goes away from it.
struct Client<'a> {
    kling: &'a Kling,
    proxy: SocketAddr,
    kept: Option<Connection>,
    rng: Rng,
}

/// What one looks at after a long run.
#[derive(Default)]
struct Report {
    requests: BTreeMap<Kind, usize>,
    tasks: usize,
    /// The proxy's resident bytes, once a second.
    memory: Vec<usize>,
    /// Its open descriptors, as often.
    descriptors: Vec<usize>,
    peak: usize,
}

// === impl Kind ===

impl Kind {
    fn is_read(self) -> bool {
        matches!(self, Self::Poll | Self::Download | Self::HalfRead)
    }
}

// === impl Kling ===

impl Kling {
    /// Takes over an upstream.
    fn at(upstream: &Upstream, rng: &mut Rng) -> Arc<Self> {
        let block: String = repeat_with(|| rng.alphanumeric()).take(1 << 20).collect();
        let kling = Arc::new(Self {
            pixels: block.repeat(DOWNLOAD / block.len()),
            books: Mutex::new(Books {
                open: BTreeMap::new(),
                tasks: 0,
                rng: rng.fork(),
            }),
        });
        let answering = Arc::clone(&kling);
        upstream.forget();
        upstream.script(move |request| answering.answer(request));
        kling
    }

    fn answer(&self, request: &Message) -> Vec<Step> {
        let name = request.target().rsplit('/').next().unwrap_or_default();
        let mut books = self.books();
        let kind = books.open.get(name).copied();
        let kind = kind.unwrap_or_else(|| panic!("{name} came twice, or in part"));
        if kind == Kind::Busy && books.rng.bool() {
            return vec![send(kling(429, r#"{"code":1303}"#))];
        }
        if !kind.is_read() {
            books.open.remove(name);
            books.tasks += usize::from(![Kind::Rejected, Kind::Broken].contains(&kind));
            let whole = request.body == self.order(kind, name).as_bytes();
            assert!(whole, "another body than that of {name}");
        }
        vec![send(match kind {
            Kind::Rejected => kling(400, r#"{"code":1201}"#),
            Kind::Broken => reply(500, "content-type: text/html", "<h1>"),
            Kind::Download | Kind::HalfRead => reply(200, "content-type: video/mp4", &self.pixels),
            _ => kling(200, success(name)),
        })]
    }

    /// The body of a create, which depends on nothing but its name.
    fn order(&self, kind: Kind, name: &str) -> String {
        let number = name.rsplit('-').next().unwrap_or_default();
        let mut rng = Rng::with_seed(number.parse().expect("a number"));
        let size = match kind {
            Kind::Upload | Kind::HalfSent => rng.usize(1 << 20..4 << 20),
            Kind::HungUp => rng.usize(..100_000),
            _ => 1_000,
        };
        let start = rng.usize(..self.pixels.len() - size);
        let image = &self.pixels[start..start + size];
        format!(r#"{{"external_task_id":"{name}","image":"{image}"}}"#)
    }

    fn request(&self, kind: Kind, name: &str) -> Vec<u8> {
        let path = format!("/v1/videos/{name}");
        if kind.is_read() {
            get(&path)
        } else {
            post(&path, self.order(kind, name))
        }
    }

    /// Closes a request that was answered, if that is the answer it must have.
    fn close(&self, kind: Kind, name: &str, answer: &Message) -> bool {
        let open = self.books().open.remove(name).is_some();
        let failed = |status, code, retryable| {
            documented(answer) == Some(retryable) && answer.refusal() == (status, code)
        };
        match kind {
            Kind::Rejected => !open && failed(400, 1201, false),
            Kind::Broken => !open && failed(500, 9103, false),
            Kind::Busy if open => failed(429, 1303, true),
            Kind::Download => answer.status() == 200 && answer.body == self.pixels.as_bytes(),
            _ => {
                let well = answer.status() == 200 && answer.text() == success(name);
                well && open == kind.is_read()
            }
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap()
    }
}

// === impl Client ===

impl Client<'_> {
    /// Goes on until it is over. Returns how many requests of each kind it made.
    fn run(mut self, over: &AtomicBool) -> BTreeMap<Kind, usize> {
        let mut requests = BTreeMap::new();
        while !over.load(Relaxed) {
            let kind = self.rng.choice(MIX).expect("a kind");
            self.go(kind);
            *requests.entry(kind).or_default() += 1;
            thread::sleep(PAUSE.mul_f64(2.0 * self.rng.f64()));
        }
        requests
    }

    fn go(&mut self, kind: Kind) {
        let name = format!("{kind:?}-{}", self.rng.u64(..));
        let request = self.kling.request(kind, &name);
        let kept = self.kept.take();
        let mut connection = kept.unwrap_or_else(|| Connection::to(self.proxy));
        let part = match kind {
            Kind::Silent => self.rng.usize(..request.len()),
            Kind::HalfSent => request.len() / 2,
            _ => request.len(),
        };
        if part == request.len() {
            self.kling.books().open.insert(name.clone(), kind);
        }
        if kind == Kind::Slow {
            for piece in request.chunks(part / 10) {
                connection.send(piece);
                thread::sleep(SLOWNESS / 10);
            }
        } else {
            connection.send(&request[..part]);
        }
        match kind {
            Kind::Silent => thread::sleep(SLOWNESS),
            Kind::HalfSent | Kind::HungUp => {}
            Kind::HalfRead => {
                assert_eq!(connection.head().status(), 200, "{name}");
                self.kling.books().open.remove(&name);
            }
            _ => {
                let answer = connection.try_answer();
                let answer = answer.unwrap_or_else(|error| panic!("no answer to {name}: {error}"));
                let well = self.kling.close(kind, &name, &answer);
                assert!(well, "another answer than that to {name}: {}", answer.head);
                self.kept = Some(connection);
            }
        }
    }
}

// === impl Report ===

impl Report {
    fn note(&mut self, proxy: &Proxy) {
        self.memory.push(proxy.memory("VmRSS"));
        self.descriptors.push(descriptors(proxy));
    }

    /// The mean of each third.
    fn memory(&self) -> [usize; 3] {
        thirds(&self.memory).map(|third| third.iter().sum::<usize>() / third.len())
    }

    /// The most in each third.
    fn descriptors(&self) -> [usize; 3] {
        thirds(&self.descriptors).map(|third| *third.iter().max().expect("a second"))
    }
}

impl Display for Report {
    fn fmt(&self, to: &mut Formatter<'_>) -> fmt::Result {
        let requests: usize = self.requests.values().sum();
        let [first, middle, last] = self.memory().map(|bytes| bytes >> 10);
        let [early, later, late] = self.descriptors();
        writeln!(to, "seconds          {:>8}", self.memory.len())?;
        writeln!(to, "requests         {requests:>8}")?;
        for (kind, count) in &self.requests {
            writeln!(to, "  {:<14} {count:>8}", format!("{kind:?}"))?;
        }
        writeln!(to, "tasks            {:>8}", self.tasks)?;
        writeln!(to, "peak, KiB        {:>8}", self.peak >> 10)?;
        writeln!(to, "mean RSS, KiB    {first:>8} {middle:>8} {last:>8}")?;
        write!(to, "most descriptors {early:>8} {later:>8} {late:>8}")
    }
}

fn thirds(samples: &[usize]) -> [&[usize]; 3] {
    let size = samples.len() / 3;
    [0, 1, 2].map(|index| &samples[index * size..][..size])
}

fn success(name: &str) -> String {
    let data = json!({ "task_id": format!("task-of-{name}") });
    json!({ "code": 0, "message": "SUCCEED", "request_id": "up", "data": data }).to_string()
}

fn descriptors(proxy: &Proxy) -> usize {
    proxy.path("fd").read_dir().unwrap().count()
}

/// Descriptors of the proxy that upstream knows nothing of.
fn descriptors_of_clients(proxy: &Proxy, upstream: &Upstream) -> usize {
    let seen = upstream.seen();
    (descriptors(proxy) + seen.closed).saturating_sub(seen.connections)
}

/// Has all clients go on for so long.
fn load(kling: &Kling, proxy: &Proxy, seconds: usize, rng: &mut Rng) -> Report {
    let over = AtomicBool::new(false);
    let mut report = Report::default();
    thread::scope(|scope| {
        let start = |_| {
            let client = Client {
                kling,
                proxy: proxy.address,
                kept: None,
                rng: rng.fork(),
            };
            scope.spawn(|| client.run(&over))
        };
        let clients: Vec<_> = (0..CLIENTS).map(start).collect();
        // Nobody ends before it is over, but one whose request went wrong.
        while report.memory.len() < seconds && !clients.iter().any(ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_secs(1));
            report.note(proxy);
        }
        over.store(true, Relaxed);
        for (kind, count) in clients.into_iter().flat_map(|each| each.join().unwrap()) {
            *report.requests.entry(kind).or_default() += count;
        }
    });
    report.tasks = kling.books().tasks;
    report.peak = proxy.memory("VmHWM");
    report
}

#[test]
#[expect(clippy::print_stdout, reason = "half an hour should tell more than ok")]
fn mixed_load_loses_no_request_and_leaves_nothing_behind() {
    let seed = given("SOAK_SEED").unwrap_or(SEED);
    let (asked, mut rng) = (given("SOAK_SECONDS"), Rng::with_seed(seed));
    let seconds = asked.unwrap_or_default().max(SECONDS);
    println!("SOAK_SEED={seed} SOAK_SECONDS={seconds}");
    let upstream = Upstream::tls("h2,http/1.1");
    let kling = Kling::at(&upstream, &mut rng);
    // As it is by default: a connection stays ready.
    let proxy = Proxy::to(&upstream)
        .setting("upstream.keep_warm", "")
        .start();
    eventually("ready", || proxy.admin("/health/ready").status() == 200);
    let at_first = descriptors_of_clients(&proxy, &upstream);

    let report = load(&kling, &proxy, seconds.try_into().unwrap(), &mut rng);
    println!("{report}");
    eventually("no client has left a descriptor", || {
        descriptors_of_clients(&proxy, &upstream) <= at_first
    });
    // What goes on without its client ends before the proxy does.
    proxy.signal(Signal::TERM);
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(!log.contains("panicked"), "a panic is logged");
    let mut books = kling.books();
    // Not sent any more, since its client was gone.
    books.open.retain(|name, _| {
        let named = format!(r#""task.external_id":"{name}""#);
        let mut lines = log.lines().filter(|line| line.contains("no task was made"));
        !lines.any(|line| line.contains(&named))
    });
    assert_eq!(books.open, BTreeMap::new(), "lost");
    let told = log.matches(r#""task.id":"#).count();
    assert_eq!(told, books.tasks, "tasks that the log names");
    assert!(report.peak < MEMORY, "peak of {} bytes", report.peak);
    if asked.is_some() {
        let [_, middle, last] = report.descriptors();
        assert!(last <= middle + CHANCE, "descriptors grow");
        let [_, middle, last] = report.memory();
        assert!(last * 100 <= middle * 105, "memory grows");
    }
}

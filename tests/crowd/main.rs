//! Ten thousand connections, most of them hostile: whoever is not gets answers all the same.
//!
//! A target of its own, which runs alone: other tests would wait for the machine.

#[allow(
    dead_code,
    unused_imports,
    reason = "the black-box tests use all of it"
)]
#[path = "../black_box/support/mod.rs"]
mod support;

use std::{fs, io, net::SocketAddr, thread, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    runtime,
    sync::oneshot,
    time::{Instant, sleep},
};

use support::{
    Connection, Proxy, SUCCESS, Upstream, closed, kling, raise_descriptor_limit, request,
};

const HOSTILE: usize = 9_000;
const ORDINARY: usize = 1_000;
/// Descriptors for the ordinary clients, upstream and other tests.
const SPARE: usize = 4_000;
const TOKENS: &str = "hostile:hostile-token-01234\nordinary:ordinary-token-01234\n";
/// As long as it may take to be back to normal, and to connect so many.
const LONG: Duration = Duration::from_mins(1);
/// How often a junk token is shown.
const PAUSE: Duration = Duration::from_secs(5);

/// What a hostile client does.
#[derive(Clone, Copy)]
enum Attack {
    HalfHead,
    Trickle,
    StalledReader,
    JunkToken,
}

const ATTACKS: [Attack; 4] = [
    Attack::HalfHead,
    Attack::Trickle,
    Attack::StalledReader,
    Attack::JunkToken,
];

// === impl Attack ===

impl Attack {
    /// Attacks until the test ends, over one connection at a time. One that is turned away at least keeps
    /// a connection open.
    async fn run(self, proxy: SocketAddr) {
        // Each ends when the proxy has had enough.
        let _ = self.connect(proxy).await;
        loop {
            let _ = Self::HalfHead.connect(proxy).await;
        }
    }

    async fn connect(self, proxy: SocketAddr) -> io::Result<()> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(4096)?;
        let mut stream = socket.connect(proxy).await?;
        let token = "kling-proxy-token: hostile-token-01234";
        match self {
            Self::HalfHead => {
                stream.write_all(b"GET /v1/x HTTP/1.1\r\nhost: loc").await?;
                stream.read_u8().await?;
            }
            Self::Trickle => {
                let head = format!("{token}\ncontent-length: 1000000");
                stream.write_all(&request("POST /v1/x", &head, "")).await?;
                loop {
                    stream.write_all(b"a").await?;
                    sleep(Duration::from_secs(1)).await;
                }
            }
            Self::StalledReader => {
                stream.write_all(&request("GET /video", token, "")).await?;
                sleep(Duration::from_mins(2)).await;
            }
            Self::JunkToken => {
                let junk = format!("authorization: Bearer {}", "eyJ.".repeat(1_000));
                loop {
                    stream.write_all(&request("GET /v1/x", &junk, "")).await?;
                    let mut answer = [0; 2048];
                    if stream.read(&mut answer).await? == 0 {
                        return Ok(());
                    }
                    sleep(PAUSE).await;
                }
            }
        }
        Ok(())
    }
}

/// Answers `/video` without end, and all else with a success.
async fn upstream(mut stream: TcpStream) -> io::Result<()> {
    let piece = vec![b'a'; 64 << 10];
    let mut head = Vec::new();
    loop {
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await? == 0 {
                return Ok(());
            }
        }
        if head.starts_with(b"GET /video") {
            let endless = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n";
            stream.write_all(endless).await?;
            loop {
                stream.write_all(&piece).await?;
            }
        }
        stream.write_all(&kling(200, SUCCESS)).await?;
        head.clear();
    }
}

/// Runs in a thread of its own, until the sender is dropped.
fn start_upstream() -> (SocketAddr, oneshot::Sender<()>) {
    let (stop, stopped) = oneshot::channel();
    let (listener, _) = closed();
    listener.listen(4_096).unwrap();
    let listener = std::net::TcpListener::from(listener);
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    run(stopped, async move {
        let listener = TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(upstream(stream));
        }
    });
    (address, stop)
}

/// Attacks by turns, in a thread of its own, until the sender is dropped.
fn start_attacks(proxy: SocketAddr, hostile: usize) -> oneshot::Sender<()> {
    let (stop, stopped) = oneshot::channel();
    run(stopped, async move {
        for attack in ATTACKS.into_iter().cycle().take(hostile) {
            tokio::spawn(attack.run(proxy));
        }
        std::future::pending::<()>().await;
    });
    stop
}

fn run(stopped: oneshot::Receiver<()>, work: impl Future<Output = ()> + Send + 'static) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.unwrap();
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                () = work => {}
                _ = stopped => {}
            }
        });
    });
}

fn descriptors(proxy: &Proxy) -> usize {
    fs::read_dir(proxy.path("fd")).unwrap().count()
}

fn in_flight(proxy: &Proxy) -> f64 {
    proxy.metric("kling_proxy_requests_in_flight")
}

/// The places that the hostile client has held so far. On a busy machine not all are held at one time.
fn held(proxy: &Proxy) -> f64 {
    let metrics = proxy.admin("/metrics");
    let count = |name: &str| -> f64 {
        let samples = metrics.text().lines();
        let mut values = samples.filter_map(|line| line.strip_prefix(name));
        values
            .next()
            .map_or(0.0, |value| value.trim().parse().unwrap())
    };
    count("kling_proxy_client_requests_total{client=\"hostile\"}")
        - count("kling_proxy_guard_refusals_total{reason=\"overloaded\"}")
}

/// R16, R32, R33, R36, R37.
#[test]
fn nine_thousand_hostile_connections_keep_no_ordinary_client_from_its_answers() {
    // Where there may not be so many, fewer have to do.
    let hostile = HOSTILE.min(raise_descriptor_limit().saturating_sub(SPARE));
    let (address, _upstream) = start_upstream();
    let command = Proxy::to(&Upstream::ok()).setting("upstream.url", format!("http://{address}"));
    let file = command.file("tokens", TOKENS);
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    let poll = request("GET /v1/x", "kling-proxy-token: ordinary-token-01234", "");
    let mut ordinary: Vec<_> = (0..ORDINARY).map(|_| proxy.connect()).collect();
    let ask = |client: &mut Connection| {
        let begun = Instant::now();
        assert_eq!(client.send(&poll).answer().status(), 200);
        begun.elapsed()
    };
    for client in &mut ordinary {
        ask(client);
    }
    let before = proxy.memory("VmRSS");

    let enough = if hostile == HOSTILE { 500.0 } else { 1.0 };
    let attacks = start_attacks(proxy.address, hostile);
    let begun = Instant::now();
    // Those that hold a place are given up after a while, and keep a connection only.
    let (mut places, mut connections) = (0.0_f64, 0);
    while places < enough || connections < hostile + ORDINARY {
        places = held(&proxy).max(places);
        connections = descriptors(&proxy).max(connections);
        let waited = begun.elapsed();
        assert!(waited < LONG, "{places} places, {connections} connections");
        // Somebody else wants places all the time, and may not reach upstream, which is busy too.
        let _ = proxy.connect().send(&poll).try_answer();
        thread::sleep(Duration::from_millis(50));
    }
    // Other tests take the machine's time too, so of a few rounds one has to be good.
    let mut rounds = Vec::new();
    let is_good = (0..5).any(|_| {
        let mut took: Vec<_> = ordinary.iter_mut().map(ask).collect();
        took.sort();
        let health = Instant::now();
        assert_eq!(proxy.admin("/health/live").status(), 200);
        let round = [took[ORDINARY * 99 / 100], health.elapsed()];
        rounds.push(round);
        round.iter().all(|took| *took < Duration::from_secs(1))
    });
    assert!(is_good, "the slowest in a hundred, and health: {rounds:?}");
    let most = proxy.memory("VmHWM");
    assert!(most < 256 << 20, "{most} bytes");

    drop(attacks);
    let begun = Instant::now();
    let is_normal = |proxy: &Proxy| {
        in_flight(proxy) < 1.0
            && descriptors(proxy) < ORDINARY + 500
            && proxy.memory("VmRSS") < before + (32 << 20)
    };
    while !is_normal(&proxy) {
        assert!(begun.elapsed() < LONG, "not back to normal");
        for client in &mut ordinary {
            ask(client);
        }
    }
}

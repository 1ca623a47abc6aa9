//! Load client: kept HTTP/1.1 connections on one thread, each with one request at a time.
//!
//! Prints the results as one JSON object. With `--hold` it sends one request on each connection, one after
//! the other, prints the results, waits for a line on standard input, and does the same again on the same
//! connections.

use std::{
    error::Error,
    io::{self, ErrorKind, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use httparse::{EMPTY_HEADER, Status};
use hyper::Uri;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

/// Longest time for a response. A slower response is bad.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Parser)]
struct Arguments {
    /// URL that all requests go to.
    url: Uri,
    /// Trust root of an https URL.
    #[arg(long)]
    ca_file: Option<PathBuf>,
    /// Token to send as `Authorization: Bearer`.
    #[arg(long)]
    token: Option<String>,
    /// Sends a POST with a body of this many bytes.
    #[arg(long)]
    post: Option<usize>,
    /// Expected status. A response with another status is bad.
    #[arg(long, default_value_t = 200)]
    status: u16,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Seconds during which new requests are sent.
    #[arg(long, default_value_t = f64::INFINITY)]
    seconds: f64,
    /// Requests to send on each connection.
    #[arg(long, default_value_t = usize::MAX)]
    requests: usize,
    #[arg(long)]
    hold: bool,
}

/// Target of the load, and the request to send.
struct Target {
    address: String,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    request: Vec<u8>,
    status: u16,
}

/// Connection, and the response that is being read from it.
struct Connection {
    stream: Box<dyn Stream>,
    answer: Vec<u8>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Latencies and failures of requests.
#[derive(Default)]
struct Tally {
    latencies: Vec<Duration>,
    bad: usize,
    why: Option<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let target = Arc::new(Target::new(&arguments)?);
    if arguments.hold {
        hold(&target, arguments.connections).await?;
        return Ok(());
    }
    let start = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..arguments.connections {
        let target = Arc::clone(&target);
        workers.spawn(work(target, arguments.requests, arguments.seconds));
    }
    let mut tally = Tally::default();
    while let Some(done) = workers.join_next().await {
        tally.merge(done?);
    }
    tally.print(start.elapsed())?;
    Ok(())
}

/// Sends requests on one connection. After a failure it opens a new one.
async fn work(target: Arc<Target>, requests: usize, seconds: f64) -> Tally {
    let start = Instant::now();
    let (mut tally, mut connection) = (Tally::default(), None);
    for _ in 0..requests {
        if start.elapsed().as_secs_f64() >= seconds {
            break;
        }
        tally.note(target.ask(&mut connection).await);
    }
    tally
}

async fn hold(target: &Target, connections: usize) -> io::Result<()> {
    let mut connections: Vec<_> = (0..connections).map(|_| None).collect();
    for again in [false, true] {
        if again {
            io::stdin().read_line(&mut String::new())?;
        }
        let (start, mut tally) = (Instant::now(), Tally::default());
        for connection in &mut connections {
            tally.note(target.ask(connection).await);
            if tally.bad > 0 {
                break;
            }
        }
        tally.print(start.elapsed())?;
    }
    Ok(())
}

// === impl Target ===

impl Target {
    fn new(arguments: &Arguments) -> Result<Self, Box<dyn Error>> {
        let authority = arguments.url.authority().ok_or("a URL without a host")?;
        let method = arguments.post.map_or("GET", |_| "POST");
        let mut head = vec![
            format!("{method} {} HTTP/1.1", arguments.url.path()),
            format!("host: {authority}"),
        ];
        if let Some(token) = &arguments.token {
            head.push(format!("authorization: Bearer {token}"));
        }
        let mut body = String::new();
        if let Some(size) = arguments.post {
            let image = "A".repeat(size.saturating_sub(r#"{"image":""}"#.len()));
            body = format!(r#"{{"image":"{image}"}}"#);
            head.push("content-type: application/json".to_owned());
            head.push(format!("content-length: {}", body.len()));
        }
        let tls = arguments.ca_file.as_ref().map(|file| {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(file)?)?;
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let tls = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
            let name = ServerName::try_from(authority.host().to_owned())?;
            Ok::<_, Box<dyn Error>>((TlsConnector::from(Arc::new(tls)), name))
        });
        Ok(Self {
            address: authority.as_str().replace("localhost", "127.0.0.1"),
            tls: tls.transpose()?,
            request: format!("{}\r\n\r\n{body}", head.join("\r\n")).into_bytes(),
            status: arguments.status,
        })
    }

    /// Sends the request and returns the latency of the response. Opens a connection if there is none. If
    /// the exchange fails, no connection is left.
    async fn ask(&self, connection: &mut Option<Connection>) -> io::Result<Duration> {
        let mut open = match connection.take() {
            Some(open) => open,
            None => timeout(PATIENCE, self.connect()).await??,
        };
        let start = Instant::now();
        let status = timeout(PATIENCE, open.exchange(&self.request)).await??;
        let latency = start.elapsed();
        *connection = Some(open);
        if status == self.status {
            Ok(latency)
        } else {
            Err(io::Error::other(format!("status {status}")))
        }
    }

    async fn connect(&self) -> io::Result<Connection> {
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(tcp),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), tcp).await?),
        };
        let answer = Vec::with_capacity(2048);
        Ok(Connection { stream, answer })
    }
}

// === impl Connection ===

impl Connection {
    /// Sends a request, reads the whole response and returns its status.
    async fn exchange(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        self.answer.clear();
        loop {
            if self.stream.read_buf(&mut self.answer).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if let Some((status, length)) = measure(&self.answer)?
                && self.answer.len() >= length
            {
                return Ok(status);
            }
        }
    }
}

/// Returns the status of a response and its length with the body, once the head is complete.
fn measure(answer: &[u8]) -> io::Result<Option<(u16, usize)>> {
    let mut headers = [EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut headers);
    let Status::Complete(head) = parsed.parse(answer).map_err(io::Error::other)? else {
        return Ok(None);
    };
    let mut headers = parsed.headers.iter();
    let body = headers
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| str::from_utf8(header.value).ok()?.parse::<usize>().ok())
        .ok_or_else(|| io::Error::other("an answer without content-length"))?;
    Ok(Some((parsed.code.unwrap_or_default(), head + body)))
}

// === impl Tally ===

impl Tally {
    fn note(&mut self, outcome: io::Result<Duration>) {
        match outcome {
            Ok(latency) => self.latencies.push(latency),
            Err(error) => {
                self.bad += 1;
                self.why = Some(error.to_string());
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.bad += other.bad;
        self.why = self.why.take().or(other.why);
    }

    fn print(&mut self, took: Duration) -> io::Result<()> {
        self.latencies.sort_unstable();
        let requests = self.latencies.len();
        let p99 = self.latencies.get(requests * 99 / 100);
        let report = json!({
            "requests": requests,
            "seconds": took.as_secs_f64(),
            "p99": p99.map(Duration::as_secs_f64),
            "bad": self.bad,
            "why": self.why,
        });
        writeln!(io::stdout(), "{report}")
    }
}

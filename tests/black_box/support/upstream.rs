//! A strict Kling: records every request, complains of illegal requests, and responds by a script.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs, future,
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    path::PathBuf,
    pin::pin,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::sync::Notify;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    ACCESS_KEY, Credential, Issued, Message, PATIENCE, Root, SECRET_KEY, distance::delay, kling,
    reply, tls::provider,
};

/// Body of a success from Kling.
pub const SUCCESS: &str =
    r#"{"code":0,"message":"SUCCEED","request_id":"up-1","data":{"task_id":"829836802793406551"}}"#;

/// Step of a scripted response.
pub enum Step {
    Send(Vec<u8>),
    Wait(Gate),
    /// Sends no more, and keeps the connection until the proxy gives up.
    Hang,
    Close,
    /// Breaks off the connection without notice. With HTTP/2 it is only the stream.
    Reset,
    /// Ends the sending side and reads on. With HTTP/2 it is GOAWAY.
    HalfClose,
}

/// Holds an upstream back until the test opens it.
#[derive(Clone, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

/// Everything that an upstream has seen so far.
#[derive(Clone, Default)]
pub struct Seen {
    pub connections: usize,
    /// Connections among them that speak HTTP/2.
    pub shared: usize,
    /// Connections that ended: idle, in the middle of a request or during [`Step::Hang`].
    pub closed: usize,
    /// Bytes of requests, with their framing.
    pub bytes: usize,
    /// Requests that have arrived completely.
    pub requests: Vec<Message>,
    complaints: BTreeSet<String>,
    /// True if requests are only checked and answered, not kept.
    forgetful: bool,
}

/// Upstream on a port of its own. Dropping it fails the test if any request was illegal.
pub struct Upstream {
    pub url: String,
    /// Trust root of an upstream that speaks TLS.
    pub ca_file: Option<PathBuf>,
    shared: Arc<Shared>,
    _folder: TempDir,
}

type Script = Arc<dyn Fn(&Message) -> Vec<Step> + Send + Sync>;
type Interruption = Arc<dyn Fn(usize, &str) -> Option<usize> + Send + Sync>;

struct Shared {
    authority: String,
    /// Accepted credentials. One of them is enough.
    credentials: Mutex<Vec<Credential>>,
    script: Mutex<Script>,
    interruption: Mutex<Interruption>,
    /// Number of connections so far. Each connection gets a number.
    numbered: AtomicUsize,
    seen: Mutex<Seen>,
    changed: Condvar,
}

/// Requests to end an HTTP/2 connection.
#[derive(Default)]
struct Ending {
    close: Notify,
    go_away: Notify,
}

/// Counts bytes as they are read.
struct Counted<'a, S>(S, &'a Shared);

pub fn send(bytes: impl AsRef<[u8]>) -> Step {
    Step::Send(bytes.as_ref().to_vec())
}

// === impl Gate ===

impl Gate {
    pub fn opened() -> Self {
        let gate = Self::default();
        gate.open();
        gate
    }

    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    pub fn wait(&self) {
        let (open, opened) = &*self.0;
        let closed = open.lock().unwrap();
        drop(
            opened
                .wait_timeout_while(closed, PATIENCE, |open| !*open)
                .unwrap(),
        );
    }
}

// === impl Upstream ===

impl Upstream {
    /// Responds to every request with Kling's success, until the test sets another script.
    pub fn ok() -> Self {
        Self::expecting(Credential::Pair(ACCESS_KEY, SECRET_KEY))
    }

    pub fn expecting(credential: Credential) -> Self {
        Self::start(credential, None, None)
    }

    /// Speaks TLS as `localhost`, with `http/1.1`, `h2`, or either: `h2,http/1.1`.
    pub fn tls(protocol: &str) -> Self {
        Self::start(
            Credential::Pair(ACCESS_KEY, SECRET_KEY),
            Some(protocol),
            None,
        )
    }

    /// Speaks TLS too, but the test itself checks the credential of a request.
    pub fn lenient(protocol: &str) -> Self {
        Self::start(Credential::Any, Some(protocol), None)
    }

    /// Is like [`Self::lenient`], but so far away that each direction takes `way`.
    pub fn far_away(protocol: &str, way: Duration) -> Self {
        Self::start(Credential::Any, Some(protocol), Some(way))
    }

    /// Responds to every request with these bytes from now on, and to HEAD with an empty success.
    pub fn answer(&self, bytes: Vec<u8>) {
        self.script(move |request| match request.method() {
            "HEAD" => vec![send(reply(200, "", ""))],
            _ => vec![send(&bytes)],
        });
    }

    pub fn script(&self, script: impl Fn(&Message) -> Vec<Step> + Send + Sync + 'static) {
        *self.shared.script.lock().unwrap() = Arc::new(script);
    }

    /// Accepts any of these credentials from now on, and no other.
    pub fn expect(&self, credentials: impl Into<Vec<Credential>>) {
        *self.shared.credentials.lock().unwrap() = credentials.into();
    }

    /// Calls `when` from now on, which decides to break off a connection, after the given number of further
    /// bytes. Its arguments are the number of the connection and the first line of a request that has begun
    /// to arrive. The line is empty for a new connection, which waits for the decision, even before the TLS
    /// handshake.
    pub fn interrupt(&self, when: impl Fn(usize, &str) -> Option<usize> + Send + Sync + 'static) {
        *self.shared.interruption.lock().unwrap() = Arc::new(when);
    }

    /// Holds back every success from now on, until the gate is open.
    pub fn hold(&self) -> Gate {
        let gate = Gate::default();
        let held = gate.clone();
        self.script(move |_| vec![Step::Wait(held.clone()), send(kling(200, SUCCESS))]);
        gate
    }

    /// Keeps no request from now on, because there will be too many.
    pub fn forget(&self) {
        self.shared.seen().forgetful = true;
    }

    /// Waits until enough was seen, and returns everything that was. Fails the test if that never happens.
    pub fn wait(&self, enough: impl Fn(&Seen) -> bool) -> Seen {
        let Shared { seen, changed, .. } = &*self.shared;
        let seen = seen.lock().unwrap();
        let waited = changed.wait_timeout_while(seen, PATIENCE, |seen| !enough(seen));
        let (seen, timeout) = waited.unwrap();
        assert!(
            !timeout.timed_out(),
            "waited in vain after {:?}",
            seen.requests
        );
        seen.clone()
    }

    pub fn seen(&self) -> Seen {
        self.shared.seen().clone()
    }

    /// Returns the latest whole request.
    pub fn last(&self) -> Message {
        self.shared
            .seen()
            .requests
            .last()
            .cloned()
            .unwrap_or_default()
    }

    pub fn first_lines(&self) -> Vec<String> {
        let seen = self.shared.seen();
        seen.requests
            .iter()
            .map(|request| request.first_line().to_owned())
            .collect()
    }

    fn start(credential: Credential, tls: Option<&str>, way: Option<Duration>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (scheme, host) = tls.map_or(("http", "127.0.0.1"), |_| ("https", "localhost"));
        let address = listener.local_addr().unwrap();
        let address = way.map_or(address, |way| delay(address, way));
        let authority = format!("{host}:{}", address.port());
        let url = format!("{scheme}://{authority}");
        let shared = Arc::new(Shared {
            authority,
            credentials: Mutex::new(vec![credential]),
            script: Mutex::new(Arc::new(|_| Vec::new())),
            interruption: Mutex::new(Arc::new(|_, _| None)),
            numbered: AtomicUsize::new(0),
            seen: Mutex::default(),
            changed: Condvar::new(),
        });
        let folder = TempDir::new().unwrap();
        let config = tls.map(|protocol| {
            let (root, config) = server(protocol);
            fs::write(folder.path().join("ca.pem"), root.pem()).unwrap();
            Arc::new(config)
        });
        let ca_file = config.is_some().then(|| folder.path().join("ca.pem"));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || match config {
            Some(config) if config.alpn_protocols.contains(&b"h2".to_vec()) => {
                accepting.accept_http2(listener, &config);
            }
            config => accepting.accept(&listener, config.as_ref()),
        });
        let upstream = Self {
            url,
            ca_file,
            shared,
            _folder: folder,
        };
        upstream.answer(kling(200, SUCCESS));
        upstream
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !thread::panicking() {
            let complaints = self.seen().complaints;
            assert_eq!(complaints, BTreeSet::new(), "upstream refused a request");
        }
    }
}

// === impl Shared ===

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    fn note(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changed.notify_all();
    }

    fn interruption(&self, connection: usize, first_line: &str) -> Option<usize> {
        let when = Arc::clone(&self.interruption.lock().unwrap());
        when(connection, first_line)
    }

    fn number(&self) -> usize {
        self.numbered.fetch_add(1, Relaxed)
    }

    fn steps(&self, request: Message) -> Vec<Step> {
        let script = Arc::clone(&self.script.lock().unwrap());
        let steps = script(&request);
        self.record(request);
        steps
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, tls: Option<&Arc<ServerConfig>>) {
        while let Ok((stream, _)) = listener.accept() {
            let (shared, tls) = (Arc::clone(self), tls.cloned());
            shared.note(|seen| seen.connections += 1);
            thread::spawn(move || {
                let socket = stream.try_clone().unwrap();
                let number = shared.number();
                // If the proxy has disconnected, that is no complaint: tests check what arrived.
                let _ = if shared.interruption(number, "").is_some() {
                    reset(&socket)
                } else if let Some(config) = tls {
                    let session = ServerConnection::new(config).unwrap();
                    shared.serve(StreamOwned::new(session, stream), &socket, number)
                } else {
                    shared.serve(stream, &socket, number)
                };
                shared.note(|seen| seen.closed += 1);
            });
        }
    }

    fn serve(
        &self,
        stream: impl Read + Write,
        socket: &TcpStream,
        connection: usize,
    ) -> io::Result<()> {
        let mut wire = BufReader::new(Counted(stream, self));
        loop {
            let begun = String::from_utf8_lossy(wire.fill_buf()?).into_owned();
            if begun.is_empty() {
                return Ok(());
            }
            let first_line = begun.lines().next().unwrap_or_default();
            if let Some(more) = self.interruption(connection, first_line) {
                io::copy(&mut wire.by_ref().take(more as u64), &mut io::sink())?;
                return reset(socket);
            }
            let Some(mut request) = Message::read_head(&mut wire)? else {
                return Ok(());
            };
            request.read_body(&mut wire)?;
            request.connection = connection;
            for step in self.steps(request) {
                match step {
                    Step::Send(bytes) => wire.get_mut().0.write_all(&bytes)?,
                    Step::Wait(gate) => gate.wait(),
                    Step::Hang => return wire.read(&mut [0]).map(drop),
                    Step::Close => return Ok(()),
                    Step::Reset => return reset(socket),
                    Step::HalfClose => socket.shutdown(Shutdown::Write)?,
                }
            }
        }
    }

    /// Accepts connections for HTTP/2, which hyper serves. Their requests are recorded in the form of
    /// HTTP/1.
    #[tokio::main(flavor = "current_thread")]
    async fn accept_http2(self: Arc<Self>, listener: TcpListener, config: &Arc<ServerConfig>) {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let tls = TlsAcceptor::from(Arc::clone(config));
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(Arc::clone(&self).shake_hands(stream, tls.clone()));
        }
    }

    async fn shake_hands(self: Arc<Self>, stream: tokio::net::TcpStream, tls: TlsAcceptor) {
        let (asked, connection) = (Arc::clone(&self), self.number());
        let interruption = move || asked.interruption(connection, "");
        if let Ok(Some(_)) = tokio::task::spawn_blocking(interruption).await {
            return SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
        }
        let Ok(stream) = tls.accept(stream).await else {
            return;
        };
        self.note(|seen| seen.connections += 1);
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.note(|seen| seen.shared += 1);
            self.serve_http2(stream, connection).await;
        } else {
            let (stream, session) = stream.into_inner();
            let stream = stream.into_std().unwrap();
            stream.set_nonblocking(false).unwrap();
            thread::spawn(move || {
                let socket = stream.try_clone().unwrap();
                let _ = self.serve(StreamOwned::new(session, stream), &socket, connection);
                self.note(|seen| seen.closed += 1);
            });
        }
    }

    async fn serve_http2(self: Arc<Self>, stream: TlsStream<tokio::net::TcpStream>, number: usize) {
        let ending = Arc::new(Ending::default());
        let told = Arc::clone(&ending);
        let shared = Arc::clone(&self);
        let service = service_fn(move |request| {
            let (shared, ending) = (Arc::clone(&shared), Arc::clone(&ending));
            async move { shared.answer_http2(request, number, &ending).await }
        });
        let connection = http2::Builder::new(TokioExecutor::new());
        let mut connection = pin!(connection.serve_connection(TokioIo::new(stream), service));
        // Any end is fine here, because tests check what arrived.
        let _ = tokio::select! {
            ended = &mut connection => ended,
            () = told.close.notified() => Ok(()),
            () = told.go_away.notified() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        self.note(|seen| seen.closed += 1);
    }

    /// Answers a request. An error resets the stream.
    async fn answer_http2(
        self: Arc<Self>,
        request: Request<Incoming>,
        connection: usize,
        ending: &Ending,
    ) -> io::Result<Response<BoxBody<Bytes, io::Error>>> {
        let (parts, body) = request.into_parts();
        let target = parts.uri.path_and_query().unwrap();
        let authority = parts.uri.authority().unwrap();
        let first_line = format!("{} {target} HTTP/2", parts.method);
        let mut head = format!("{first_line}\r\nhost: {authority}\r\n");
        for (name, value) in &parts.headers {
            write!(head, "{name}: {}\r\n", value.to_str().unwrap()).unwrap();
        }
        if self.interruption(connection, &first_line).is_some() {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let body = body.collect().await.map_err(io::Error::other)?;
        let body = body.to_bytes().to_vec();
        let mut answer = Vec::new();
        let request = Message {
            head,
            body,
            connection,
        };
        for step in self.steps(request) {
            match step {
                Step::Send(bytes) => answer.extend(bytes),
                Step::Wait(gate) => tokio::task::spawn_blocking(move || gate.wait()).await?,
                Step::Hang => future::pending().await,
                Step::Close => ending.close.notify_one(),
                Step::Reset => return Err(io::ErrorKind::ConnectionReset.into()),
                Step::HalfClose => ending.go_away.notify_one(),
            }
        }
        in_http2(&answer)
    }

    fn judge(&self, request: &Message) -> Result<(), String> {
        let credentials = self.credentials.lock().unwrap().clone();
        let verdicts = credentials.into_iter().map(|each| each.judge(request));
        verdicts.reduce(Result::or).expect("a credential")
    }

    fn record(&self, request: Message) {
        let verdict = match request.values("host")[..] {
            [host] if host == self.authority => self.judge(&request),
            ref hosts => Err(format!("want the host {}, got {hosts:?}", self.authority)),
        };
        self.note(|seen| {
            if let Err(complaint) = verdict {
                seen.complaints
                    .insert(format!("{}: {complaint}", request.first_line()));
            }
            if !seen.forgetful {
                seen.requests.push(request);
            }
        });
    }
}

// === impl Counted ===

impl<S: Read> Read for Counted<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.note(|seen| seen.bytes += count);
        Ok(count)
    }
}

/// Makes the last owner close the connection by RST. Data sent shortly before may never arrive.
fn reset(socket: &TcpStream) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Turns an HTTP/1 response into HTTP/2. The stream is reset if the body is shorter than its length.
fn in_http2(mut answer: &[u8]) -> io::Result<Response<BoxBody<Bytes, io::Error>>> {
    let mut message = Message::read_head(&mut answer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let came = Bytes::copy_from_slice(answer);
    let ended = message.read_body(&mut answer);
    let mut response = Response::builder().status(message.status());
    for (name, value) in message.headers() {
        response = response.header(name, value);
    }
    let body = match ended {
        Ok(()) => {
            let whole = Full::from(message.body);
            whole.map_err(|never| match never {}).boxed()
        }
        Err(error) => {
            let frames = [Ok(Frame::data(came)), Err(error)];
            StreamBody::new(stream::iter(frames)).boxed()
        }
    };
    response.body(body).map_err(io::Error::other)
}

/// Returns the TLS configuration of `localhost`, and the root that signs its certificate.
pub fn server(protocol: &str) -> (Root, ServerConfig) {
    let root = Root::new();
    let Issued { certificate, key } = root.issue("localhost");
    let key = key.serialize_der().try_into().unwrap();
    let config = ServerConfig::builder_with_provider(provider());
    let config = config
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth();
    let chain = vec![certificate.der().clone()];
    let mut config = config.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = protocol.split(',').map(Into::into).collect();
    (root, config)
}

//! HTTP/2 upstream that is controlled by the test, frame by frame.
//!
//! On its own it only acknowledges SETTINGS and PING, refuses streams above its limit, and keeps the window
//! of the connection open. It opens windows of streams and responds to requests only if the test calls for
//! that. It does not read header blocks: tests tell requests apart by order, stream and body.
//! [`Upstream`](super::Upstream) checks the headers.

use std::{
    fmt::Write as _,
    fs,
    io::{self, BufReader, Read, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
};

use rustls::{ServerConfig, ServerConnection};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{
    Command, PATIENCE,
    frame::{self, Frame},
    upstream::server,
};

/// Settings that each connection begins with.
#[derive(Clone, Copy)]
pub struct Offer {
    /// Most streams at once (`SETTINGS_MAX_CONCURRENT_STREAMS`).
    pub streams: u32,
    /// Bytes of a request body that may be sent before the window opens (`SETTINGS_INITIAL_WINDOW_SIZE`).
    pub window: u32,
}

/// Everything that has arrived so far.
#[derive(Clone)]
pub struct Arrived {
    /// Connections whose TLS handshake succeeded.
    pub connections: Vec<Connection>,
    /// Requests in the order in which their heads arrived.
    pub streams: Vec<Stream>,
    begun: Instant,
    /// All events with their times, for the message of a failing test.
    pub history: String,
}

/// Connection of the proxy to this upstream.
#[derive(Clone, Default)]
pub struct Connection {
    /// True if the proxy has acknowledged the offer. From then on it keeps to the offer.
    pub settled: bool,
    pub closed: bool,
    /// Bytes of responses that the proxy has room for, on all streams together.
    pub room: i64,
    /// Bytes of a response that the proxy has room for on a new stream.
    initial: i64,
    /// Number of our PINGs that the proxy has answered.
    pongs: usize,
}

/// Request on a stream of its own.
#[derive(Clone)]
pub struct Stream {
    pub id: Id,
    /// Part of the body that has arrived.
    pub body: Vec<u8>,
    /// Time at which the end of the request arrived. Only then may the request be carried out.
    pub whole: Option<Instant>,
    /// Code with which the proxy reset the stream.
    pub reset: Option<u32>,
    /// Bytes of the response that the proxy has room for.
    pub room: i64,
    /// True if we refused the stream, by `RST_STREAM` or GOAWAY.
    refused: bool,
    /// True if we reset the stream, with any code.
    broken: bool,
    answered: bool,
}

/// Identifies a stream of a connection. Connections count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id {
    pub connection: usize,
    pub stream: u32,
}

/// Upstream on a port of its own that speaks HTTP/2 over TLS only.
pub struct FrameUpstream {
    url: String,
    ca_file: PathBuf,
    shared: Arc<Shared>,
    _folder: TempDir,
}

struct Shared {
    offer: Offer,
    arrived: Mutex<Arrived>,
    changed: Condvar,
    /// Sockets, in the order of the connections' numbers.
    wires: Mutex<Vec<Arc<Wire>>>,
}

/// Connection that one thread reads while any thread writes. The session is locked only while it works, not
/// while a thread waits for the socket to be readable.
struct Wire {
    socket: TcpStream,
    session: Mutex<ServerConnection>,
}

/// Most bytes of a response in one frame: RFC 9113 requires every peer to accept that many.
const DATA_SIZE: i64 = 16 << 10;
/// Window of every connection at its start, in bytes (RFC 9113, section 6.9.2).
const FIRST_ROOM: i64 = 65_535;

/// Reads and decrypts the bytes of a wire.
struct Incoming {
    wire: Arc<Wire>,
    encrypted: Vec<u8>,
}

// === impl Offer ===

impl Default for Offer {
    /// Returns the least number of streams that RFC 9113 recommends, and the initial window that it
    /// defines.
    fn default() -> Self {
        Self {
            streams: 100,
            window: 65_535,
        }
    }
}

// === impl Arrived ===

impl Arrived {
    /// Returns the whole requests that we have not refused. Each of them is a task, if it is a create.
    pub fn accepted(&self) -> Vec<&Stream> {
        let streams = self.streams.iter();
        streams
            .filter(|stream| stream.whole.is_some() && !stream.refused)
            .collect()
    }

    pub fn stream(&self, id: Id) -> &Stream {
        let mut streams = self.streams.iter();
        streams.find(|stream| stream.id == id).expect("a stream")
    }

    fn change(&mut self, id: Id, change: impl FnOnce(&mut Stream)) {
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.id == id) {
            change(stream);
        }
    }

    /// Notes that the proxy opened a window for responses: of a stream, or, with number 0, of the
    /// connection.
    fn take_room(&mut self, (connection, stream): (usize, u32), more: i64) {
        if stream == 0 {
            self.connections[connection].room += more;
        }
        self.change(Id { connection, stream }, |stream| stream.room += more);
    }

    /// Notes that bytes of a response are sent.
    fn use_room(&mut self, (connection, stream): (usize, u32), bytes: u32) {
        let bytes = i64::from(bytes);
        self.connections[connection].room -= bytes;
        self.change(Id { connection, stream }, |stream| stream.room -= bytes);
    }

    /// Counts the streams of a connection that neither side has ended.
    fn open(&self, connection: usize) -> usize {
        let of_it = |stream: &&Stream| stream.id.connection == connection;
        let streams = self.streams.iter().filter(of_it);
        streams.filter(|stream| stream.is_open()).count()
    }

    fn tell(&mut self, connection: usize, what: &str) {
        let time = self.begun.elapsed();
        writeln!(self.history, "{time:.3?} connection {connection}: {what}").unwrap();
    }
}

// === impl Stream ===

impl Stream {
    fn is_open(&self) -> bool {
        let over = self.whole.is_some() && self.answered;
        !over && !self.refused && !self.broken && self.reset.is_none()
    }
}

// === impl FrameUpstream ===

impl FrameUpstream {
    pub fn start(offer: Offer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!(
            "https://localhost:{}",
            listener.local_addr().unwrap().port()
        );
        let (root, config) = server("h2");
        let folder = TempDir::new().unwrap();
        let ca_file = folder.path().join("ca.pem");
        fs::write(&ca_file, root.pem()).unwrap();
        let arrived = Arrived {
            connections: Vec::new(),
            streams: Vec::new(),
            begun: Instant::now(),
            history: String::new(),
        };
        let shared = Arc::new(Shared {
            offer,
            arrived: Mutex::new(arrived),
            changed: Condvar::new(),
            wires: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        let config = Arc::new(config);
        thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let (shared, config) = (Arc::clone(&accepting), Arc::clone(&config));
                thread::spawn(move || shared.serve(socket, config));
            }
        });
        Self {
            url,
            ca_file,
            shared,
            _folder: folder,
        }
    }

    /// Returns a command for a proxy to this upstream, with keys.
    pub fn proxy(&self) -> Command {
        Command::new([])
            .origin(&self.url, Some(&self.ca_file))
            .keys()
    }

    /// Waits until enough has arrived, and returns everything that has. Fails the test if that never
    /// happens.
    #[track_caller]
    pub fn wait(&self, enough: impl Fn(&Arrived) -> bool) -> Arrived {
        let Shared {
            arrived, changed, ..
        } = &*self.shared;
        let guard = arrived.lock().unwrap();
        let waited = changed.wait_timeout_while(guard, PATIENCE, |arrived| !enough(arrived));
        let (guard, timeout) = waited.unwrap();
        let arrived = guard.clone();
        // A panic while the lock is held would fail the other threads too.
        drop(guard);
        assert!(!timeout.timed_out(), "waited in vain:\n{}", arrived.history);
        arrived
    }

    pub fn arrived(&self) -> Arrived {
        self.shared.arrived().clone()
    }

    /// Waits for the head of the `count`-th request.
    #[track_caller]
    pub fn begun(&self, count: usize) -> Id {
        self.wait(|arrived| arrived.streams.len() >= count).streams[count - 1].id
    }

    /// Waits until the `count`-th request is whole.
    #[track_caller]
    pub fn whole(&self, count: usize) -> Id {
        let id = self.begun(count);
        self.wait(|arrived| arrived.stream(id).whole.is_some());
        id
    }

    /// Sends a whole response, with status 200 and a JSON body.
    pub fn answer(&self, id: Id, body: &str) {
        let json = [("content-type", "application/json")];
        let frames = [
            Frame::answer(id.stream, 200, &json),
            Frame::data(id.stream, body.as_bytes(), true),
        ];
        self.shared.note(id.connection, "we answer", |arrived| {
            arrived.change(id, |stream| stream.answered = true);
        });
        self.shared.send(id.connection, &frames);
    }

    /// Sends the head of a response with these headers, and the beginning of its body.
    pub fn begin_answer(&self, id: Id, headers: &[(&str, &str)], beginning: &str) {
        let frames = [
            Frame::answer(id.stream, 200, headers),
            Frame::data(id.stream, beginning.as_bytes(), false),
        ];
        self.shared.send(id.connection, &frames);
    }

    /// Sends the head of a response without a body. Then resets the stream with this code, or ends it.
    pub fn break_off(&self, id: Id, headers: &[(&str, &str)], code: Option<u32>) {
        let end = match code {
            Some(code) => Frame::reset(id.stream, code),
            None => Frame::data(id.stream, b"", true),
        };
        self.shared.note(id.connection, "we break off", |arrived| {
            arrived.change(id, |stream| stream.broken = true);
        });
        let frames = [Frame::answer(id.stream, 200, headers), end];
        self.shared.send(id.connection, &frames);
    }

    /// Sends the rest of a response that has begun.
    pub fn finish_answer(&self, id: Id, rest: &str) {
        let frame = Frame::data(id.stream, rest.as_bytes(), true);
        self.shared.note(id.connection, "we answer", |arrived| {
            arrived.change(id, |stream| stream.answered = true);
        });
        self.shared.send(id.connection, &[frame]);
    }

    /// Sends more of a response's body until the proxy's window is full.
    #[track_caller]
    pub fn pour(&self, id: Id) {
        loop {
            let arrived = self.arrived();
            let Connection { room, closed, .. } = arrived.connections[id.connection];
            let room = room.min(arrived.stream(id).room).min(DATA_SIZE);
            if room == 0 || closed {
                return;
            }
            let data = vec![b'a'; usize::try_from(room).expect("the proxy's window is kept")];
            let frame = Frame::data(id.stream, &data, false);
            self.shared.send(id.connection, &[frame]);
            if room < DATA_SIZE {
                self.catch_up(id.connection);
            }
        }
    }

    /// Sends `times` empty frames of a response, while the connection lasts.
    pub fn say_nothing(&self, id: Id, times: usize) {
        let frames: Vec<_> = (0..times.min(1_000))
            .map(|_| Frame::data(id.stream, b"", false))
            .collect();
        let mut left = times;
        while left > 0 && !self.arrived().connections[id.connection].closed {
            let batch = left.min(frames.len());
            self.shared.send(id.connection, &frames[..batch]);
            left -= batch;
        }
    }

    /// Resets a stream with this code. Only `REFUSED_STREAM` means that the request was not carried out.
    pub fn reset(&self, id: Id, code: u32) {
        let what = format!("we reset stream {} with code {code}", id.stream);
        self.shared.note(id.connection, &what, |arrived| {
            arrived.change(id, |stream| {
                stream.refused |= code == frame::REFUSED_STREAM;
                stream.broken = true;
            });
        });
        self.shared
            .send(id.connection, &[Frame::reset(id.stream, code)]);
    }

    /// Opens the window for the rest of a request body.
    pub fn open_window(&self, id: Id) {
        let update = Frame::window_update(id.stream, 1 << 20);
        self.shared.send(id.connection, &[update]);
    }

    /// Refuses all streams of the connection above `last`, and all new streams.
    pub fn go_away(&self, connection: usize, last: u32) {
        let what = format!("we go away, last stream {last}");
        self.shared.note(connection, &what, |arrived| {
            for stream in &mut arrived.streams {
                let Id { stream: number, .. } = stream.id;
                stream.refused |= stream.id.connection == connection && number > last;
            }
        });
        self.shared.send(connection, &[Frame::go_away(last)]);
    }

    /// Waits until the proxy has read all that we sent over a connection, and has sent its reactions.
    #[track_caller]
    pub fn catch_up(&self, connection: usize) {
        // The response to a PING may be sent before other data of the same turn, but the next one may not.
        for _ in 0..2 {
            let before = self.arrived().connections[connection].pongs;
            self.shared.send(connection, &[Frame::ping()]);
            self.wait(|arrived| {
                let Connection { closed, pongs, .. } = arrived.connections[connection];
                closed || pongs > before
            });
        }
    }

    /// Closes a connection without notice.
    pub fn close(&self, connection: usize) {
        let wire = Arc::clone(&self.shared.wires()[connection]);
        // The proxy may have closed it before.
        let _ = wire.socket.shutdown(Shutdown::Both);
    }
}

impl Drop for FrameUpstream {
    /// Ends the threads that still wait for frames.
    fn drop(&mut self) {
        for wire in &*self.shared.wires() {
            let _ = wire.socket.shutdown(Shutdown::Both);
        }
    }
}

// === impl Shared ===

impl Shared {
    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        self.arrived.lock().unwrap()
    }

    fn wires(&self) -> MutexGuard<'_, Vec<Arc<Wire>>> {
        self.wires.lock().unwrap()
    }

    fn note(&self, connection: usize, what: &str, change: impl FnOnce(&mut Arrived)) {
        let mut arrived = self.arrived();
        arrived.tell(connection, what);
        change(&mut arrived);
        drop(arrived);
        self.changed.notify_all();
    }

    /// Sends all frames together. If the proxy has disconnected, that is no failure: tests check what
    /// arrived.
    fn send(&self, connection: usize, frames: &[Frame]) {
        let mut arrived = self.arrived();
        for frame in frames.iter().filter(|frame| frame.kind == frame::DATA) {
            arrived.use_room((connection, frame.stream), frame.size());
        }
        drop(arrived);
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
        let wire = Arc::clone(&self.wires()[connection]);
        let _ = wire.write(&bytes);
    }

    fn serve(&self, socket: TcpStream, config: Arc<ServerConfig>) {
        // A handshake for HTTP/1.1 fails, and does not count as a connection.
        let Ok(wire) = Wire::accept(socket, config).map(Arc::new) else {
            return;
        };
        let mut wires = self.wires();
        let connection = wires.len();
        wires.push(Arc::clone(&wire));
        // Notes connections in the order of their wires.
        self.note(connection, "opened", |arrived| {
            arrived.connections.push(Connection {
                room: FIRST_ROOM,
                initial: FIRST_ROOM,
                ..Connection::default()
            });
        });
        drop(wires);
        let ended = self.converse(connection, wire);
        let what = format!("closed: {ended:?}");
        self.note(connection, &what, |arrived| {
            arrived.connections[connection].closed = true;
        });
    }

    fn converse(&self, connection: usize, wire: Arc<Wire>) -> io::Result<()> {
        let Offer { streams, window } = self.offer;
        let settings = [
            (frame::MAX_CONCURRENT_STREAMS, streams),
            (frame::INITIAL_WINDOW_SIZE, window),
        ];
        self.send(connection, &[Frame::settings(&settings)]);
        let mut incoming = BufReader::new(Incoming {
            wire,
            encrypted: Vec::new(),
        });
        let mut preface = [0; frame::PREFACE.len()];
        incoming.read_exact(&mut preface)?;
        if preface != frame::PREFACE {
            return Err(io::Error::other("not HTTP/2"));
        }
        // Head whose last frame has not arrived yet.
        let mut head: Option<Frame> = None;
        loop {
            let frame = Frame::read(&mut incoming)?;
            match frame.kind {
                frame::HEADERS if frame.ends_headers() => self.begin(connection, &frame),
                frame::HEADERS => head = Some(frame),
                frame::CONTINUATION if frame.ends_headers() => {
                    let head = head.take().ok_or(io::ErrorKind::InvalidData)?;
                    self.begin(connection, &head);
                }
                frame::CONTINUATION => {}
                _ => self.take(connection, &frame),
            }
        }
    }

    /// Notes the head of a request. Refuses the request if too many streams are open.
    fn begin(&self, connection: usize, head: &Frame) {
        let id = Id {
            connection,
            stream: head.stream,
        };
        let mut refused = false;
        let what = format!("stream {}: HEADERS, end: {}", id.stream, head.ends_stream());
        self.note(connection, &what, |arrived| {
            refused = arrived.open(connection) >= self.offer.streams as usize;
            arrived.streams.push(Stream {
                id,
                body: Vec::new(),
                whole: head.ends_stream().then(Instant::now),
                reset: None,
                room: arrived.connections[connection].initial,
                refused,
                broken: false,
                answered: false,
            });
        });
        if refused {
            let reset = Frame::reset(id.stream, frame::REFUSED_STREAM);
            self.send(connection, &[reset]);
        }
    }

    /// Handles a frame of any other type.
    fn take(&self, connection: usize, frame: &Frame) {
        let stream = frame.stream;
        let id = Id { connection, stream };
        match frame.kind {
            frame::DATA => {
                let (size, end) = (frame.size(), frame.ends_stream());
                let what = format!("stream {stream}: DATA of {size} bytes, end: {end}");
                self.note(connection, &what, |arrived| {
                    arrived.change(id, |stream| {
                        stream.body.extend(frame.content());
                        stream.whole = end.then(Instant::now);
                    });
                });
                if size > 0 {
                    self.send(connection, &[Frame::window_update(0, size)]);
                }
            }
            frame::RST_STREAM => {
                let what = format!("stream {stream}: RST_STREAM, code {}", frame.code());
                self.note(connection, &what, |arrived| {
                    arrived.change(id, |stream| stream.reset = Some(frame.code()));
                });
            }
            frame::SETTINGS if frame.is_ack() => {
                self.note(connection, "settled", |arrived| {
                    arrived.connections[connection].settled = true;
                });
            }
            frame::PING if frame.is_ack() => self.note(connection, "PING returned", |arrived| {
                arrived.connections[connection].pongs += 1;
            }),
            frame::SETTINGS => {
                if let Some(room) = frame.setting(frame::INITIAL_WINDOW_SIZE) {
                    self.arrived().connections[connection].initial = room.into();
                }
                self.send(connection, &[frame.ack()]);
            }
            frame::PING => self.send(connection, &[frame.ack()]),
            frame::WINDOW_UPDATE => {
                let room = frame.increment().into();
                self.arrived().take_room((connection, stream), room);
            }
            frame::GOAWAY => self.note(connection, "GOAWAY", |_| ()),
            _ => {}
        }
    }
}

// === impl Wire ===

impl Wire {
    fn accept(mut socket: TcpStream, config: Arc<ServerConfig>) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        // From now on the test decides how long a silent peer may stay. It ends the connection at its own
        // end.
        socket.set_read_timeout(None)?;
        Ok(Self {
            socket,
            session: Mutex::new(session),
        })
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut session = self.session.lock().unwrap();
        session.writer().write_all(bytes)?;
        while session.wants_write() {
            session.write_tls(&mut &self.socket)?;
        }
        Ok(())
    }
}

// === impl Incoming ===

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut session = self.wire.session.lock().unwrap();
            match session.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            if self.encrypted.is_empty() {
                drop(session);
                let mut bytes = [0; 4096];
                let count = (&self.wire.socket).read(&mut bytes)?;
                if count == 0 {
                    return Ok(0);
                }
                self.encrypted.extend(&bytes[..count]);
            } else {
                let taken = session.read_tls(&mut &self.encrypted[..])?;
                self.encrypted.drain(..taken);
                session.process_new_packets().map_err(io::Error::other)?;
            }
        }
    }
}

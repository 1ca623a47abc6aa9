//! Kling in a run, with HTTP/1.1 or HTTP/2.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, server};
use http::{HeaderMap, Response};
use kling_proxy::internals::{Dial, Dialing as Opening, NoHttp1, Transport, Versions};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::time::sleep;

use crate::books::{Arrival, Entry, Name};
use crate::plan::{Dialing, Kind, Protocol, Reply};
use crate::world::World;

/// Opens connections to itself, as the plan decides.
pub(crate) struct Upstream {
    world: World,
    dials: AtomicUsize,
}

/// Request that has begun to arrive.
#[derive(Clone)]
struct Request {
    world: World,
    /// Name of the client's request, or `None` for a request of the proxy's own.
    name: Option<Name>,
    /// Index among the arrivals of this name.
    index: usize,
    reply: Reply,
}

/// Most unread bytes that a connection holds.
const BUFFER: usize = 64 << 10;
/// Longest pause that does not end a response, in milliseconds: a little less than `upstream.idle_timeout`.
const LONGEST_SILENCE: u64 = 29_000;
const AT_ONCE: Reply = Reply::Answer { after: 0, pause: 0 };

// === impl Upstream ===

impl Upstream {
    pub(crate) fn new(world: World) -> Self {
        let dials = AtomicUsize::new(0);
        Self { world, dials }
    }

    fn open(&self) -> Transport {
        let (io, stream) = duplex(BUFFER);
        let world = self.world.clone();
        let is_http2 = match world.plan.protocol {
            Protocol::Http1 => {
                tokio::spawn(serve_http1(world, stream));
                false
            }
            Protocol::Http2 { streams, window } => {
                tokio::spawn(serve_http2(world, stream, streams, window));
                true
            }
        };
        Transport {
            io: Box::new(io),
            is_http2,
        }
    }
}

impl Dial for Upstream {
    fn dial(&self, versions: Versions) -> Opening<'_> {
        let index = self.dials.fetch_add(1, Relaxed);
        let dials = &self.world.plan.dials;
        let dialing = dials.get(index).copied().unwrap_or(Dialing::Opens(0));
        Box::pin(async move {
            if versions == Versions::Http1 && !matches!(self.world.plan.protocol, Protocol::Http1) {
                return Err(NoHttp1("by plan".into()).into());
            }
            match dialing {
                Dialing::Opens(after) => {
                    sleep(Duration::from_millis(after)).await;
                    Ok(self.open())
                }
                Dialing::Refused(after) => {
                    sleep(Duration::from_millis(after)).await;
                    Err(io::Error::from(io::ErrorKind::ConnectionRefused).into())
                }
                Dialing::Silent => std::future::pending().await,
            }
        })
    }
}

// === impl Request ===

impl Request {
    fn begin(world: World, path: &str, try_: Option<&str>) -> Self {
        let wish = path.rsplit('/').next().and_then(|name| name.parse().ok());
        let name = wish.zip(try_.and_then(|try_| try_.parse().ok()));
        let now = world.now();
        let (index, reply) = world.note(|books| {
            let Some(name) = name else {
                return (0, AT_ONCE);
            };
            let seen = books.requests.range((name.0, 0)..(name.0 + 1, 0));
            let before: usize = seen.map(|(_, entry)| entry.arrivals.len()).sum();
            let reply = world.plan.wishes[name.0].replies.get(before);
            let entry = books.requests.get_mut(&name).unwrap();
            entry.arrivals.push(Arrival {
                begun: now,
                whole: None,
                answering: false,
                refused: false,
                task: None,
                answered: None,
            });
            (entry.arrivals.len() - 1, reply.copied().unwrap_or(AT_ONCE))
        });
        Self {
            world,
            name,
            index,
            reply,
        }
    }

    fn note(&self, change: impl FnOnce(&mut Arrival, u64)) {
        let now = self.world.now();
        self.world.note(|books| {
            let entry = self.name.and_then(|name| books.requests.get_mut(&name));
            if let Some(entry) = entry {
                change(&mut entry.arrivals[self.index], now);
            }
        });
    }

    /// Notes that the whole request has arrived.
    fn whole(&self) {
        self.note(|arrival, now| arrival.whole = Some(now));
    }

    fn refuse(&self) {
        self.note(|arrival, _| arrival.refused = true);
    }

    /// Makes a task, if it is a create.
    fn carry_out(&self) {
        let Some(name) = self.name else { return };
        let task = format!("task-{}-{}-{}", name.0, name.1, self.index);
        let is_create = |entry: &Entry| entry.kind == Kind::Create;
        if self.world.note(|books| is_create(&books.requests[&name])) {
            self.note(|arrival, _| arrival.task = Some(task));
        }
    }

    fn begin_answer(&self) {
        self.note(|arrival, _| arrival.answering = true);
    }

    /// Notes that the whole response will be written, after a pause inside it.
    fn answer(&self, pause: u64) {
        if pause < LONGEST_SILENCE {
            self.note(|arrival, now| arrival.answered = Some(now + pause));
        }
    }

    fn success(&self) -> String {
        let mut task = String::new();
        self.note(|arrival, _| task = arrival.task.clone().unwrap_or_default());
        format!(r#"{{"code":0,"message":"SUCCEED","data":{{"task_id":"{task}"}}}}"#)
    }
}

/// Returns status and body of an error.
fn refusal(code: u16) -> (u16, String) {
    let status = match code {
        1003 => 401,
        5000 => 500,
        5001 => 503,
        1201 => 400,
        _ => 429,
    };
    (status, format!(r#"{{"code":{code},"message":"no"}}"#))
}

async fn wait(milliseconds: u64) {
    sleep(Duration::from_millis(milliseconds)).await;
}

// === HTTP/1.1 ===

/// Serves a connection until it ends.
async fn serve_http1(world: World, stream: DuplexStream) {
    let mut stream = BufReader::new(stream);
    // Any end is fine: the plan decides it.
    while let Ok(true) = exchange_http1(&world, &mut stream).await {}
}

/// Answers one request. Returns true if another request may follow.
async fn exchange_http1(world: &World, stream: &mut BufReader<DuplexStream>) -> io::Result<bool> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            return Ok(false);
        }
    }
    let head = head.to_ascii_lowercase();
    let header = |name: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim_start_matches(':').trim())
    };
    let path = head.split(' ').nth(1).unwrap();
    let request = Request::begin(world.clone(), path, header("x-try"));
    match request.reply {
        Reply::LoseBefore | Reply::RefuseStream => return Ok(false),
        Reply::Early => {
            request.refuse();
            write_http1(stream, &refusal(1201)).await?;
            // Upstream reads no further, and the connection stays open.
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    let length = header("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    request.whole();
    match request.reply {
        Reply::Refuse { code, after } => {
            request.refuse();
            wait(after).await;
            write_http1(stream, &refusal(code)).await?;
            return Ok(true);
        }
        Reply::Fail { code, after } => {
            request.carry_out();
            wait(after).await;
            write_http1(stream, &refusal(code)).await?;
            return Ok(true);
        }
        _ => request.carry_out(),
    }
    let (after, pause, cut) = match request.reply {
        Reply::Answer { after, pause } => (after, pause, false),
        Reply::CutOff { after } => (after, 0, true),
        Reply::LoseAfter { after } => {
            wait(after).await;
            return Ok(false);
        }
        _ => {
            std::future::pending::<()>().await;
            return Ok(false);
        }
    };
    wait(after).await;
    let body = request.success();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let (first, last) = body.split_at(10);
    if !cut {
        request.answer(pause);
    }
    request.begin_answer();
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(first.as_bytes()).await?;
    wait(pause).await;
    if cut {
        return Ok(false);
    }
    stream.write_all(last.as_bytes()).await?;
    Ok(true)
}

async fn write_http1(
    stream: &mut BufReader<DuplexStream>,
    answer: &(u16, String),
) -> io::Result<()> {
    let (status, body) = answer;
    let answer = format!(
        "HTTP/1.1 {status} No\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await
}

// === HTTP/2 ===

/// Serves a connection until it ends.
async fn serve_http2(world: World, stream: DuplexStream, streams: u32, window: u32) {
    let connection = server::Builder::new()
        .max_concurrent_streams(streams)
        .initial_window_size(window)
        .handshake::<_, Bytes>(stream);
    let Ok(mut connection) = connection.await else {
        return;
    };
    // After the connection is lost, other requests on it get no response either.
    let lost = Arc::new(AtomicBool::new(false));
    while let Some(Ok((request, respond))) = connection.accept().await {
        let (head, body) = request.into_parts();
        let try_ = header(&head.headers, "x-try");
        let request = Request::begin(world.clone(), head.uri.path(), try_);
        if let Reply::LoseBefore = request.reply {
            lost.store(true, Relaxed);
            return;
        }
        tokio::spawn(exchange_http2(request, body, respond, Arc::clone(&lost)));
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

async fn exchange_http2(
    request: Request,
    mut body: RecvStream,
    mut respond: server::SendResponse<Bytes>,
    lost: Arc<AtomicBool>,
) {
    let refuse = |respond: &mut server::SendResponse<Bytes>, code| {
        let (status, text) = refusal(code);
        send_http2(respond, status, &text, None);
    };
    match request.reply {
        Reply::RefuseStream => {
            request.refuse();
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        Reply::Early => {
            request.refuse();
            refuse(&mut respond, 1201);
            // Upstream reads no further, and the stream stays open.
            return std::future::pending().await;
        }
        _ => {}
    }
    loop {
        match body.data().await {
            Some(Ok(data)) => {
                // The window stays closed for a moment.
                wait(1).await;
                let _ = body.flow_control().release_capacity(data.len());
            }
            Some(Err(_)) => return,
            None => break,
        }
    }
    request.whole();
    let (after, pause, cut) = match request.reply {
        Reply::Refuse { code, after } => {
            request.refuse();
            wait(after).await;
            return refuse(&mut respond, code);
        }
        Reply::Fail { code, after } => {
            request.carry_out();
            wait(after).await;
            return refuse(&mut respond, code);
        }
        Reply::LoseAfter { after } => {
            request.carry_out();
            wait(after).await;
            return respond.send_reset(Reason::INTERNAL_ERROR);
        }
        Reply::Answer { after, pause } => (after, pause, false),
        Reply::CutOff { after } => (after, 0, true),
        _ => {
            request.carry_out();
            return std::future::pending().await;
        }
    };
    request.carry_out();
    wait(after).await;
    let body = request.success();
    let (first, rest) = body.split_at(10);
    if !cut && !lost.load(Relaxed) {
        request.answer(pause);
    }
    request.begin_answer();
    let Some(mut stream) = send_http2(&mut respond, 200, first, Some(body.len())) else {
        return;
    };
    wait(pause).await;
    if lost.load(Relaxed) {
        request.note(|arrival, _| arrival.answered = None);
    }
    if cut {
        stream.send_reset(Reason::INTERNAL_ERROR);
    } else {
        let _ = stream.send_data(rest.to_owned().into(), true);
    }
}

/// Sends a response, or only the beginning of a response that has this length.
fn send_http2(
    respond: &mut server::SendResponse<Bytes>,
    status: u16,
    text: &str,
    length: Option<usize>,
) -> Option<h2::SendStream<Bytes>> {
    let head = Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .header("content-length", length.unwrap_or(text.len()))
        .body(())
        .unwrap();
    // The proxy may have given up: the plan decides that.
    let mut stream = respond.send_response(head, false).ok()?;
    stream
        .send_data(text.to_owned().into(), length.is_none())
        .ok()?;
    Some(stream)
}

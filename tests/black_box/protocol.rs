//! What is malformed, ambiguous, smuggled or slow costs upstream nothing and no other client its time.

use std::{
    io::{self, Read as _, Write as _},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::time::Instant;

use crate::support::{
    Gate, Message, Proxy, SUCCESS, Signal, Step, Upstream, get, kling, post, raw, reply, request,
    send, started, started_with,
};

/// Where a request must not end or go on, this one waits to be taken for the next.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n";
/// `abcde` in chunks.
const CHUNKS: &str = "5\r\nabcde\r\n0\r\n\r\n";

/// A proxy that does not wait long for clients.
fn impatient() -> (Upstream, Proxy) {
    started_with(&[
        ("limits.header_timeout", "500ms"),
        ("upstream.idle_timeout", "500ms"),
    ])
}

/// The statuses of all answers until the proxy closes the connection.
fn statuses(proxy: &Proxy, bytes: impl AsRef<[u8]>) -> Vec<u16> {
    let answers = raw(proxy.address, bytes);
    let answers = String::from_utf8_lossy(&answers);
    let starts = answers.split("HTTP/1.").skip(1);
    starts.map(|start| start[2..5].parse().unwrap()).collect()
}

/// A POST with these lines, then these bytes, then what must not become a request.
fn trap(headers: &str, body: &str) -> Vec<u8> {
    let head = request("POST /v1/x", &headers.replace('\n', "\r\n"), "");
    [&head, body.as_bytes(), SMUGGLED.as_bytes()].concat()
}

/// Shows bytes on failure, but not all of them.
fn shown(bytes: impl AsRef<[u8]>) -> String {
    format!("{:.300}", bytes.as_ref().escape_ascii().to_string())
}

/// The target as the body: says which request an answer is to.
fn echo(upstream: &Upstream) {
    upstream.script(|request| vec![send(reply(200, "", request.target()))]);
}

/// R12.
#[test]
fn ambiguous_length_is_refused_and_the_connection_closed() {
    let (upstream, proxy) = impatient();
    for lines in [
        "content-length: 5\ncontent-length: 6",
        "content-length: 6\ncontent-length: 5",
        "content-length: 5, 6",
        "content-length: +5",
        "content-length: -5",
        "content-length: 0x5",
        "content-length: 5 5",
        "content-length: 5.0",
        "content-length: \"5\"",
        "content-length:",
        "content-length: 18446744073709551621",
    ] {
        assert_eq!(statuses(&proxy, trap(lines, "abcde")), [400], "{lines}");
    }
    assert_eq!(upstream.seen().connections, 0);
}

/// R12.
#[test]
fn transfer_coding_that_does_not_end_in_chunked_is_refused_and_the_connection_closed() {
    let (upstream, proxy) = impatient();
    for lines in [
        "transfer-encoding: xchunked",
        "transfer-encoding: chunkedx",
        "transfer-encoding: chunked, identity",
        "transfer-encoding: identity",
        "transfer-encoding: gzip",
        "transfer-encoding: chunked;q=1",
        "transfer-encoding: \"chunked\"",
        "transfer-encoding: \x0bchunked",
        "transfer-encoding:",
        "transfer-encoding: chunked\ntransfer-encoding: identity",
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked, chunked",
        "transfer-encoding: chunked\ntransfer-encoding: chunked",
        "transfer-encoding: xchunked\ncontent-length: 5",
        "content-length: 5\ntransfer-encoding: identity",
    ] {
        assert_eq!(statuses(&proxy, trap(lines, CHUNKS)), [400], "{lines}");
    }
    let old = format!(
        "POST /v1/x HTTP/1.0\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{CHUNKS}{SMUGGLED}"
    );
    assert_eq!(statuses(&proxy, old), [400]);
    assert_eq!(upstream.seen().connections, 0);
}

/// R12.
#[test]
fn length_beside_chunks_is_dropped_and_the_connection_closed() {
    let (upstream, proxy) = started();
    for lines in [
        "content-length: 6\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\ncontent-length: 6",
        "transfer-encoding: Chunked\ncontent-length: 0",
    ] {
        assert_eq!(statuses(&proxy, trap(lines, CHUNKS)), [200], "{lines}");
        let last = upstream.last();
        let framing = last.told(["content-length", "transfer-encoding"]);
        assert_eq!(framing, [None, Some("chunked")], "{lines}");
        assert_eq!((last.target(), last.text()), ("/v1/x", "abcde"), "{lines}");
    }
    assert_eq!(upstream.seen().requests.len(), 3);
}

/// R12.
#[test]
fn length_said_twice_is_one_request_or_none() {
    let (upstream, proxy) = started();
    for (lines, status) in [
        ("content-length: 5\ncontent-length: 5", 200),
        ("content-length: 5, 5", 400),
    ] {
        let bytes = trap(&format!("connection: close\n{lines}"), "abcde");
        assert_eq!(statuses(&proxy, bytes), [status], "{lines}");
    }
    let last = upstream.last();
    assert_eq!(
        (last.values("content-length"), last.text()),
        (vec!["5"], "abcde")
    );
    assert_eq!(upstream.seen().requests.len(), 1);
}

/// R12.
#[test]
fn malformed_head_is_refused_and_the_connection_closed() {
    let (upstream, proxy) = impatient();
    let line = |line: &str| format!("{line}\r\nhost: localhost\r\n\r\n{SMUGGLED}").into_bytes();
    for bytes in [
        // Header lines.
        trap("x-a: b\r\n c", ""),
        trap("x-a: b\r\n\tcontent-length: 5", ""),
        trap("content-length:\r\n 5", "abcde"),
        trap("x-a: b\rc", ""),
        trap("x-a: b\rcontent-length: 5", "abcde"),
        trap("x-a\r: b", ""),
        trap("x-a: b\0c", ""),
        trap("x\0a: b", ""),
        trap("x-a: b\x1b[31m", ""),
        trap("x-a: b\x7f", ""),
        trap("content-length : 5", "abcde"),
        trap("content-length\t: 5", "abcde"),
        trap("transfer-encoding : chunked", CHUNKS),
        trap("x a: b", ""),
        trap(": b", ""),
        trap("x-a", ""),
        trap("x-\u{e9}: b", ""),
        // The request line.
        line("GET /v1/x HTTP/1.1\r\n x-a: b"),
        line("GET  /v1/x HTTP/1.1"),
        line("GET /v1/x  HTTP/1.1"),
        line("GET /v1/x HTTP/1.1 "),
        line(" GET /v1/x HTTP/1.1"),
        line("GET\t/v1/x\tHTTP/1.1"),
        line("GET /v1/x /y HTTP/1.1"),
        line("GET /v1/\x1b[31m HTTP/1.1"),
        line("GET /v1/\0 HTTP/1.1"),
        line("GET /v1/\r HTTP/1.1"),
        line("GET /v1/\x7f HTTP/1.1"),
        line("G@T /v1/x HTTP/1.1"),
        line("G\0T /v1/x HTTP/1.1"),
        line("GET HTTP/1.1"),
        // The version.
        line("GET /v1/x"),
        line("GET /v1/x HTTP"),
        line("GET /v1/x HTTP/0.9"),
        line("GET /v1/x HTTP/1.2"),
        line("GET /v1/x HTTP/1.10"),
        line("GET /v1/x HTTP/2.0"),
        line("GET /v1/x http/1.1"),
        b"GET /v1/x\r\n".to_vec(),
        // Not HTTP/1 at all.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec(),
        [&b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"[..], &[7; 512]].concat(),
        (0..=255).cycle().take(4096).collect(),
        vec![b'a'; 4096],
        vec![0xff; 4096],
        vec![0; 4096],
    ] {
        let told = statuses(&proxy, &bytes);
        assert!(
            told.is_empty() || told == [400],
            "{told:?} to {}",
            shown(bytes)
        );
    }
    assert_eq!(upstream.seen().connections, 0);
}

#[test]
fn head_without_its_last_line_is_no_request() {
    let (upstream, proxy) = impatient();
    for bytes in [
        "GET /v1/x HTTP/1.1\r\nhost: localhost\r\n",
        "GET /v1/x HTTP/1.1\r\n",
        "\r\n",
    ] {
        let told = statuses(&proxy, bytes);
        assert!(told.is_empty() || told == [408], "{told:?} to {bytes:?}");
    }
    assert_eq!(upstream.seen().connections, 0);
}

/// R16, R32.
#[test]
fn head_over_the_limits_gets_a_bare_refusal_and_the_connection_is_closed() {
    let (upstream, proxy) = started();
    let lines = |count| "x-a: b\n".repeat(count);
    for (bytes, status) in [
        // With the length and `Host` there are 101.
        (request("POST /v1/x", &lines(99), "a"), 431),
        (get(&format!("/{}", "a".repeat(1 << 16))), 431),
    ] {
        let answer = raw(proxy.address, [&bytes, SMUGGLED.as_bytes()].concat());
        let answer = String::from_utf8_lossy(&answer);
        let bare = answer.starts_with(&format!("HTTP/1.1 {status} "))
            && answer.contains("\r\ncontent-length: 0\r\n")
            && answer.matches("HTTP/1.1").count() == 1;
        assert!(bare, "{answer} to {}", shown(bytes));
    }
    // Of these not all is read, so the answer may be lost when the connection is closed.
    let long = "a".repeat(1 << 20);
    for bytes in [
        trap(&format!("x-a: {long}"), ""),
        trap(&format!("{long}: b"), ""),
        trap(&lines(100_000), ""),
        [get(&format!("/{long}")), SMUGGLED.into()].concat(),
        [request(&format!("{long} /"), "", ""), SMUGGLED.into()].concat(),
        vec![b'a'; 1 << 20],
    ] {
        let told = statuses(&proxy, &bytes);
        let refused = matches!(told[..], [] | [400 | 414 | 431]);
        assert!(refused, "{told:?} to {}", shown(bytes));
    }
    assert_eq!(upstream.seen().connections, 0);
    let most = request("POST /v1/x", &lines(98), "a");
    assert_eq!(proxy.send(most).status(), 200, "a hundred headers");
}

#[test]
fn method_of_any_name_is_forwarded_unless_it_is_overlong() {
    let (upstream, proxy) = started();
    for (length, refusal) in [(32, (200, 0)), (33, (405, 9005)), (60_000, (405, 9005))] {
        let line = format!("{} /v1/x", "M".repeat(length));
        let answer = proxy.send(request(&line, "", ""));
        assert_eq!(answer.refusal(), refusal, "{length} bytes");
    }
    assert_eq!(upstream.last().method(), "M".repeat(32));
    assert_eq!(upstream.seen().requests.len(), 1);
}

/// R12.
#[test]
fn broken_chunks_never_arrive_whole() {
    let (upstream, proxy) = impatient();
    for body in [
        "zz\r\nabcde\r\n0\r\n\r\n",
        "-5\r\nabcde\r\n0\r\n\r\n",
        "+5\r\nabcde\r\n0\r\n\r\n",
        "0x5\r\nabcde\r\n0\r\n\r\n",
        "5_0\r\nabcde\r\n0\r\n\r\n",
        " 5\r\nabcde\r\n0\r\n\r\n",
        "\r\nabcde\r\n0\r\n\r\n",
        "10000000000000005\r\nabcde\r\n0\r\n\r\n",
        // The data is longer or shorter than its chunk, or does not end as it must.
        "4\r\nabcde\r\n0\r\n\r\n",
        "6\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcde0\r\n\r\n",
        "5\r\nabcde\n0\r\n\r\n",
        "5\nabcde\r\n0\r\n\r\n",
        "5\r\nabcde\r\n0\r\nx\r\n\r\n",
        "5\r\nabcde\r\n0\r\nx y: z\r\n\r\n",
        // Chunk extensions.
        "5;a\nb\r\nabcde\r\n0\r\n\r\n",
        "5;a\rb\r\nabcde\r\n0\r\n\r\n",
        "5;\nab\r\n0\r\n\r\n",
        "5\r\nabcde\r\n0;a\nb\r\n\r\n",
    ] {
        let told = statuses(&proxy, trap("transfer-encoding: chunked", body));
        assert!(matches!(told[..], [] | [400 | 408]), "{told:?} to {body:?}");
        let seen = upstream.seen().requests;
        assert!(seen.is_empty(), "{body:?} passed as {seen:?}");
    }
    let endless = format!("5;{}\r\nabcde\r\n0\r\n\r\n", "a".repeat(1 << 20));
    assert_eq!(
        statuses(&proxy, trap("transfer-encoding: chunked", &endless)),
        [400]
    );
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn body_that_ends_early_never_arrives_whole() {
    let (upstream, proxy) = impatient();
    for (framing, body) in [
        ("content-length: 5", ""),
        ("content-length: 5", "abcd"),
        ("transfer-encoding: chunked", ""),
        ("transfer-encoding: chunked", "5"),
        ("transfer-encoding: chunked", "5\r\nabc"),
        ("transfer-encoding: chunked", "5\r\nabcde\r\n"),
        ("transfer-encoding: chunked", "5\r\nabcde\r\n0\r\n"),
        ("transfer-encoding: chunked", "5\r\nabcde\r\n0\r\nx: y\r\n"),
    ] {
        let head = request("POST /v1/x", framing, "");
        let told = statuses(&proxy, [&head, body.as_bytes()].concat());
        assert_eq!(told, [408], "{framing}, {body:?}");
    }
    assert_eq!(upstream.first_lines(), [""; 0]);
}

/// R35.
#[test]
fn chunk_extensions_and_trailers_are_dropped() {
    let (upstream, proxy) = started();
    for body in [
        "5;a=b\r\nabcde\r\n0\r\n\r\n",
        "5;a=\"b c\"\r\nabcde\r\n0;d\r\n\r\n",
        "00005\r\nabcde\r\n0\r\n\r\n",
        "5\r\nabcde\r\n0\r\nauthorization: Bearer x\r\nx-trailer: y\r\n\r\n",
    ] {
        let headers = "connection: close\ntransfer-encoding: chunked\ntrailer: x-trailer";
        assert_eq!(statuses(&proxy, trap(headers, body)), [200], "{body:?}");
        let last = upstream.last();
        // Read by its chunks, so nothing stood between or after them.
        assert_eq!(
            (last.text(), last.header("trailer")),
            ("abcde", None),
            "{body:?}"
        );
    }
}

#[test]
fn request_inside_a_body_is_not_carried_out() {
    let (upstream, proxy) = started();
    let chunked = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    for method in ["GET", "POST", "PUT", "DELETE", "PURGE"] {
        for (framing, body) in [
            (format!("content-length: {}", SMUGGLED.len()), SMUGGLED),
            ("transfer-encoding: chunked".to_owned(), &chunked),
        ] {
            let headers = format!("connection: close\n{framing}");
            let head = request(&format!("{method} /v1/x"), &headers, "");
            assert_eq!(statuses(&proxy, [&head, body.as_bytes()].concat()), [200]);
            let last = upstream.last();
            assert_eq!(
                (last.method(), last.text()),
                (method, SMUGGLED),
                "{framing}"
            );
        }
    }
    assert_eq!(upstream.seen().requests.len(), 10);
}

/// R12.
#[test]
fn unread_body_of_a_refused_request_is_not_taken_for_the_next() {
    let (upstream, proxy) = impatient();
    echo(&upstream);
    let chunked = format!("{:x}\r\n{SMUGGLED}\r\n0\r\n\r\n", SMUGGLED.len());
    for (line, header, status) in [
        ("POST /v1/x", "x-a: b\nhost: localhost", 421),
        ("POST /v1/x", "origin: https://evil.test", 403),
        ("TRACE /v1/x", "x-a: b", 405),
        ("CONNECT localhost:443", "x-a: b", 405),
        ("POST /_proxy/x", "x-a: b", 404),
        ("POST http://other.test/", "x-a: b", 400),
    ] {
        for (framing, body) in [
            (format!("content-length: {}", SMUGGLED.len()), SMUGGLED),
            ("transfer-encoding: chunked".to_owned(), &chunked),
        ] {
            let head = request(line, &format!("{header}\n{framing}"), "");
            let bytes = [&head, body.as_bytes(), &get("/next")].concat();
            let told = statuses(&proxy, bytes);
            let right = told == [status] || told == [status, 200];
            assert!(right, "{told:?} to {line}, {header}, {framing}");
        }
    }
    let lines = upstream.first_lines();
    let smuggled = lines.iter().any(|line| line.contains("smuggled"));
    assert!(!smuggled, "{lines:?}");
}

/// An upstream that answers every head at once, whatever body follows: its URL and all it hears.
fn early_upstream() -> (String, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let heard = Arc::<Mutex<String>>::default();
    let hearing = Arc::clone(&heard);
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let heard = Arc::clone(&hearing);
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..count]);
                    heard.lock().unwrap().push_str(&text);
                    if text.contains("authorization: ") {
                        stream.write_all(&kling(200, SUCCESS)).unwrap();
                    }
                }
            });
        }
    });
    (url, heard)
}

/// R12.
#[test]
fn unread_body_after_an_early_answer_is_not_taken_for_the_next() {
    let (url, heard) = early_upstream();
    let proxy = Proxy::to(&Upstream::ok())
        .setting("upstream.url", url)
        .setting("limits.header_timeout", "500ms")
        .setting("upstream.idle_timeout", "500ms")
        .start();
    for repeated in [1, 10_000] {
        let body = SMUGGLED.repeat(repeated);
        let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        for (framing, body) in [
            (format!("content-length: {}", body.len()), body),
            ("transfer-encoding: chunked".to_owned(), chunked),
        ] {
            heard.lock().unwrap().clear();
            let (begin, end) = body.split_at(10);
            let mut connection = proxy.connect();
            connection
                .send(request("POST /v1/x", &framing, ""))
                .send(begin);
            assert_eq!(connection.answer().status(), 200, "{framing}");
            let rest = connection.send(end).send(get("/next")).rest();
            let rest = String::from_utf8_lossy(&rest).into_owned();
            let heard = heard.lock().unwrap();
            let carried_out = heard.matches("authorization: ").count() - 1;
            assert_eq!(
                rest.matches("HTTP/1.1 200").count(),
                carried_out,
                "{framing}: {rest}"
            );
            assert_eq!(heard.matches("GET /next").count(), carried_out, "{framing}");
        }
    }
}

#[test]
fn early_answer_to_a_stalled_upload_keeps_no_connection() {
    let (url, _) = early_upstream();
    let proxy = Proxy::to(&Upstream::ok())
        .setting("upstream.url", url)
        .start();
    let mut connection = proxy.connect();
    let head = request("POST /v1/x", "content-length: 1000000", "");
    assert_eq!(connection.send(head).answer().status(), 200);
    assert_eq!(
        connection.rest(),
        b"",
        "it is closed, well before any timeout"
    );
}

#[test]
fn pipelined_requests_are_answered_in_their_order() {
    let (upstream, proxy) = started();
    echo(&upstream);
    let mut connection = proxy.connect();
    let refused = "GET /refused HTTP/1.1\r\nhost: evil.test\r\n\r\n";
    let chunked = request("POST /3", "transfer-encoding: chunked", "");
    connection.send(
        [
            &get("/1")[..],
            &post("/2", SMUGGLED),
            &chunked,
            CHUNKS.as_bytes(),
            refused.as_bytes(),
            &get("/4"),
        ]
        .concat(),
    );
    let answers: Vec<Message> = (0..5).map(|_| connection.answer()).collect();
    let told = |answer: &Message| (answer.status(), answer.text().to_owned());
    let told: Vec<_> = answers.iter().map(told).collect();
    for (index, target) in [(0, "/1"), (1, "/2"), (2, "/3"), (4, "/4")] {
        assert_eq!(told[index], (200, target.to_owned()));
    }
    assert_eq!(told[3].0, 421);
}

/// R13.
#[test]
fn upgrade_is_answered_as_an_ordinary_request_and_opens_no_tunnel() {
    let (upstream, proxy) = impatient();
    let websocket = "connection: Upgrade\nupgrade: websocket\nsec-websocket-version: 13\n\
        sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==";
    let h2c = "connection: upgrade, http2-settings\nupgrade: h2c\n\
        http2-settings: AAMAAABkAAQAoAAAAAIAAAAA";
    let tunnel =
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    for (answer, status) in [(kling(200, "{\"code\":0}"), 200), (tunnel.to_vec(), 502)] {
        upstream.answer(answer);
        for (upgrade, bytes) in [
            (websocket, &b"\x81\x85\x01\x02\x03\x04tunnelled"[..]),
            (h2c, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
            (
                "upgrade: tls/1.0",
                b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
            ),
            (
                websocket,
                b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n",
            ),
        ] {
            let before = upstream.seen().requests.len();
            let head = request("POST /v1/x", upgrade, "");
            let told = statuses(&proxy, [&head, bytes].concat());
            assert!(
                told.starts_with(&[status]) && !told.contains(&101),
                "{upgrade}: {told:?}"
            );
            assert_eq!(told.len(), 1, "{upgrade}: the connection is closed");
            let seen = &upstream.seen().requests[before..];
            let [only] = seen else {
                panic!("{upgrade} passed as {seen:?}")
            };
            let stripped = only.told(["upgrade", "connection", "http2-settings"]);
            assert_eq!((stripped, only.text()), ([None; 3], ""), "{upgrade}");
        }
    }
}

/// R19.
#[test]
fn http_2_is_not_spoken_with_clients_so_no_flood_of_its_frames_is_read() {
    let (upstream, proxy) = started();
    let mut flood = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for stream in (1..2000_u32).step_by(2).map(u32::to_be_bytes) {
        // HEADERS of `GET /`, and RST_STREAM at once.
        flood.extend([b"\0\0\x03\x01\x05", &stream[..], b"\x82\x86\x84"].concat());
        flood.extend([b"\0\0\x04\x03\0", &stream[..], b"\0\0\0\x08"].concat());
    }
    let told = statuses(&proxy, flood);
    assert!(matches!(told[..], [] | [400]), "{told:?}");
    assert_eq!(upstream.seen().connections, 0);
}

/// R16.
#[test]
fn silent_or_dribbling_client_is_disconnected_in_time() {
    let (upstream, proxy) = impatient();
    let mut connections: Vec<_> = [
        "",
        "\r\n",
        "GET",
        "GET /v1/x HTTP/1.1\r\n",
        "GET /v1/x HTTP/1.1\r\nx-a: ",
    ]
    .map(|start| {
        let mut connection = proxy.connect();
        connection.send(start);
        connection
    })
    .into();
    let begun = Instant::now();
    for connection in &mut connections {
        connection.rest();
    }
    // A byte now and then buys no time.
    proxy
        .connect()
        .send("GET /v1/x HTTP/1.1\r\nx-a: ")
        .dribble(b'a');
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(upstream.seen().connections, 0);
}

/// R17.
#[test]
fn body_far_over_the_limit_takes_little_memory() {
    let (upstream, proxy) = started_with(&[("limits.request_body", "1MiB")]);
    proxy.get("/v1/x");
    let before = proxy.memory("VmRSS");
    let mut connection = proxy.connect();
    connection.send(request("POST /v1/x", "transfer-encoding: chunked", ""));
    let chunk = [b"100000\r\n", &vec![7; 1 << 20][..], b"\r\n"].concat();
    for _ in 0..64 {
        connection.send(&chunk);
    }
    connection.send("0\r\n\r\n");
    let growth = proxy.memory("VmHWM").saturating_sub(before);
    assert!(growth < 16 << 20, "grew by {growth} bytes");
    assert_eq!(upstream.first_lines(), ["GET /v1/x HTTP/1.1"]);
}

#[test]
fn client_of_http_1_0_is_answered_once_and_without_chunks() {
    let (upstream, proxy) = started();
    upstream
        .answer(format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{CHUNKS}").into());
    let head = "GET /v1/x HTTP/1.0\r\nhost: localhost\r\n\r\n";
    let answer = raw(proxy.address, [head, SMUGGLED].concat());
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.starts_with("HTTP/1.0 200") && answer.ends_with("\r\n\r\nabcde"),
        "{answer}"
    );
    assert_eq!(upstream.first_lines(), ["GET /v1/x HTTP/1.1"]);
}

/// Its body ends with the connection: a clean end would make what was cut off look whole.
#[test]
fn answer_to_http_1_0_that_is_cut_off_ends_with_a_reset() {
    let (upstream, proxy) = started();
    let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n";
    let gate = Gate::default();
    let wait = gate.clone();
    upstream.script(move |_| vec![send(start), Step::Wait(wait.clone()), Step::Close]);
    let mut client = proxy.connect();
    client.send("GET /v1/x HTTP/1.0\r\nhost: localhost\r\n\r\n");
    assert_eq!(client.head().status(), 200);
    gate.open();
    assert_eq!(client.end(), Err(io::ErrorKind::ConnectionReset));
}

#[test]
fn method_in_lower_case_is_another_method_and_arrives_as_it_came() {
    let (upstream, proxy) = started();
    assert_eq!(proxy.send(request("get /v1/x", "", "")).status(), 200);
    assert_eq!(upstream.first_lines(), ["get /v1/x HTTP/1.1"]);
}

/// R14, R42.
#[test]
fn log_line_stays_one_line_without_unseen_characters_whatever_a_peer_sends() {
    let forged = "a\r\n{\"level\":\"INFO\"}\r2026-01-01T00:00:00Z\u{1b}[31m\0\u{8}\u{7f}\u{9b}31m\
        \u{2028}b\u{2029}\u{202e}c\u{2066}\u{200b}\u{feff}d";
    let unseen = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    for format in ["json", "pretty"] {
        let (upstream, proxy) = started_with(&[("log.format", format), ("log.filter", "trace")]);
        let envelope = serde_json::json!({ "code": 1200, "message": forged, "request_id": forged });
        for answer in [
            kling(400, envelope.to_string()),
            reply(502, "content-type: text/html", forged),
            reply(500, "x-a: \u{9b}31m\r\ncontent-type: \u{9b}31m", forged),
            forged.into(),
        ] {
            upstream.answer(answer);
            let path = "/v1/%0d%0a%1b%00%7f%c2%9b";
            proxy.get(path);
            assert_eq!(upstream.last().target(), path);
        }
        for bytes in [
            request("GET /v1/x", "x-request-id: \u{9b}31m", ""),
            request("GET /v1/x", "origin: \u{9b}31m", ""),
            request("GET /v1/x", "host: evil\t\"test\"", ""),
            request("GET /v1/x", "x-a: \x1b[31m", ""),
            get("/v1/\x1b[31m"),
            get("/v1/\x7f"),
        ] {
            proxy.connect().send(bytes).head();
        }
        proxy.signal(Signal::TERM);
        let (_, log) = proxy.end();
        assert!(
            log.contains("DEBUG") && log.contains("00%7f%c2%9b"),
            "{log}"
        );
        for line in log.lines() {
            let whole = match format {
                "json" => serde_json::from_str::<serde_json::Value>(line)
                    .is_ok_and(|line| line["timestamp"].is_string()),
                _ => line
                    .split_whitespace()
                    .next()
                    .is_some_and(|time| time.len() == 8 && time.matches(':').count() == 2),
            };
            assert!(whole && !line.contains(unseen), "{format}: {line:?}");
        }
    }
}

#[test]
fn foreign_text_is_cut_in_the_log() {
    let (_upstream, proxy) = started();
    let long = "x".repeat(5_000);
    proxy.send(request(&format!("POST /{long}"), "", "{}"));
    proxy.send(request(&format!("{long} /v1/method"), "", ""));
    for known in ["/xxx", "/v1/method"] {
        let line = proxy.stderr.find(|line| line.contains(known)).unwrap();
        assert!(line.len() < 2_000, "{line}");
    }
}

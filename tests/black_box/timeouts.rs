//! Nothing waits for ever: each silence has its limit and its answer, and nobody else waits for it.

use std::{net::TcpListener, thread, time::Duration};

use tokio::time::Instant;

use crate::support::{
    PATIENCE, PAUSE, Proxy, SUCCESS, Signal, Step, Upstream, eventually, get, is_cut_off, kling,
    post, raise_descriptor_limit, request, send, started_with,
};

/// A proxy with this limit that sends nothing twice, to an upstream that answers everything but `/silent`.
fn limited(key: &str) -> (Upstream, Proxy) {
    let upstream = Upstream::ok();
    upstream.script(|request| match request.target() {
        "/silent" => vec![Step::Hang],
        _ => vec![send(kling(200, SUCCESS))],
    });
    let proxy = Proxy::to(&upstream)
        .setting("retry.attempts", "1")
        .setting(key, "1s")
        .start();
    (upstream, proxy)
}

#[test]
fn silent_upstream_is_a_timeout_that_only_a_read_may_repeat() {
    let (upstream, proxy) = limited("upstream.response_timeout");
    for (request, retry) in [(get("/silent"), "true"), (post("/silent", "{}"), "false")] {
        let answer = proxy.send(&request);
        assert_eq!(answer.refusal(), (504, 9102), "retry: {retry}");
        assert_eq!(answer.header("x-should-retry"), Some(retry));
    }
    // The read's connection was given up. The create's answer may still come.
    let seen = upstream.wait(|seen| seen.closed == 1);
    assert_eq!(seen.connections, 2);
}

#[test]
fn time_to_answer_counts_from_the_last_byte_of_the_request() {
    let (_upstream, proxy) = limited("upstream.response_timeout");
    // A busy machine may hold up an answer for as long as the timeout, but not each time.
    eventually("an answer in time", || {
        let mut slow = proxy.connect();
        slow.send(request("POST /v1/x", "content-length: 4", ""))
            .send("ab");
        // The timeout of another request is the clock: it ends later than ours would, were it running.
        assert_eq!(proxy.get("/silent").status(), 504);
        slow.send("cd").answer().status() == 200
    });
}

#[test]
fn download_that_falls_silent_is_cut_off() {
    let (upstream, proxy) = limited("upstream.idle_timeout");
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabcde";
    upstream.script(move |_| vec![send(start), Step::Hang]);
    let answer = proxy.connect().send(get("/video.mp4")).try_answer();
    assert!(is_cut_off(&answer), "{answer:?}");
    upstream.wait(|seen| seen.closed == 1);
}

#[test]
fn client_that_stops_reading_is_given_up() {
    let (upstream, proxy) = limited("upstream.idle_timeout");
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n";
    upstream.script(move |_| vec![send(start), send(vec![b'a'; 100_000_000]), Step::Hang]);
    let mut idle = proxy.connect();
    idle.send(get("/video.mp4")).head();
    upstream.wait(|seen| seen.closed == 1);
}

/// R16.
#[test]
fn upload_that_falls_silent_is_refused_and_never_arrives_whole() {
    let (upstream, proxy) = limited("upstream.idle_timeout");
    let head = request("POST /v1/x", "content-length: 10", "");
    let answer = proxy.connect().send(head).send("abcde").answer();
    assert_eq!(answer.refusal(), (408, 9008));
    assert_eq!(upstream.first_lines(), [""; 0]);
}

/// R36.
#[test]
fn upload_that_trickles_is_refused_and_never_arrives_whole() {
    let (upstream, proxy) = limited("upstream.idle_timeout");
    let head = request("POST /v1/x", "content-length: 1000000", "");
    let mut trickling = proxy.connect();
    trickling.send(head);
    let begun = Instant::now();
    // No pause is as long as the timeout.
    while !trickling.is_answered_within(Duration::from_millis(50)) {
        assert!(begun.elapsed() < PATIENCE, "it goes on");
        trickling.send("a");
    }
    assert_eq!(trickling.answer().refusal(), (408, 9008));
    assert_eq!(upstream.first_lines(), [""; 0]);
}

/// R36.
#[test]
fn upload_that_is_slow_but_steady_arrives() {
    let (upstream, proxy) = limited("upstream.idle_timeout");
    let piece = "a".repeat(1_000);
    // A busy machine may hold up a client for as long as the timeout, but not each time.
    eventually("it arrives", || {
        let mut steady = proxy.connect();
        steady.send(request("POST /v1/x", "content-length: 25000", ""));
        let begun = Instant::now();
        for _ in 0..25 {
            steady.send(&piece);
            thread::sleep(Duration::from_millis(100));
        }
        assert!(
            begun.elapsed() > Duration::from_secs(2),
            "longer than the timeout"
        );
        steady.answer().status() == 200
    });
    assert_eq!(upstream.last().body.len(), 25_000);
}

/// R32.
#[test]
fn unfinished_heads_take_little_memory_and_give_it_back() {
    raise_descriptor_limit();
    let (_upstream, proxy) = limited("limits.header_timeout");
    proxy.get("/v1/x");
    let before = proxy.memory("VmRSS");
    let start = format!(
        "GET /v1/x HTTP/1.1\r\nhost: localhost\r\nx-a: {}",
        "a".repeat(60_000)
    );
    let mut unfinished: Vec<_> = (0..1_000).map(|_| proxy.connect()).collect();
    for connection in &mut unfinished {
        connection.send(&start);
    }
    assert_eq!(proxy.get("/v1/x").status(), 200);
    for connection in &mut unfinished {
        let _ = connection.end();
    }
    let grown = proxy.memory("VmHWM") - before;
    assert!(grown < 64 << 20, "grew by {grown} bytes");
    // What was freed goes back to the system within a minute, also while there is nothing to do.
    let begun = Instant::now();
    while proxy.memory("VmRSS") > before + (16 << 20) {
        assert!(begun.elapsed() < Duration::from_mins(1), "not given back");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn handshake_that_never_ends_is_an_unreachable_upstream() {
    // Listens, and says nothing: TCP succeeds, TLS does not.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let proxy = Proxy::to(&Upstream::ok())
        .setting("upstream.url", url)
        .setting("upstream.connect_timeout", "300ms")
        .start();
    let answer = proxy.post("/v1/x", "{}");
    assert_eq!(answer.refusal(), (502, 9101));
    assert_eq!(answer.header("x-should-retry"), Some("true"));
}

/// R16.
#[test]
fn silent_dribbling_or_idle_client_is_disconnected() {
    let (_upstream, proxy) = limited("limits.header_timeout");
    for start in ["", "GET /v1/x HTTP/1.1\r\nhost: loc"] {
        let rest = proxy.connect().send(start).rest();
        let told = rest.is_empty() || rest.starts_with(b"HTTP/1.1 408");
        assert!(told, "{start}: {}", rest.escape_ascii());
    }
    let mut idle = proxy.connect();
    assert_eq!(idle.send(get("/v1/x")).answer().status(), 200);
    assert_eq!(idle.rest(), b"");
}

/// R16.
#[test]
fn thousand_slow_clients_hold_up_neither_an_ordinary_request_nor_the_end() {
    raise_descriptor_limit();
    // Longer than a test waits for an answer, and for the end.
    let (upstream, proxy) = started_with(&[
        ("shutdown.drain", "500ms"),
        ("limits.header_timeout", "1h"),
        ("upstream.idle_timeout", "1m"),
    ]);
    proxy.get("/v1/x");
    let before = proxy.memory("VmRSS");
    let begun = |start: &[u8]| {
        let mut connection = proxy.connect();
        connection.send(start);
        connection
    };
    let head = get("/v1/x");
    let half_open: Vec<_> = (0..333)
        .map(|size| begun(&head[..size % head.len()]))
        .collect();
    // One more byte each for these, again and again.
    let endless_head = b"GET /v1/x HTTP/1.1\r\nhost: localhost\r\nx-a: ";
    let endless_body = request("POST /v1/x", "content-length: 1000000", "");
    let starts = [&endless_head[..], &endless_body].into_iter().cycle();
    let mut dribbling: Vec<_> = starts.take(667).map(begun).collect();
    let mut dribble = || {
        for connection in &mut dribbling {
            connection.send("a");
        }
    };
    dribble();
    upstream.wait(|seen| seen.connections >= 333);

    // A busy machine may hold up some, but not each.
    let mut in_time = 0;
    eventually("three are answered at once", || {
        dribble();
        let begun = Instant::now();
        assert_eq!(proxy.get("/v1/x").status(), 200);
        in_time += usize::from(begun.elapsed() < Duration::from_secs(1));
        in_time == 3
    });
    let growth = proxy.memory("VmHWM").saturating_sub(before);
    assert!(growth < 40 << 20, "grew by {growth} bytes");

    let begun = Instant::now();
    proxy.signal(Signal::TERM);
    let (code, log) = thread::scope(|scope| {
        let ended = scope.spawn(|| proxy.end());
        while !ended.is_finished() {
            dribble();
            thread::sleep(PAUSE);
        }
        ended.join().unwrap()
    });
    let took = begun.elapsed();
    assert_eq!(code, Some(0), "{log}");
    assert!(took < PATIENCE, "ended after {took:?}");
    drop(half_open);
}

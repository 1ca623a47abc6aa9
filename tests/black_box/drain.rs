//! What the end of the process gives up is told: to its client, and to the log.

use std::{io::ErrorKind, thread};

use tokio::time::{Duration, Instant};

use crate::support::{
    Connection, Proxy, Signal, Step, Upstream, documented, get, post, send, started_with,
};

/// Signals within this time count as one.
const MOMENT: Duration = Duration::from_millis(500);

/// A create and a read that upstream has and does not answer.
struct InFlight {
    create: Connection,
    read: Connection,
}

fn in_flight(upstream: &Upstream, proxy: &Proxy) -> InFlight {
    upstream.script(|_| vec![Step::Hang]);
    let [mut create, mut read] = [(); 2].map(|()| proxy.connect());
    create.send(post("/v1/x", r#"{"external_task_id":"my-7"}"#));
    read.send(get("/v1/y"));
    upstream.wait(|seen| seen.requests.len() == 2);
    InFlight { create, read }
}

impl InFlight {
    /// Both are answered: the read may be sent again, the create may not.
    fn assert_answered(mut self) {
        let [create, read] = [self.create.answer(), self.read.answer()];
        assert_eq!(create.refusal(), (502, 9104));
        assert_eq!(documented(&create), Some(false), "{}", create.text());
        assert_eq!(read.refusal(), (503, 9302));
        assert_eq!(documented(&read), Some(true), "{}", read.text());
    }
}

fn assert_told(log: &str) {
    for part in ["upstream_disconnected", "draining"] {
        let told = |line: &str| line.contains(part) && line.contains(r#""failed""#);
        assert!(log.lines().any(told), "{part}: {log}");
    }
    let named = log.lines().find(|line| line.contains("was cut off"));
    assert!(named.is_some_and(|line| line.contains("my-7")), "{log}");
}

/// The rule itself is about time.
fn wait_for_another_moment(since: Instant) {
    thread::sleep(MOMENT.saturating_sub(since.elapsed()) + Duration::from_millis(50));
}

fn shutting_down(proxy: &Proxy) {
    let line = proxy.stderr.find(|line| line.contains("shutting down"));
    assert!(line.is_some(), "{}", proxy.stderr.to_end());
}

fn quit(proxy: &Proxy) {
    let answer = Connection::to(proxy.listener("admin"))
        .send(post("/quit", ""))
        .answer();
    assert_eq!(answer.status(), 200, "{}", answer.text());
    shutting_down(proxy);
}

#[test]
fn what_is_in_flight_at_the_end_of_the_drain_is_answered() {
    let (upstream, proxy) = started_with(&[("shutdown.drain", "100ms")]);
    let clients = in_flight(&upstream, &proxy);
    proxy.signal(Signal::TERM);
    clients.assert_answered();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert_told(&log);
    assert!(log.contains("shutdown.drain is over"), "{log}");
}

#[test]
fn second_signal_answers_and_logs_what_is_in_flight() {
    let (upstream, proxy) = started_with(&[]);
    let clients = in_flight(&upstream, &proxy);
    let first = Instant::now();
    proxy.signal(Signal::TERM);
    shutting_down(&proxy);
    wait_for_another_moment(first);
    proxy.signal(Signal::INT);
    clients.assert_answered();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(1));
    assert_told(&log);
    assert!(log.contains("stopped at once by a second signal"), "{log}");
}

/// An impatient finger, or a supervisor that signals the group and the process.
#[test]
fn signals_in_the_same_moment_are_one() {
    let (upstream, proxy) = started_with(&[]);
    let gate = upstream.hold();
    let mut client = proxy.connect();
    client.send(post("/v1/x", "{}"));
    upstream.wait(|seen| seen.requests.len() == 1);
    proxy.signal(Signal::TERM);
    shutting_down(&proxy);
    proxy.signal(Signal::INT);
    // The same thread takes signals and answers there.
    assert_eq!(proxy.admin("/health/live").status(), 200);
    gate.open();
    assert_eq!(client.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

/// The kubelet sends SIGTERM after its preStop hook.
#[test]
fn signal_after_quit_is_the_first() {
    let (upstream, proxy) = started_with(&[("admin.quit", "true")]);
    let gate = upstream.hold();
    let mut client = proxy.connect();
    client.send(post("/v1/x", "{}"));
    upstream.wait(|seen| seen.requests.len() == 1);
    let asked = Instant::now();
    quit(&proxy);
    wait_for_another_moment(asked);
    proxy.signal(Signal::TERM);
    wait_for_another_moment(Instant::now());
    gate.open();
    assert_eq!(client.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

/// Nothing is lost with it, and its client may never send the rest.
#[test]
fn head_that_is_not_whole_does_not_hold_up_the_end() {
    // Longer than a test waits for the end of a connection.
    let (_upstream, proxy) = started_with(&[
        ("shutdown.drain", "30s"),
        ("shutdown.delay", "100ms"),
        ("limits.header_timeout", "1h"),
    ]);
    let head = get("/v1/x");
    let mut unfinished = [1, head.len() / 2, head.len() - 1].map(|size| {
        let mut connection = proxy.connect();
        connection.send(&head[..size]);
        connection
    });
    let mut second = proxy.connect();
    assert_eq!(second.send(&head).answer().status(), 200);
    second.send(&head[..9]);
    // By then it has read what was sent before.
    assert_eq!(proxy.get("/v1/x").status(), 200);
    proxy.signal(Signal::TERM);
    for connection in unfinished.iter_mut().chain([&mut second]) {
        assert_eq!(connection.rest(), b"");
    }
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(!log.contains("cut."), "{log}");
}

/// To its client it would look whole otherwise.
#[test]
fn answer_to_http_1_0_that_is_cut_by_the_end_ends_with_a_reset() {
    let (upstream, proxy) = started_with(&[("shutdown.drain", "100ms")]);
    let start = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n";
    upstream.script(move |_| vec![send(start), Step::Hang]);
    let mut client = proxy.connect();
    client.send("GET /v1/x HTTP/1.0\r\nhost: localhost\r\n\r\n");
    assert_eq!(client.head().status(), 200);
    proxy.signal(Signal::TERM);
    assert_eq!(client.end(), Err(ErrorKind::ConnectionReset));
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(
        log.contains(r#""cut.requests":1,"cut.connections":1"#),
        "{log}"
    );
}

#[test]
fn second_signal_after_quit_ends_it_with_its_lines() {
    let (upstream, proxy) = started_with(&[("admin.quit", "true")]);
    let clients = in_flight(&upstream, &proxy);
    quit(&proxy);
    let first = Instant::now();
    proxy.signal(Signal::TERM);
    wait_for_another_moment(first);
    proxy.signal(Signal::TERM);
    clients.assert_answered();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(1));
    assert_told(&log);
}

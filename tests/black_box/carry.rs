//! A create outlives its client: it is sent once, seen through, and its task is named in the log.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::{
    Connection, Gate, Message, Proxy, SUCCESS, Signal, Step, Upstream, eventually, get, gzip,
    kling, post, reply, request, send, started, started_with,
};

/// The task that [`SUCCESS`] names.
const TASK: &str = "829836802793406551";

/// The line that is left of a create whose client has gone.
fn carried(proxy: &Proxy) -> Value {
    let line = proxy.stderr.find(|line| line.contains("carried through"));
    let line = line.unwrap_or_else(|| panic!("no such line: {}", proxy.stderr.to_end()));
    serde_json::from_str(&line).unwrap()
}

/// Sends a request, and hangs up once upstream has it.
fn hang_up(upstream: &Upstream, mut client: Connection, request: Vec<u8>) {
    client.send(request);
    upstream.wait(|seen| seen.requests.len() == 1);
}

#[test]
fn create_is_carried_through_although_its_client_has_gone() {
    for coding in ["identity", "gzip"] {
        let (upstream, proxy) = started();
        let gate = Gate::default();
        let body = match coding {
            "gzip" => gzip(SUCCESS),
            _ => SUCCESS.into(),
        };
        let headers = format!("content-type: application/json\ncontent-encoding: {coding}");
        let (held, answer) = (gate.clone(), reply(200, &headers, body));
        upstream.script(move |_| vec![Step::Wait(held.clone()), send(&answer)]);
        let body = r#"{"prompt":"a cat","external_task_id":"my-7"}"#;
        let create = request("POST /v1/videos/text2video", "x-request-id: mine", body);
        hang_up(&upstream, proxy.connect(), create);
        gate.open();
        let line = carried(&proxy);
        for (key, value) in [
            ("level", "WARN"),
            ("request_id", "mine"),
            ("url.path", "/v1/videos/text2video"),
            ("task.id", TASK),
            ("task.external_id", "my-7"),
        ] {
            assert_eq!(line[key], value, "{coding}: {line}");
        }
        assert_eq!(line["http.response.status_code"], 200, "{line}");
        assert_eq!(upstream.seen().requests.len(), 1);
    }
}

/// Otherwise a client could have any number of creates in flight by hanging up.
#[test]
fn carried_create_counts_as_in_flight() {
    let (upstream, proxy) = started_with(&[("limits.in_flight", "1")]);
    let gate = upstream.hold();
    hang_up(&upstream, proxy.connect(), post("/v1/x", "{}"));
    assert_eq!(proxy.get("/v1/y").refusal(), (503, 9301));
    gate.open();
    eventually("it ends", || proxy.get("/v1/y").status() == 200);
}

/// Its request and its end arrive together.
#[test]
fn client_that_hangs_up_right_after_the_body_creates_once() {
    let (upstream, proxy) = started();
    for size in [0, 10, 100_000] {
        for name in ["first", "second", "third"] {
            let head = format!("POST /v1/{size}-{name}");
            proxy.connect().send(request(&head, "", "x".repeat(size)));
        }
    }
    let seen = upstream.wait(|seen| seen.requests.len() == 9);
    let targets: BTreeSet<_> = seen.requests.iter().map(Message::target).collect();
    assert_eq!(targets.len(), 9, "{targets:?}");
    proxy.signal(Signal::TERM);
    let (_, log) = proxy.end();
    let named = log.lines().filter(|line| line.contains(TASK)).count();
    assert_eq!(named, 9, "{log}");
}

#[test]
fn failure_of_a_carried_create_is_told_too() {
    let (upstream, proxy) = started();
    let gate = upstream.hold();
    let held = gate.clone();
    upstream.script(move |_| vec![Step::Wait(held.clone()), Step::Close]);
    let create = post("/v1/x", r#"{"external_task_id":"my-8"}"#);
    hang_up(&upstream, proxy.connect(), create);
    gate.open();
    let line = carried(&proxy);
    assert_eq!(line["error.type"], "upstream_disconnected", "{line}");
    assert_eq!(line["task.external_id"], "my-8", "{line}");
    assert_eq!(upstream.seen().requests.len(), 1, "never sent twice");
}

#[test]
fn refused_create_is_sent_again_also_without_its_client() {
    let (upstream, proxy) = started();
    let gate = upstream.hold();
    let held = gate.clone();
    let busy = kling(429, r#"{"code":1303,"message":"no","request_id":"1"}"#);
    upstream.script(move |_| vec![Step::Wait(held.clone()), send(&busy)]);
    hang_up(&upstream, proxy.connect(), post("/v1/x", "{}"));
    upstream.answer(kling(200, SUCCESS));
    gate.open();
    let line = carried(&proxy);
    assert_eq!(line["task.id"], TASK, "{line}");
}

#[test]
fn client_that_goes_in_the_middle_of_its_body_creates_nothing() {
    let (upstream, proxy) = started();
    let mut client = proxy.connect();
    let head = request("POST /v1/x", "content-length: 10", "");
    client.send(head).send("12345");
    upstream.wait(|seen| seen.bytes > 0);
    drop(client);
    eventually("upstream's connection ends", || upstream.seen().closed == 1);
    assert!(upstream.seen().requests.is_empty());
}

#[test]
fn read_is_given_up_with_its_client() {
    let (upstream, proxy) = started();
    upstream.script(|_| vec![Step::Hang]);
    hang_up(&upstream, proxy.connect(), get("/v1/x"));
    eventually("upstream's connection ends", || upstream.seen().closed == 1);
}

#[test]
fn drain_waits_for_a_create_whose_client_has_gone() {
    let (upstream, proxy) = started_with(&[("log.filter", "kling_proxy=debug")]);
    let gate = upstream.hold();
    hang_up(&upstream, proxy.connect(), post("/v1/x", "{}"));
    let log = |part: &'static str| proxy.stderr.find(move |line| line.contains(part)).unwrap();
    log("the client has gone before");
    proxy.signal(Signal::TERM);
    log("shutting down");
    gate.open();
    assert_eq!(carried(&proxy)["task.id"], TASK);
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(!log.contains("cut."), "{log}");
}

#[test]
fn drain_cuts_a_carried_create_at_its_limit_and_says_so() {
    let (upstream, proxy) = started_with(&[("shutdown.drain", "100ms")]);
    upstream.script(|_| vec![Step::Hang]);
    let create = post("/v1/x", r#"{"external_task_id":"my-9"}"#);
    hang_up(&upstream, proxy.connect(), create);
    proxy.signal(Signal::TERM);
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(log.contains("\"cut.creates\":1"), "{log}");
    let named = log.lines().find(|line| line.contains("was cut off"));
    let named: Value = serde_json::from_str(named.expect("a line for the create")).unwrap();
    assert_eq!(named["task.external_id"], "my-9", "{named}");
}

/// A client that just closes cannot be told from one that waits for its answer.
#[test]
fn log_line_of_every_create_names_its_task() {
    let (_upstream, proxy) = started();
    assert_eq!(proxy.post("/v1/x", "{}").text(), SUCCESS);
    let named = format!("\"task.id\":\"{TASK}\"");
    let line = proxy.stderr.find(|line| line.contains(&named));
    assert!(line.is_some_and(|line| line.contains("INFO") && line.contains("answered")));
}

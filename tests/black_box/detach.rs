//! A create that is being sent outlives its client, and the log names its task. One that is not being
//! sent is cancelled.

use std::{cell::RefCell, collections::BTreeSet, io::Read as _, net::TcpListener};

use serde_json::Value;

use crate::support::{
    Connection, Gate, Proxy, SUCCESS, Signal, Step, Upstream, eventually, get, gzip, is_cut_off,
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

/// The line of a create of which nothing was made.
fn cancelled(proxy: &Proxy) -> Value {
    let line = proxy.stderr.find(|line| line.contains("no task was made"));
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

/// Its request and its end arrive together: either it is sent, and carried through, or nothing is.
#[test]
fn client_that_hangs_up_right_after_the_body_creates_at_most_once() {
    let (upstream, proxy) = started();
    for size in [0, 10, 100_000] {
        for name in ["first", "second", "third"] {
            let head = format!("POST /v1/{size}-{name}");
            proxy.connect().send(request(&head, "", "x".repeat(size)));
        }
    }
    let outcomes = RefCell::new([0, 0]);
    let all_told = |line: &str| {
        let mut outcomes = outcomes.borrow_mut();
        outcomes[0] += usize::from(line.contains(TASK));
        outcomes[1] += usize::from(line.contains("no task was made"));
        outcomes[0] + outcomes[1] == 9
    };
    assert!(proxy.stderr.find(all_told).is_some(), "{outcomes:?}");
    proxy.signal(Signal::TERM);
    proxy.end();
    let targets = upstream.first_lines();
    let different: BTreeSet<_> = targets.iter().collect();
    assert_eq!(different.len(), targets.len(), "{targets:?}");
    assert_eq!(targets.len(), outcomes.borrow()[0], "{targets:?}");
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

/// The client may have sent it again by then: two tasks would be paid for.
#[test]
fn refused_create_is_not_sent_again_once_its_client_has_left() {
    let (upstream, proxy) = started();
    let gate = upstream.hold();
    let held = gate.clone();
    let busy = kling(429, r#"{"code":1303,"message":"no","request_id":"1"}"#);
    upstream.script(move |_| vec![Step::Wait(held.clone()), send(&busy)]);
    let create = post("/v1/x", r#"{"external_task_id":"my-7"}"#);
    hang_up(&upstream, proxy.connect(), create);
    upstream.answer(kling(200, SUCCESS));
    gate.open();
    let line = cancelled(&proxy);
    assert_eq!(line["task.external_id"], "my-7", "{line}");
    proxy.signal(Signal::TERM);
    proxy.end();
    assert_eq!(upstream.seen().requests.len(), 1);
}

/// It waits between two attempts when its client leaves.
#[test]
fn create_whose_client_leaves_before_a_resend_is_not_sent_again() {
    let (upstream, proxy) = started_with(&[("retry.total_time", "30s")]);
    let busy = "content-type: application/json\nretry-after: 20";
    upstream.answer(reply(429, busy, r#"{"code":1303,"message":"no"}"#));
    let mut client = proxy.connect();
    client.send(post("/v1/x", r#"{"external_task_id":"my-7"}"#));
    let again = |line: &str| line.contains("sending again");
    assert!(proxy.stderr.find(again).is_some(), "refused once");
    drop(client);
    assert_eq!(cancelled(&proxy)["task.external_id"], "my-7");
    assert_eq!(upstream.seen().requests.len(), 1);
}

/// Upstream listens, and says nothing when it is asked for TLS.
#[test]
fn create_whose_client_leaves_before_there_is_a_connection_is_never_sent() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", silent.local_addr().unwrap());
    let proxy = Proxy::to(&Upstream::ok())
        .setting("upstream.url", url)
        .setting("upstream.connect_timeout", "60s")
        .start();
    let mut client = proxy.connect();
    client.send(post("/v1/x", r#"{"external_task_id":"my-7"}"#));
    let (mut asked, _) = silent.accept().unwrap();
    asked.read_exact(&mut [0; 1]).expect("a handshake begins");
    drop(client);
    assert_eq!(cancelled(&proxy)["task.external_id"], "my-7");
    // The handshake is given up too.
    asked.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn client_that_goes_in_the_middle_of_its_body_creates_nothing() {
    let (upstream, proxy) = started();
    let mut client = proxy.connect();
    let head = request("POST /v1/x", "content-length: 1000000", "");
    client.send(head).send("x".repeat(500_000));
    upstream.wait(|seen| seen.bytes > 0);
    drop(client);
    eventually("upstream's connection ends", || upstream.seen().closed == 1);
    assert!(upstream.seen().requests.is_empty());
    // It may still have been there to be told.
    let told = |line: &str| line.contains("no task was made") || line.contains("bad_request");
    assert!(proxy.stderr.find(told).is_some());
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
    let large = format!(
        r#"{{"code":0,"x":"{}","data":{{"task_id":"{TASK}"}}}}"#,
        "x".repeat(100_000)
    );
    for (name, headers, body) in [
        ("plain", "content-type: application/json", SUCCESS.into()),
        (
            "over a bound",
            "content-type: application/json",
            large.clone().into_bytes(),
        ),
        ("another type", "content-type: text/plain", SUCCESS.into()),
        ("no type", "", SUCCESS.into()),
        (
            "encoded",
            "content-type: application/json\ncontent-encoding: gzip",
            gzip(large),
        ),
    ] {
        let (upstream, proxy) = started();
        upstream.answer(reply(200, headers, body));
        assert_eq!(proxy.post("/v1/x", "{}").status(), 200, "{name}");
        let line = answered(&proxy);
        assert_eq!(line["task.id"], TASK, "{name}: {line}");
        assert_eq!(line["level"], "INFO", "{name}: {line}");
    }
}

/// Has upstream answer with the beginning of [`SUCCESS`], and with the rest once the gate is open.
fn answer_in_parts(upstream: &Upstream, at: usize) -> Gate {
    let (first, last) = SUCCESS.split_at(at);
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{first}",
        SUCCESS.len()
    );
    let gate = Gate::default();
    let (wait, last) = (gate.clone(), last.to_owned());
    upstream.script(move |_| vec![send(&head), Step::Wait(wait.clone()), send(&last)]);
    gate
}

/// It is let go after a moment, and read on while it passes.
#[test]
fn log_line_names_a_task_whose_answer_is_slow() {
    let (upstream, proxy) = started();
    let gate = answer_in_parts(&upstream, SUCCESS.len() - 10);
    let mut client = proxy.connect();
    client.send(post("/v1/x", "{}"));
    // Its head arrives before its end is sent.
    assert_eq!(client.head().status(), 200);
    gate.open();
    assert_eq!(answered(&proxy)["task.id"], TASK);
}

/// The rest of the answer is read without it.
#[test]
fn log_names_a_task_whose_client_leaves_inside_of_the_answer() {
    let (upstream, proxy) = started();
    let gate = answer_in_parts(&upstream, 30);
    let mut client = proxy.connect();
    client.send(post("/v1/x", "{}"));
    assert_eq!(client.head().status(), 200);
    drop(client);
    gate.open();
    assert_eq!(carried(&proxy)["task.id"], TASK);
}

/// Its task may exist, and nobody can know its name.
#[test]
fn answer_to_a_create_that_is_cut_off_is_told() {
    let (upstream, proxy) = started();
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"code\":0,\"data\":{";
    upstream.script(move |_| vec![send(start), Step::Close]);
    let create = post("/v1/x", r#"{"external_task_id":"my-7"}"#);
    let answer = proxy.connect().send(create).try_answer();
    assert!(is_cut_off(&answer), "{answer:?}");
    let line = proxy.stderr.find(|line| line.contains("no whole answer"));
    let line: Value = serde_json::from_str(&line.expect("a line")).unwrap();
    assert_eq!(line["task.external_id"], "my-7", "{line}");
    assert_eq!(line["level"], "WARN", "{line}");
}

/// Its client has left by then, so that this line is all there is.
#[test]
fn answer_to_a_create_that_is_cut_off_without_its_client_is_told() {
    let (upstream, proxy) = started();
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"code\":0,\"data\":{";
    let gate = Gate::default();
    let wait = gate.clone();
    upstream.script(move |_| vec![Step::Wait(wait.clone()), send(start), Step::Close]);
    let create = post("/v1/x", r#"{"external_task_id":"my-7"}"#);
    hang_up(&upstream, proxy.connect(), create);
    gate.open();
    let line = proxy.stderr.find(|line| line.contains("no whole answer"));
    let line: Value = serde_json::from_str(&line.expect("a line")).unwrap();
    assert_eq!(line["task.external_id"], "my-7", "{line}");
}

#[test]
fn external_id_of_a_create_is_logged_before_it_is_sent() {
    let (upstream, proxy) = started();
    let image = "x".repeat(3_000_000);
    let mut clients = Vec::new();
    for body in [
        r#"{"external_task_id":"my-7"}"#.to_owned(),
        format!(r#"{{"external_task_id":"my-8","image":"{image}"}}"#),
    ] {
        upstream.script(|_| vec![Step::Hang]);
        let mut client = proxy.connect();
        client.send(post("/v1/x", body));
        clients.push(client);
    }
    for name in ["my-7", "my-8"] {
        let line = proxy.stderr.find(|line| line.contains(name)).unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&line["message"], &line["level"]),
            (&"sending".into(), &"INFO".into())
        );
    }
}

/// Whatever the bounds of resending, and wherever in the body it stands.
#[test]
fn failed_line_of_a_create_names_its_external_id() {
    let (upstream, proxy) = started_with(&[("retry.replay_body", "0B")]);
    upstream.answer(kling(400, r#"{"code":1201,"message":"no"}"#));
    let image = "x".repeat(3_000_000);
    for body in [
        r#"{"external_task_id":"my-7"}"#.to_owned(),
        format!(r#"{{"image":"{image}","external_task_id":"my-7"}}"#),
        format!(r#"{{"image":"{image}","options":{{"external_task_id":"my-7"}}}}"#),
    ] {
        assert_eq!(proxy.post("/v1/x", body).refusal(), (400, 1201));
    }
    proxy.signal(Signal::TERM);
    let (_, log) = proxy.end();
    let failed = log.lines().filter(|line| line.contains(r#""failed""#));
    let named = failed.filter(|line| line.contains(r#""task.external_id":"my-7""#));
    assert_eq!(named.count(), 3, "{log}");
}

/// The client was told 9102 by then. The line may be all that is left of a paid task.
#[test]
fn task_of_an_answer_that_comes_too_late_is_logged() {
    let (upstream, proxy) = started_with(&[("upstream.response_timeout", "100ms")]);
    let gate = upstream.hold();
    let create = post("/v1/x", r#"{"external_task_id":"my-7"}"#);
    assert_eq!(proxy.send(create).refusal(), (504, 9102));
    gate.open();
    let line = proxy.stderr.find(|line| line.contains(TASK));
    let line: Value = serde_json::from_str(&line.expect("a line")).unwrap();
    for (key, value) in [
        ("level", "WARN"),
        ("task.id", TASK),
        ("task.external_id", "my-7"),
        ("url.path", "/v1/x"),
    ] {
        assert_eq!(line[key], value, "{line}");
    }
    assert_eq!(upstream.seen().requests.len(), 1);
}

#[test]
fn drain_waits_for_a_late_answer() {
    let (upstream, proxy) = started_with(&[("upstream.response_timeout", "100ms")]);
    let gate = upstream.hold();
    assert_eq!(proxy.post("/v1/x", "{}").refusal(), (504, 9102));
    proxy.signal(Signal::TERM);
    proxy.stderr.find(|line| line.contains("shutting down"));
    gate.open();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(log.contains(TASK), "{log}");
}

/// A line says "answered".
fn answered(proxy: &Proxy) -> Value {
    let line = proxy.stderr.find(|line| line.contains(r#""answered""#));
    serde_json::from_str(&line.expect("a line")).unwrap()
}

//! Bodies of any size pass through a proxy that holds none of them.

use serde_json::json;

use crate::support::{
    Gate, Message, Proxy, SUCCESS, Signal, Step, Upstream, get, gzip, is_cut_off, post, reply,
    request, send, started,
};

const LARGE: usize = 64 << 20;
const GROWTH: usize = 16 << 20;

/// By how much memory peaked above what it was after a first small request.
fn growth(proxy: &Proxy, transfer: impl FnOnce()) -> usize {
    let before = proxy.memory("VmRSS");
    transfer();
    proxy.memory("VmHWM").saturating_sub(before)
}

/// Answers with one chunk and, once the gate is open, with another.
fn in_two_parts(upstream: &Upstream, content_type: &str, [first, last]: [&str; 2]) -> Gate {
    let head = format!("content-type: {content_type}\r\ntransfer-encoding: chunked");
    let first = format!(
        "HTTP/1.1 200 OK\r\n{head}\r\n\r\n{:x}\r\n{first}\r\n",
        first.len()
    );
    let last = format!("{:x}\r\n{last}\r\n0\r\n\r\n", last.len());
    let gate = Gate::default();
    let wait = gate.clone();
    upstream.script(move |_| vec![send(&first), Step::Wait(wait.clone()), send(&last)]);
    gate
}

/// Makes the last step of an answer.
type End = fn() -> Step;

/// Starts answers with status 200 and these lines, and ends them so.
fn begin(upstream: &Upstream, headers: &str, rest: &str, end: End) {
    let head = reply(200, headers, "");
    let head = String::from_utf8(head).unwrap();
    let sent = head.replace("content-length: 0\r\n", "") + rest;
    upstream.script(move |_| vec![send(&sent), end()]);
}

/// The error that tells of a broken answer, and how often a client had to ask: on a busy machine an answer
/// may break off after its head had to be let go.
fn told(proxy: &Proxy, request: &[u8]) -> (Message, usize) {
    let mut tries = (1..=10).map(|count| (proxy.connect().send(request).try_answer(), count));
    let told = tries.find_map(|(answer, count)| Some((answer.ok()?, count)));
    told.expect("an answer")
}

/// The beginnings of answers that break off before their first byte, how they end, and the code that
/// tells it.
const BROKEN: [(&str, &str, End, u64); 6] = [
    ("content-length: 100", "", || Step::Close, 9104),
    ("content-length: 100", "", || Step::Reset, 9104),
    ("transfer-encoding: chunked", "", || Step::Close, 9104),
    ("transfer-encoding: chunked", "f", || Step::Close, 9104),
    ("transfer-encoding: chunked", "zz\r\n", || Step::Hang, 9103),
    ("transfer-encoding: chunked", "-1\r\n", || Step::Hang, 9103),
];

#[test]
fn answer_that_breaks_off_before_its_first_byte_is_an_error() {
    let (upstream, proxy) = started();
    for (framing, rest, end, code) in BROKEN {
        let json = format!("content-type: application/json\n{framing}");
        begin(&upstream, &json, rest, end);
        let read = told(&proxy, &get("/v1/x")).0;
        let case = format!("{framing}, then {rest:?}");
        assert_eq!(read.refusal(), (502, code), "{case}");
        // What is malformed stays so.
        let attempts = if code == 9104 { 3 } else { 1 };
        assert_eq!(read.error(["attempts"]), [json!(attempts)], "{case}");
        let before = upstream.seen().requests.len();
        let (create, count) = told(&proxy, &post("/v1/x", "{}"));
        assert_eq!(create.refusal(), (502, code), "{case}");
        let advice = create.error(["retryable", "attempts"]);
        assert_eq!(
            advice,
            [json!(false), json!(1)],
            "{case}: its task may exist"
        );
        let seen = upstream.seen().requests.len();
        assert_eq!(seen, before + count, "{case}: sent again");
    }
    proxy.signal(Signal::TERM);
    let (_, log) = proxy.end();
    let failed = |line: &&str| line.contains("upstream_") && line.contains(r#""failed""#);
    assert_eq!(log.lines().filter(failed).count(), 2 * BROKEN.len());
}

/// What has come is looked at; nothing is waited for.
#[test]
fn answer_of_another_type_that_is_malformed_from_the_first_byte_is_an_error() {
    let (upstream, proxy) = started();
    for content_type in ["video/mp4", "text/event-stream"] {
        let headers = format!("content-type: {content_type}\ntransfer-encoding: chunked");
        begin(&upstream, &headers, "zz\r\n", || Step::Hang);
        for answer in [proxy.get("/v1/x"), proxy.post("/v1/x", "{}")] {
            assert_eq!(answer.refusal(), (502, 9103), "{content_type}");
        }
    }
}

#[test]
fn head_of_an_answer_reaches_the_client_before_the_first_byte_of_its_body() {
    let (upstream, proxy) = started();
    for content_type in ["video/mp4", "text/event-stream", "application/json"] {
        for (framing, body) in [
            ("content-length: 2", "{}"),
            ("transfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"),
        ] {
            let gate = Gate::default();
            let wait = gate.clone();
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n");
            upstream.script(move |_| vec![send(&head), Step::Wait(wait.clone()), send(body)]);
            let mut connection = proxy.connect();
            let mut answer = connection.send(get("/v1/x")).head();
            assert_eq!(answer.status(), 200, "{content_type}, {framing}");
            gate.open();
            connection.finish(&mut answer);
            assert_eq!(answer.text(), "{}", "{content_type}, {framing}");
        }
    }
}

#[test]
fn large_upload_passes_in_little_memory() {
    let (upstream, proxy) = started();
    proxy.get("/v1/x");
    let body = vec![7; LARGE];
    let growth = growth(&proxy, || {
        let answer = proxy.send(request("POST /v1/images/generations", "", &body));
        assert_eq!(answer.text(), SUCCESS);
    });
    assert!(upstream.last().body == body, "another body arrived");
    assert!(growth < GROWTH, "grew by {growth} bytes");
}

#[test]
fn large_download_passes_in_little_memory() {
    for content_type in ["video/mp4", "application/json"] {
        let (upstream, proxy) = started();
        proxy.get("/v1/x");
        let body = vec![b'7'; LARGE];
        upstream.answer(reply(200, &format!("content-type: {content_type}"), &body));
        let growth = growth(&proxy, || {
            assert!(
                proxy.get("/v1/x").body == body,
                "{content_type}: another body"
            );
        });
        assert!(growth < GROWTH, "{content_type}: grew by {growth} bytes");
    }
}

/// R18.
#[test]
fn compressed_answer_passes_undecoded_in_little_memory() {
    // Its service code is looked for, but not so far.
    let bomb = gzip(format!(r#"{{"data":"{}","code":0}}"#, "7".repeat(LARGE)));
    for content_type in ["video/mp4", "application/json"] {
        let (upstream, proxy) = started();
        proxy.get("/v1/x");
        let headers = format!("content-type: {content_type}\ncontent-encoding: gzip");
        upstream.answer(reply(200, &headers, &bomb));
        let growth = growth(&proxy, || {
            let answer = proxy.get("/v1/x");
            assert_eq!(answer.header("content-encoding"), Some("gzip"));
            assert!(answer.body == bomb, "{content_type}: another body");
        });
        assert!(growth < 4 << 20, "{content_type}: grew by {growth} bytes");
    }
}

#[test]
fn first_byte_of_an_answer_reaches_the_client_before_upstream_sends_its_last() {
    let (upstream, proxy) = started();
    for (content_type, parts) in [
        ("video/mp4", ["first", "last"]),
        ("text/event-stream", ["data: 1\n\n", "data: 2\n\n"]),
        ("application/json", [r#"{"code":0,"data":"#, "[1]}"]),
        // Its code is too long in coming: it is let go after a moment.
        ("application/json", [r#"{"data":"#, r#"[1],"code":1303}"#]),
    ] {
        let gate = in_two_parts(&upstream, content_type, parts);
        let mut connection = proxy.connect();
        assert_eq!(connection.send(get("/v1/x")).head().status(), 200);
        assert_eq!(connection.chunk().unwrap(), parts[0].as_bytes());
        gate.open();
        assert_eq!(connection.chunk().unwrap(), parts[1].as_bytes());
        assert_eq!(connection.chunk(), None, "{content_type}");
    }
}

#[test]
fn first_byte_of_a_request_reaches_upstream_before_the_client_sends_its_last() {
    let (upstream, proxy) = started();
    let mut connection = proxy.connect();
    let head = request("POST /v1/x", "content-length: 2000000", "");
    connection.send(head).send(vec![1; 1_000_000]);
    upstream.wait(|seen| seen.bytes > 1_000_000);
    assert_eq!(connection.send(vec![1; 1_000_000]).answer().status(), 200);
    assert_eq!(upstream.last().body.len(), 2_000_000);
}

#[test]
fn upstream_connection_ends_when_nobody_takes_the_answer_any_more() {
    let (upstream, proxy) = started();
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\nabc";
    let gate = Gate::default();
    let held = gate.clone();
    upstream.script(move |_| {
        let rest = [
            Step::Wait(held.clone()),
            send(vec![b'd'; 20_000_000]),
            Step::Hang,
        ];
        [send(start)].into_iter().chain(rest).collect()
    });
    proxy.connect().send(get("/video.mp4")).head();
    gate.open();
    upstream.wait(|seen| seen.closed == 1);
}

#[test]
fn upload_whose_client_hangs_up_never_arrives_whole() {
    let (upstream, proxy) = started();
    for framing in ["content-length: 2000", "transfer-encoding: chunked"] {
        let before = upstream.seen();
        let mut connection = proxy.connect();
        connection.send(request("POST /v1/x", framing, ""));
        connection.send(format!("3e8\r\n{}\r\n", "a".repeat(1000)));
        upstream.wait(|seen| seen.bytes > before.bytes + 1000);
        drop(connection);
        upstream.wait(|seen| seen.closed > before.closed);
    }
    assert_eq!(upstream.first_lines(), [""; 0]);
}

/// R17.
#[test]
fn answer_that_is_cut_off_stays_cut_off() {
    let (upstream, proxy) = started();
    for content_type in ["video/mp4", "application/json"] {
        for start in [
            "content-length: 100\r\n\r\n{\"code\":0,",
            "content-length: 100\r\n\r\n{\"da",
            "transfer-encoding: chunked\r\n\r\na\r\n{\"code\":0,\r\n",
            "transfer-encoding: chunked\r\n\r\n4\r\n{\"da\r\n",
        ] {
            let sent = format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{start}");
            upstream.script(move |_| vec![send(&sent), Step::Close]);
            let answer = proxy.connect().send(get("/v1/x")).try_answer();
            assert!(is_cut_off(&answer), "{content_type}, {start}: {answer:?}");
        }
    }
}

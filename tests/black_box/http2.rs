//! Upstreams of HTTP/2 that offer little, refuse, go away or fall silent: no create is sent twice or
//! after its client was told that there is no answer, and nobody waits for the streams of others.

use serde_json::json;
use tokio::time::Instant;

use crate::support::{
    Arrived, CANCEL, Command, Connection, FrameUpstream, INTERNAL_ERROR, Id, Message, NO_ERROR,
    Offer, Proxy, REFUSED_STREAM, SUCCESS, get, is_cut_off, post, request,
};

/// The task that [`SUCCESS`] names.
const TASK: &str = "829836802793406551";
/// What an upstream may take in tests that wait for the timeout.
const LIMIT: &str = "2s";

fn create(name: &str) -> Vec<u8> {
    post("/v1/videos/text2video", body(name))
}

fn body(name: &str) -> String {
    json!({ "prompt": "a cat", "external_task_id": name }).to_string()
}

/// Starts a proxy, and asks once, so that it has a connection and keeps to what upstream offers.
fn settled(offer: Offer, settings: &[(&str, &str)]) -> (FrameUpstream, Proxy) {
    let upstream = FrameUpstream::start(offer);
    let set = |command: Command, (key, value): &(&str, &str)| command.setting(key, value);
    let proxy = settings.iter().fold(upstream.proxy(), set).start();
    let mut client = proxy.connect();
    client.send(get("/v1/first"));
    let first = upstream.whole(1);
    upstream.wait(|arrived| arrived.connections[0].settled);
    upstream.answer(first, SUCCESS);
    assert_eq!(client.answer().status(), 200);
    (upstream, proxy)
}

/// Sends a request over a connection of its own.
fn sent(proxy: &Proxy, request: impl AsRef<[u8]>) -> Connection {
    let mut client = proxy.connect();
    client.send(request);
    client
}

/// Fails unless this is the refusal, and it says that the create is not to be sent again.
#[track_caller]
fn assert_uncertain(answer: &Message, refusal: (u16, u64)) {
    assert_eq!(answer.refusal(), refusal, "{}", answer.text());
    assert_eq!(answer.error(["retryable"]), [json!(false)]);
}

/// The bodies of the creates that upstream has accepted, in the order in which they began.
fn accepted(upstream: &FrameUpstream) -> Vec<String> {
    let arrived = upstream.arrived();
    let bodies = arrived.accepted().into_iter().map(|stream| &stream.body);
    let creates = bodies.filter(|body| !body.is_empty());
    creates
        .map(|body| String::from_utf8(body.clone()).unwrap())
        .collect()
}

/// R35.
#[test]
fn trailers_of_a_request_do_not_reach_upstream() {
    let (upstream, proxy) = settled(Offer::default(), &[]);
    let head = request(
        "POST /v1/x",
        "transfer-encoding: chunked\ntrailer: authorization",
        "",
    );
    let body = b"5\r\nabcde\r\n0\r\nauthorization: Bearer x\r\n\r\n";
    let mut client = sent(&proxy, [head.as_slice(), body].concat());
    let id = upstream.whole(2);
    upstream.answer(id, SUCCESS);
    assert_eq!(client.answer().status(), 200);
    let arrived = upstream.arrived();
    assert_eq!(arrived.stream(id).body, b"abcde");
    assert_eq!(arrived.streams.len(), 2, "{}", arrived.history);
}

/// A create that waits for the stream of another one is sent whenever that ends, be it after its own
/// client was told that there was no answer.
#[test]
fn create_beyond_the_streams_of_a_connection_goes_over_another_at_once() {
    let offer = Offer {
        streams: 1,
        ..Offer::default()
    };
    let (upstream, proxy) = settled(offer, &[]);
    let mut first = sent(&proxy, create("first"));
    let held = upstream.whole(2);
    let mut second = sent(&proxy, create("second"));
    upstream.wait(|arrived| arrived.connections.len() == 2);
    let other = upstream.whole(3);
    assert_ne!(other.connection, held.connection);
    for (client, stream) in [(&mut second, other), (&mut first, held)] {
        upstream.answer(stream, SUCCESS);
        assert_eq!(client.answer().status(), 200);
    }
    assert_eq!(accepted(&upstream), [body("first"), body("second")]);
}

/// What waits for room must not be sent when the client has been told that the outcome is unknown.
#[test]
fn create_is_reset_and_never_completed_after_its_timeout() {
    for window in [0, 10] {
        let offer = Offer {
            window,
            ..Offer::default()
        };
        let limits = [
            ("upstream.response_timeout", LIMIT),
            ("upstream.idle_timeout", LIMIT),
        ];
        let (upstream, proxy) = settled(offer, &limits);
        let mut client = sent(&proxy, create("late"));
        let stream = upstream.begun(2);
        assert_eq!(stream.connection, 0, "the one that knows the window");
        assert_uncertain(&client.answer(), (504, 9102));
        upstream.open_window(stream);
        let over = upstream.wait(|arrived| {
            let stream = arrived.stream(stream);
            stream.reset.is_some() || stream.whole.is_some()
        });
        let late = over.stream(stream);
        assert_eq!(late.whole, None, "window {window}: completed");
        assert_eq!(over.streams.len(), 2, "window {window}: sent again");
    }
}

/// Nor must what waits for a free stream. A request without a body is whole with its head, so that no
/// reset that follows can undo it.
#[test]
fn create_that_found_no_stream_does_not_arrive_after_its_timeout() {
    let empty = request("POST /v1/x", "content-length: 0", "");
    for (row, late) in [("without a body", empty), ("with a body", create("late"))] {
        let offer = Offer {
            streams: 1,
            ..Offer::default()
        };
        let (upstream, proxy) = settled(offer, &[("upstream.response_timeout", LIMIT)]);
        // A download that goes on has no timeout that could free its stream before.
        let mut download = sent(&proxy, get("/video.mp4"));
        let held = upstream.whole(2);
        upstream.begin_answer(held, &[("content-type", "video/mp4")], "a");
        download.head();
        assert_uncertain(&sent(&proxy, late).answer(), (504, 9102));
        let told = Instant::now();
        // What waited for the stream would come now.
        upstream.reset(held, INTERNAL_ERROR);
        upstream.catch_up(held.connection);
        let arrived = upstream.arrived();
        let mut late = arrived.accepted();
        late.retain(|stream| stream.whole.is_some_and(|whole| whole > told));
        assert!(
            late.is_empty(),
            "{row}: arrived after its 504:\n{}",
            arrived.history
        );
    }
}

/// Otherwise requests wait for the slowest of those before them, and time out there.
#[test]
fn requests_beyond_the_streams_of_a_connection_do_not_wait() {
    /// Three times the streams of a connection.
    const ALL: usize = 12;
    let offer = Offer {
        streams: 4,
        ..Offer::default()
    };
    let (upstream, proxy) = settled(offer, &[]);
    let mut clients: Vec<_> = (0..ALL)
        .map(|index| sent(&proxy, create(&index.to_string())))
        .collect();
    // None of them is answered before all have arrived.
    let arrived = upstream.wait(|arrived| arrived.accepted().len() == 1 + ALL);
    for stream in &arrived.accepted()[1..] {
        upstream.answer(stream.id, SUCCESS);
    }
    for client in &mut clients {
        assert_eq!(client.answer().status(), 200);
    }
}

/// `REFUSED_STREAM` says that a request was not carried out (RFC 9113, section 8.7).
#[test]
fn create_on_a_refused_stream_is_sent_again() {
    let (upstream, proxy) = settled(Offer::default(), &[("retry.total_time", "20s")]);
    let mut client = sent(&proxy, create("refused"));
    upstream.reset(upstream.whole(2), REFUSED_STREAM);
    upstream.answer(upstream.whole(3), SUCCESS);
    assert_eq!(client.answer().status(), 200);
    assert_eq!(accepted(&upstream), [body("refused")]);
}

/// So does GOAWAY of all streams above the last that it names, at whatever point they are.
#[test]
fn create_above_the_last_stream_of_goaway_is_sent_again_elsewhere() {
    for (window, when) in [(65_535, "after its body"), (0, "before its body")] {
        let offer = Offer {
            window,
            ..Offer::default()
        };
        let (upstream, proxy) = settled(offer, &[("retry.total_time", "20s")]);
        let mut client = sent(&proxy, create("refused"));
        let Id { connection, stream } = match window {
            0 => upstream.begun(2),
            _ => upstream.whole(2),
        };
        upstream.go_away(connection, stream.saturating_sub(2));
        let again = upstream.begun(3);
        assert_ne!(again.connection, connection, "{when}");
        upstream.open_window(again);
        upstream.answer(upstream.whole(3), SUCCESS);
        assert_eq!(client.answer().status(), 200, "{when}");
        assert_eq!(accepted(&upstream), [body("refused")], "{when}");
        // Nobody needs the other one any more.
        upstream.wait(|arrived| arrived.connections[connection].closed);
    }
}

/// A stream up to the last that GOAWAY names may have been carried out.
#[test]
fn create_up_to_the_last_stream_of_goaway_is_not_sent_again() {
    let (upstream, proxy) = settled(Offer::default(), &[]);
    let mut client = sent(&proxy, create("lost"));
    let Id { connection, stream } = upstream.whole(2);
    upstream.go_away(connection, stream);
    upstream.close(connection);
    assert_uncertain(&client.answer(), (502, 9104));
    assert_eq!(accepted(&upstream), [body("lost")]);
}

/// Any other code says nothing of what was carried out.
#[test]
fn create_on_a_stream_that_was_reset_is_not_sent_again() {
    for code in [NO_ERROR, INTERNAL_ERROR, CANCEL] {
        let (upstream, proxy) = settled(Offer::default(), &[]);
        let mut client = sent(&proxy, create("lost"));
        upstream.reset(upstream.whole(2), code);
        assert_uncertain(&client.answer(), (502, 9104));
        assert_eq!(accepted(&upstream), [body("lost")], "code {code}");
    }
}

/// The client still has the body that the proxy did not keep, and may be told so.
#[test]
fn refused_create_that_was_not_kept_is_for_the_client_to_send_again() {
    let (upstream, proxy) = settled(Offer::default(), &[("retry.replay_body", "1KiB")]);
    let large = format!(r#"{{"prompt":"{}"}}"#, "a cat ".repeat(1_000));
    let mut client = sent(&proxy, post("/v1/videos/text2video", large));
    upstream.reset(upstream.whole(2), REFUSED_STREAM);
    let answer = client.answer();
    assert_eq!(answer.refusal(), (502, 9101), "{}", answer.text());
    assert_eq!(
        answer.error(["retryable", "attempts"]),
        [json!(true), json!(1)]
    );
    assert_eq!(accepted(&upstream), [""; 0]);
}

/// A gateway that has lost its servers may answer PING for ever.
#[test]
fn connection_without_an_answer_is_not_used_again() {
    let settings = [
        ("retry.attempts", "1"),
        ("upstream.response_timeout", LIMIT),
    ];
    let (upstream, proxy) = settled(Offer::default(), &settings);
    let mut client = sent(&proxy, get("/v1/dead"));
    let dead = upstream.whole(2);
    assert_eq!(client.answer().refusal(), (504, 9102));
    client.send(get("/v1/alive"));
    let alive = upstream.whole(3);
    assert_ne!(alive.connection, dead.connection);
    upstream.answer(alive, SUCCESS);
    assert_eq!(client.answer().status(), 200);
}

/// Answers ten uploads, one after the other, each before it has ended, over one connection with two
/// streams. A window's worth of them comes, at most.
fn answer_early(upload: &[u8], coming: usize) {
    let offer = Offer {
        streams: 2,
        ..Offer::default()
    };
    let (upstream, proxy) = settled(offer, &[]);
    for count in 2..12 {
        let mut client = sent(&proxy, upload);
        let id = upstream.begun(count);
        upstream.wait(|arrived| arrived.stream(id).body.len() == coming);
        upstream.answer(id, SUCCESS);
        let answer = client.try_answer().expect("an answer for the client");
        assert_eq!((answer.status(), answer.text()), (200, SUCCESS));
        let arrived = upstream.wait(|arrived| arrived.stream(id).reset.is_some());
        assert_eq!(arrived.stream(id).whole, None);
        assert_eq!(arrived.connections.len(), 1);
    }
}

/// A stream whose request goes on although its answer is over counts as open, for both sides. The answer
/// must not be lost with it.
#[test]
fn upload_that_stalls_after_an_early_answer_gives_its_stream_back() {
    let upload = request("POST /v1/x", "content-length: 100000", "");
    answer_early(&upload, 0);
}

/// The same, where it is upstream that takes no more.
#[test]
fn upload_that_upstream_reads_no_further_gives_its_stream_back() {
    let upload = request("POST /v1/x", "", "x".repeat(100_000));
    answer_early(&upload, Offer::default().window as usize);
}

/// Whatever the code: without its `END_STREAM` an answer is not whole. `NO_ERROR` asks for no more of the
/// request (RFC 9113, section 8.1); that comes after a whole answer.
#[test]
fn answer_whose_stream_is_reset_is_cut_off() {
    let json = ("content-type", "application/json");
    let kinds = [
        ("known length", &[json, ("content-length", "4000")][..]),
        ("unknown length", &[json]),
        ("not held", &[("content-type", "video/mp4")]),
    ];
    let (upstream, proxy) = settled(Offer::default(), &[]);
    let (mut count, mut whole) = (1, Vec::new());
    for (kind, headers) in kinds {
        for code in [NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM, CANCEL] {
            for seen in [false, true] {
                let mut client = sent(&proxy, request("GET /v1/x", "connection: close", ""));
                count += 1;
                let id = upstream.whole(count);
                upstream.begin_answer(id, headers, r#"{"code":0,"data":{"#);
                let head = seen.then(|| client.head());
                upstream.reset(id, code);
                let cut_off = match head {
                    // Its declared length never comes, however it ends.
                    Some(head) if head.header("content-length").is_some() => true,
                    Some(_) => !client.rest().ends_with(b"0\r\n\r\n"),
                    None => is_cut_off(&client.try_answer()),
                };
                if !cut_off {
                    whole.push(format!("{kind}, code {code}, head seen first: {seen}"));
                }
            }
        }
    }
    assert_eq!(whole, [""; 0], "passed as whole answers");
}

/// R39. What clients do not read stays in the windows of their streams; nothing of it may be missing in
/// the window of the connection.
#[test]
fn answers_that_nobody_reads_hold_up_no_other_on_their_connection() {
    const STALLED: usize = 10;
    let (upstream, proxy) = settled(Offer::default(), &[]);
    let mut stalled = Vec::new();
    for count in 2..2 + STALLED {
        let mut client = sent(&proxy, get("/video.mp4"));
        let id = upstream.whole(count);
        upstream.begin_answer(id, &[("content-type", "video/mp4")], "a");
        client.head();
        stalled.push((client, id));
    }
    for (_, id) in &stalled {
        assert_eq!(id.connection, 0);
        upstream.pour(*id);
    }
    let mut client = sent(&proxy, get("/v1/x"));
    let id = upstream.whole(2 + STALLED);
    assert_eq!(id.connection, 0);
    let Arrived { connections, .. } = upstream.arrived();
    let room = connections[0].room;
    assert!(room > 64 << 10, "{room} bytes are left for all others");
    upstream.answer(id, SUCCESS);
    assert_eq!(client.answer().text(), SUCCESS);
}

/// R39. Some servers end each flush so. What comes now and then is no flood.
#[test]
fn empty_frames_that_come_now_and_then_do_not_end_a_connection() {
    let (upstream, proxy) = settled(Offer::default(), &[]);
    for count in 2..42 {
        let mut client = sent(&proxy, get("/v1/x"));
        let id = upstream.whole(count);
        let json = [("content-type", "application/json")];
        upstream.begin_answer(id, &json, "");
        upstream.say_nothing(id, 5);
        upstream.finish_answer(id, SUCCESS);
        assert_eq!(client.answer().text(), SUCCESS, "answer {count}");
    }
    assert_eq!(upstream.arrived().connections.len(), 1);
}

/// R39. Frames that say nothing cost work all the same.
#[test]
fn flood_of_empty_frames_ends_the_connection() {
    let (upstream, proxy) = settled(Offer::default(), &[("retry.attempts", "1")]);
    let mut client = sent(&proxy, get("/v1/x"));
    let id = upstream.whole(2);
    let video = [("content-type", "video/mp4")];
    upstream.begin_answer(id, &video, "a");
    client.head();
    upstream.say_nothing(id, 1_000_000);
    upstream.wait(|arrived| arrived.connections[id.connection].closed);
}

/// A reset after the head of an answer never says that nothing was done, whatever its code.
#[test]
fn answer_that_breaks_off_before_its_first_byte_is_an_error_and_no_create_is_sent_again() {
    let json = ("content-type", "application/json");
    for (headers, broken, code) in [
        (&[json][..], Some(INTERNAL_ERROR), 9104),
        (&[json], Some(REFUSED_STREAM), 9104),
        (&[json, ("content-length", "100")], None, 9103),
    ] {
        let (upstream, proxy) = settled(Offer::default(), &[]);
        let mut client = sent(&proxy, create("broken"));
        let id = upstream.whole(2);
        upstream.break_off(id, headers, broken);
        assert_uncertain(&client.answer(), (502, code));
        upstream.catch_up(id.connection);
        assert_eq!(accepted(&upstream), [body("broken")]);
    }
}

/// The task that it names is paid for, and the client knows nothing of it.
#[test]
fn late_answer_to_a_create_is_told_in_the_log() {
    let settings = [("upstream.response_timeout", LIMIT)];
    let (upstream, proxy) = settled(Offer::default(), &settings);
    let mut client = sent(&proxy, create("late"));
    let stream = upstream.whole(2);
    assert_uncertain(&client.answer(), (504, 9102));
    upstream.answer(stream, SUCCESS);
    let named = |line: &str| line.contains(TASK) && line.contains(r#""level":"WARN""#);
    let found = proxy.stderr.find(named).is_some();
    assert!(found, "no line at WARN names the task");
}

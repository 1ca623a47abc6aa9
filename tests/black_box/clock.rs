//! Tokens are made by upstream's clock, whatever this machine's says.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::support::{
    Credential, Message, PAUSE, Proxy, SUCCESS, Signal, Upstream, assert_has, claims, now, reply,
    send,
};

const HOUR: i64 = 3_600;
const MINUTE: i64 = 60;

/// Makes an upstream tell the time, so many seconds ahead of ours, and refuse tokens by it.
fn keep_time(upstream: &Upstream, ahead: &Arc<AtomicI64>) {
    keep_time_behind_a_front(upstream, ahead, 0);
}

/// The same, where what stands before upstream and dates all answers is so many seconds ahead of it.
fn keep_time_behind_a_front(upstream: &Upstream, ahead: &Arc<AtomicI64>, front: i64) {
    let ahead = Arc::clone(ahead);
    upstream.script(move |request| {
        let ahead = ahead.load(Relaxed);
        let time = now().checked_add_signed(ahead).unwrap();
        let shown = date(time.checked_add_signed(front).unwrap());
        let headers = format!("content-type: application/json\n{shown}");
        let (status, body) = match request.method() {
            "HEAD" => (200, ""),
            _ => match validity(request) {
                [nbf, _] if nbf > time => (401, r#"{"code":1003,"message":"not yet valid"}"#),
                [_, exp] if exp <= time => (401, r#"{"code":1004,"message":"expired"}"#),
                _ => (200, SUCCESS),
            },
        };
        vec![send(reply(status, &headers, body))]
    });
}

fn date(time: u64) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(time);
    format!("date: {}", httpdate::fmt_http_date(time))
}

fn ahead_by(seconds: i64) -> (Upstream, Arc<AtomicI64>) {
    let (upstream, ahead) = (
        Upstream::lenient("http/1.1"),
        Arc::new(AtomicI64::new(seconds)),
    );
    keep_time(&upstream, &ahead);
    (upstream, ahead)
}

/// `nbf` and `exp` of the token that a request shows.
fn validity(request: &Message) -> [u64; 2] {
    let claims = claims(request.header("authorization").expect("a token"));
    ["nbf", "exp"].map(|claim| claims[claim].as_u64().unwrap())
}

/// How far ahead of ours the clock is that the latest token was made by, in seconds.
fn token_ahead(upstream: &Upstream) -> i64 {
    let [_, exp] = validity(&upstream.last());
    exp.checked_signed_diff(now() + 1_800).unwrap()
}

/// Fails unless the latest token is by the true time, minted since then.
#[track_caller]
fn assert_on_time(upstream: &Upstream, begun: u64, case: &str) {
    let ahead = token_ahead(upstream);
    let since = begun.checked_signed_diff(now()).unwrap();
    assert!((since - 1..=1).contains(&ahead), "{case}: {ahead}");
}

/// What the metrics say of upstream's clock.
fn gauge(proxy: &Proxy) -> f64 {
    proxy.metric("kling_proxy_clock_offset_seconds")
}

#[test]
fn tokens_are_made_by_upstreams_clock() {
    for (ahead, word) in [
        (HOUR, "slow"),
        (-HOUR, "fast"),
        (24 * HOUR - MINUTE, "slow"),
        (-24 * HOUR + MINUTE, "fast"),
    ] {
        let (upstream, _) = ahead_by(ahead);
        let proxy = Proxy::to(&upstream).start();
        assert_eq!(proxy.get("/v1/x").status(), 200, "ahead by {ahead} s");
        assert_eq!(upstream.seen().requests.len(), 2, "refused once");
        let token = token_ahead(&upstream);
        assert!((ahead - 2..=ahead + 2).contains(&token), "{token}");
        #[expect(clippy::cast_precision_loss, reason = "days have few seconds")]
        let distance = (gauge(&proxy) - ahead as f64).abs();
        assert!(distance < 2.0, "ahead by {ahead} s: {}", gauge(&proxy));
        proxy.signal(Signal::TERM);
        let (_, log) = proxy.end();
        assert_has(&log, &[&format!("this machine's clock is {word}")]);
        assert_eq!(log.matches("this machine's clock").count(), 1, "{log}");
    }
}

#[test]
fn question_at_start_tells_the_time_before_the_first_request() {
    for ahead in [HOUR, -HOUR] {
        let (upstream, _) = ahead_by(ahead);
        let proxy = Proxy::to(&upstream).start_warm();
        assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
        let lines = upstream.first_lines();
        assert_eq!(lines, ["HEAD / HTTP/1.1", "POST /v1/x HTTP/1.1"], "{ahead}");
    }
}

#[test]
fn time_that_is_out_of_reason_or_unauthenticated_is_not_learned() {
    let plain = Upstream::expecting(Credential::Any);
    keep_time(&plain, &Arc::new(AtomicI64::new(HOUR)));
    for (case, upstream) in [
        ("more than a day ahead", ahead_by(24 * HOUR + MINUTE).0),
        ("more than a day behind", ahead_by(-24 * HOUR - MINUTE).0),
        ("right", ahead_by(0).0),
        ("not TLS", plain),
    ] {
        let proxy = Proxy::to(&upstream).start();
        let begun = now();
        proxy.get("/v1/learn");
        proxy.get("/v1/know");
        assert_on_time(&upstream, begun, case);
        assert!(gauge(&proxy).abs() < 0.5, "{case}: {}", gauge(&proxy));
    }
}

#[test]
fn date_of_a_cached_answer_is_not_learned() {
    let upstream = Upstream::lenient("http/1.1");
    let stored = date(now() - 3_600);
    upstream.answer(reply(200, &format!("{stored}\nage: 3600"), SUCCESS));
    let proxy = Proxy::to(&upstream).start();
    let begun = now();
    proxy.get("/v1/learn");
    proxy.get("/v1/know");
    assert_on_time(&upstream, begun, "cached");
}

/// R40. `Date` is written by what stands before upstream; whether a token is accepted is what counts.
#[test]
fn front_with_another_clock_locks_nobody_out() {
    for front in [HOUR, -23 * HOUR] {
        for warm in [true, false] {
            let upstream = Upstream::lenient("http/1.1");
            keep_time_behind_a_front(&upstream, &Arc::default(), front);
            let proxy = Proxy::to(&upstream);
            let proxy = if warm {
                proxy.start_warm()
            } else {
                proxy.start()
            };
            let case = format!("front ahead by {front} s, asked at start: {warm}");
            assert_eq!(proxy.get("/v1/first").status(), 200, "{case}");
            let attempts = upstream.seen().requests.len();
            // Longer than there is between two samples.
            let begun = Instant::now();
            let mut count = 0;
            while begun.elapsed() < Duration::from_millis(1_500) {
                assert_eq!(proxy.get("/v1/next").status(), 200, "{case}");
                count += 1;
                thread::sleep(PAUSE);
            }
            let seen = upstream.seen().requests.len();
            assert_eq!(seen, attempts + count, "{case}: refused again");
            assert!(gauge(&proxy).abs() < 0.5, "{case}: {}", gauge(&proxy));
            proxy.signal(Signal::TERM);
            let (_, log) = proxy.end();
            assert!(!log.contains("this machine's clock"), "{case}: {log}");
        }
    }
}

#[test]
fn clock_that_is_set_while_running_is_learned_from_the_refusal() {
    let (upstream, ahead) = ahead_by(0);
    let proxy = Proxy::to(&upstream).start();
    assert_eq!(proxy.get("/v1/before").status(), 200);
    for step in [HOUR, -HOUR, 23 * HOUR, 0] {
        ahead.store(step, Relaxed);
        assert_eq!(proxy.get("/v1/x").status(), 200, "ahead by {step} s");
    }
}

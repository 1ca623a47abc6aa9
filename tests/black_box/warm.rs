//! A client that calls now and then does not wait for a connection to upstream.

use std::time::Duration;

use tokio::time::Instant;

use crate::support::{Command, Proxy, Signal, Upstream, eventually, get, post};

const PROTOCOLS: [&str; 2] = ["http/1.1", "h2"];

/// From here to upstream.
const WAY: Duration = Duration::from_millis(100);

#[test]
fn one_shot_client_pays_one_round_trip() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::far_away(protocol, WAY);
        // A busy machine may hold up the shots of many a proxy, but not those of each.
        eventually("no shot waits for more", || {
            let proxy = Proxy::to(&upstream)
                .setting("upstream.keep_warm", "1m")
                .start_warm();
            let shot = |_| {
                let start = Instant::now();
                assert_eq!(proxy.get("/v1/x").status(), 200);
                start.elapsed()
            };
            (1..=3).map(shot).all(|took| took < 4 * WAY)
        });
    }
}

#[test]
fn start_asks_upstream_once_without_a_credential_and_leaves_a_connection() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::lenient(protocol);
        let proxy = Proxy::to(&upstream).start_warm();
        assert_eq!(proxy.get("/v1/x").status(), 200);
        let seen = upstream.seen();
        let [probe, request] = &seen.requests[..] else {
            panic!("{protocol}: {:?}", upstream.first_lines());
        };
        assert!(probe.first_line().starts_with("HEAD / "), "{}", probe.head);
        let names: Vec<_> = probe.headers().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["host", "user-agent"], "{protocol}");
        assert_eq!(request.values("authorization").len(), 1);
        assert_eq!(seen.connections, 1, "{protocol}");
    }
}

#[test]
fn upstream_that_is_not_there_stops_no_start() {
    let gone = Command::new([]).setting("upstream.url", "https://localhost:1");
    let proxy = gone
        .keys()
        .setting("upstream.warm_up", "true")
        .setting("upstream.keep_warm", "10m")
        .start();
    assert_eq!(proxy.admin("/health/ready").status(), 200);
    let told = |line: &str| line.contains("upstream does not answer yet");
    let line = proxy.stderr.find(told).expect("a line");
    assert!(line.contains(r#""level":"INFO""#), "{line}");
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn connection_is_given_up_when_nobody_has_asked_for_long() {
    let upstream = Upstream::lenient("http/1.1");
    let proxy = Proxy::to(&upstream)
        .setting("upstream.keep_warm", "4s")
        .start_warm();
    upstream.wait(|seen| seen.closed == 1);
    // Somebody does again.
    assert_eq!(proxy.get("/v1/x").status(), 200);
    upstream.wait(|seen| seen.connections == 3 && seen.closed == 2);
}

#[test]
fn requests_that_follow_one_another_get_a_connection_of_their_own() {
    for protocol in PROTOCOLS {
        let upstream = Upstream::lenient(protocol);
        let proxy = Proxy::to(&upstream).start_warm();
        let mut client = proxy.connect();
        for _ in 1..=2 {
            assert_eq!(client.send(get("/v1/x")).answer().status(), 200);
        }
        upstream.wait(|seen| seen.connections == 2);
        // It may take a moment to be ready; from then on nothing new is opened.
        eventually("connections are kept", || {
            let before = upstream.seen().connections;
            for _ in 1..=5 {
                assert_eq!(client.send(get("/v1/x")).answer().status(), 200);
            }
            upstream.seen().connections == before
        });
    }
}

#[test]
fn what_goes_over_the_kept_connection_is_not_cut_by_the_end() {
    let upstream = Upstream::lenient("http/1.1");
    let proxy = Proxy::to(&upstream)
        .setting("upstream.keep_warm", "1m")
        .start_warm();
    let gate = upstream.hold();
    let mut client = proxy.connect();
    client.send(post("/v1/x", "{}"));
    upstream.wait(|seen| seen.requests.len() == 2);
    assert_eq!(upstream.seen().connections, 1, "on the kept one");
    proxy.signal(Signal::TERM);
    let drains = |line: &str| line.contains("shutting down");
    assert!(proxy.stderr.find(drains).is_some());
    gate.open();
    assert_eq!(client.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

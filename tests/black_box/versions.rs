//! Which version of HTTP upstream is asked in, where it speaks both.

use std::time::Duration;

use crate::support::{Connection, Proxy, Upstream, eventually, get, post};

/// As many as a thread sends by HTTP/1.1 at once.
const FEW: usize = 32;
/// As many at once as leave at most four threads more than those.
const CROWD: usize = 5 * FEW;

/// Sends the same on many connections at once, all of which upstream holds until it has them; tells
/// how many came by each version, HTTP/1.1 first.
fn crowd(request: &[u8]) -> [usize; 2] {
    let upstream = Upstream::tls("h2,http/1.1");
    let gate = upstream.hold();
    // As many handshakes at once take long on a busy machine.
    let proxy = Proxy::to(&upstream)
        .setting("upstream.connect_timeout", "20s")
        .start();
    let mut clients: Vec<_> = (0..CROWD).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(request);
    }
    upstream.wait(|seen| seen.requests.len() == CROWD);
    gate.open();
    let mut statuses = clients.iter_mut().map(Connection::answer);
    assert!(statuses.all(|answer| answer.status() == 200));
    let lines = upstream.first_lines();
    ["HTTP/1.1", "HTTP/2"]
        .map(|version| lines.iter().filter(|line| line.ends_with(version)).count())
}

#[test]
fn requests_that_come_one_at_a_time_go_over_one_connection_of_http_1() {
    let upstream = Upstream::tls("h2,http/1.1");
    let proxy = Proxy::to(&upstream).start();
    let mut client = proxy.connect();
    for _ in 0..5 {
        assert_eq!(client.send(get("/v1/x")).answer().status(), 200);
    }
    assert_eq!(upstream.first_lines(), ["GET /v1/x HTTP/1.1"; 5]);
    assert_eq!(upstream.seen().connections, 1);
}

#[test]
fn requests_beyond_the_first_few_share_a_connection_of_http_2() {
    for request in [get("/v1/x"), post("/v1/x", "{}")] {
        let [few, many] = crowd(&request);
        assert!(
            (FEW..=4 * FEW).contains(&few) && few + many == CROWD,
            "{few}"
        );
    }
}

#[test]
fn thread_that_borrowed_gets_a_connection_for_many_requests() {
    let upstream = Upstream::lenient("h2,http/1.1");
    let proxy = Proxy::to(&upstream)
        .setting("upstream.keep_warm", "1m")
        .start_warm();
    // The one for all threads is taken, so that another is made ready: one of HTTP/2.
    let gate = upstream.hold();
    let mut first = proxy.connect();
    first.send(get("/v1/x"));
    let ready = proxy
        .stderr
        .find(|line| line.contains("connection kept ready"));
    assert!(ready.is_some(), "none was made ready");
    upstream.wait(|seen| seen.shared == 1);
    gate.open();
    assert_eq!(first.answer().status(), 200);
    let mut clients: Vec<_> = (0..CROWD).map(|_| proxy.connect()).collect();
    eventually("a thread has one of its own", || {
        for client in &mut clients {
            client.send(get("/v1/x"));
        }
        let mut statuses = clients.iter_mut().map(Connection::answer);
        assert!(statuses.all(|answer| answer.status() == 200));
        upstream.seen().shared > 1
    });
}

#[test]
fn burst_connects_at_once_where_upstream_speaks_http_1_only() {
    let upstream = Upstream::far_away("http/1.1", Duration::from_millis(100));
    let proxy = Proxy::to(&upstream)
        .setting("upstream.connect_timeout", "8s")
        .setting("retry.attempts", "1")
        .start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
    let mut clients: Vec<_> = (0..2 * FEW).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(get("/v1/x"));
    }
    // One after the other, 0.4 s each, those beyond the first few would be given up.
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.answer().status())
        .collect();
    assert_eq!(statuses, [200; 2 * FEW]);
}

#[test]
fn large_body_goes_by_http_1() {
    assert_eq!(crowd(&post("/v1/x", vec![b' '; 256 << 10])), [CROWD, 0]);
}

#[test]
fn body_of_unknown_length_goes_by_http_1() {
    let chunked = b"POST /v1/x HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n\
        2\r\n{}\r\n0\r\n\r\n";
    assert_eq!(crowd(chunked), [CROWD, 0]);
}

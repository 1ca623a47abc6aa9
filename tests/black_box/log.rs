//! A log that nobody reads holds up nothing, and what is lost of it is told.

use crate::support::{Gate, Proxy, Signal, Upstream, assert_has, eventually, get, post, started};

/// Has a proxy write lines until no more fit anywhere: the pipe and the queue are full.
fn fill(proxy: &Proxy) {
    let path = format!("/v1/{}", "x".repeat(1000));
    eventually("the log is stuck", || {
        let mut client = proxy.connect();
        for _ in 0..100 {
            assert_eq!(client.send(get(&path)).answer().status(), 200);
        }
        proxy.admin("/health/ready").status() == 503
    });
}

/// A proxy that logs every request, to a pipe that nobody reads before the gate is open.
fn unread() -> (Upstream, Proxy, Gate) {
    let (upstream, gate) = (Upstream::ok(), Gate::default());
    let proxy = Proxy::to(&upstream)
        .setting("log.filter", "kling_proxy=debug")
        .unread_log(&gate)
        .start();
    (upstream, proxy, gate)
}

/// R34.
#[test]
fn log_that_nobody_reads_holds_up_no_request() {
    let (upstream, proxy, gate) = unread();
    fill(&proxy);
    let ready = proxy.admin("/health/ready");
    assert_has(ready.text(), &["nobody reads standard error"]);
    assert_eq!(proxy.admin("/health/live").status(), 200);
    let mut client = proxy.connect();
    for _ in 0..200 {
        assert_eq!(client.send(post("/v1/x", "{}")).answer().status(), 200);
    }
    assert!(upstream.seen().requests.len() >= 300);
    let metrics = proxy.admin("/metrics");
    let lost = metrics
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("kling_proxy_log_lines_dropped_total "));
    assert!(lost.unwrap().parse::<f64>().unwrap() >= 200.0, "{lost:?}");

    gate.open();
    eventually("the log is read", || {
        proxy.admin("/health/ready").status() == 200
    });
    let told = proxy
        .stderr
        .find(|line| line.contains("log lines were lost"));
    assert_has(&told.expect("a line"), &["WARN", r#""lost":"#]);
}

/// R34.
#[test]
fn log_that_nobody_reads_holds_up_no_end() {
    let (_upstream, proxy, gate) = unread();
    fill(&proxy);
    proxy.signal(Signal::TERM);
    // Closed by the end of the process.
    proxy.stdout.to_end();
    gate.open();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    // Whole lines, as far as they were written.
    assert_has(&log, &["credential"]);
}

#[test]
fn line_of_a_create_is_written_before_the_process_ends() {
    let (_upstream, proxy) = started();
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
    proxy.signal(Signal::TERM);
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert_has(&log, &[r#""answered""#, r#""shut down""#]);
}

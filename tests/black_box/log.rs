//! A log that nobody reads holds up nothing, and what is lost of it is told.

use std::{fs::OpenOptions, os::unix::fs::OpenOptionsExt as _};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::Value;
use tempfile::TempDir;

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

fn lost(proxy: &Proxy) -> f64 {
    proxy.metric("kling_proxy_log_lines_dropped_total")
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
    assert_has(ready.text(), &["standard error does not take them"]);
    assert_eq!(proxy.admin("/health/live").status(), 200);
    let mut client = proxy.connect();
    for _ in 0..200 {
        assert_eq!(client.send(post("/v1/x", "{}")).answer().status(), 200);
    }
    assert!(upstream.seen().requests.len() >= 300);
    assert!(lost(&proxy) >= 200.0);

    gate.open();
    eventually("the log is read", || {
        proxy.admin("/health/ready").status() == 200
    });
    let told = proxy
        .stderr
        .find(|line| line.contains("log lines were lost"));
    let told: Value = serde_json::from_str(&told.expect("a line")).unwrap();
    assert_eq!(told["level"], "WARN");
    assert_eq!(told["lost"].as_f64(), Some(lost(&proxy)));
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

/// R34.
#[test]
fn log_whose_disk_is_full_or_whose_reader_has_gone_holds_up_nothing_and_is_told() {
    let upstream = Upstream::ok();
    let folder = TempDir::new().unwrap();
    let pipe = folder.path().join("log");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let reader = || {
        let mut options = OpenOptions::new();
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        options.read(true).custom_flags(flags).open(&pipe).unwrap()
    };
    for log in ["/dev/full", pipe.to_str().unwrap()] {
        let first = reader();
        let command = Proxy::to(&upstream).after(&format!("exec 2>{log};"));
        let proxy = command.start();
        drop(first);
        assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
        eventually("the lines are counted", || lost(&proxy) >= 2.0);
        let ready = proxy.admin("/health/ready");
        assert_eq!(ready.status(), 503);
        assert_has(ready.text(), &["standard error does not take them"]);
        assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
        if log != "/dev/full" {
            // No request comes to a proxy that is not ready, so it has to find out on its own.
            let _second = reader();
            eventually("the log is read again", || {
                proxy.admin("/health/ready").status() == 200
            });
        }
        proxy.signal(Signal::TERM);
        assert_eq!(proxy.end().0, Some(0));
    }
}

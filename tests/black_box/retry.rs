//! What is sent again, how often and when: never a create that may have worked, and never a crowd.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use serde_json::json;
use tokio::time::{Duration, Instant};

use crate::support::{
    Command, Connection, Credential, Proxy, SUCCESS, Step, Upstream, assert_has, closed, get,
    kling, post, reply, request, send, started, started_with,
};

/// Answers the next request with these bytes and closes, and those after it well.
fn bad_then_good(upstream: &Upstream, bad: impl AsRef<[u8]>) {
    let (bad, asked) = (bad.as_ref().to_vec(), AtomicUsize::new(0));
    upstream.script(move |_| match asked.fetch_add(1, Relaxed) {
        0 => vec![send(&bad), Step::Close],
        _ => vec![send(kling(200, SUCCESS))],
    });
}

fn refusal(code: u16, headers: &str) -> Vec<u8> {
    let body = format!(r#"{{"code":{code},"message":"no","request_id":"up-2"}}"#);
    let status = match code {
        5001 => 503,
        1302 | 1303 => 429,
        _ => 400,
    };
    let headers = format!("content-type: application/json\nconnection: close\n{headers}");
    reply(status, &headers, body)
}

/// R30, and the table of resending: how often upstream sees a read and a create after which outcome.
#[test]
fn only_what_cannot_have_worked_is_sent_again() {
    let mut rows = vec![
        ("connection lost".to_owned(), Vec::new(), [2, 1]),
        ("cut in the head".to_owned(), b"HTTP/1.1 2".to_vec(), [2, 1]),
        ("not HTTP".to_owned(), b"SSH-2.0-x\r\n".to_vec(), [1, 1]),
    ];
    for (statuses, attempts) in [(&[502, 503, 504][..], [2, 1]), (&[404, 429, 500], [1, 1])] {
        for status in statuses {
            let headers = "content-type: text/html\nconnection: close";
            let html = reply(*status, headers, "<h1>");
            rows.push((format!("bare {status}"), html, attempts));
        }
    }
    #[rustfmt::skip]
    let codes = [
        (&[1003, 1004, 1302, 1303][..], [2, 2]),
        (&[5000, 5001, 5002], [2, 1]),
        (&[1000, 1001, 1002, 1100, 1101, 1102, 1103, 1200, 1201, 1202, 1203, 1300, 1301, 1304, 1999, 9101], [1, 1]),
    ];
    for (codes, attempts) in codes {
        for code in codes {
            rows.push((format!("code {code}"), refusal(*code, ""), attempts));
        }
    }
    let (upstream, proxy) = started();
    for (row, bad, attempts) in rows {
        let requests = [get("/v1/videos/1"), post("/v1/videos/text2video", "{}")];
        for (request, attempts) in requests.into_iter().zip(attempts) {
            let before = upstream.seen().requests.len();
            bad_then_good(&upstream, &bad);
            let answer = proxy.send(&request);
            let seen = upstream.seen().requests.split_off(before);
            assert_eq!(seen.len(), attempts, "{row}: {}", answer.text());
            assert_eq!(answer.status() == 200, attempts == 2, "{row}");
        }
    }
}

#[test]
fn posts_that_read_are_sent_again_as_reads() {
    let (upstream, proxy) = started();
    for (path, attempts) in [
        ("/tasks", 2),
        ("/solutions", 2),
        ("/account/billing/usage", 2),
        ("/account/billing/../v1/videos", 1),
        ("/tasks/1", 1),
    ] {
        let before = upstream.seen().requests.len();
        bad_then_good(&upstream, "");
        proxy.post(path, "{}");
        assert_eq!(upstream.seen().requests.len() - before, attempts, "{path}");
    }
}

#[test]
fn attempts_are_bounded_and_told() {
    for (setting, attempts) in [("", 3), ("1", 1), ("2", 2)] {
        let (upstream, proxy) = started_with(&[("retry.attempts", setting)]);
        upstream.answer(refusal(5001, ""));
        let answer = proxy.get("/v1/x");
        assert_eq!(answer.error(["attempts"]), [json!(attempts)]);
        assert_eq!(answer.status(), 503);
        assert_eq!(upstream.seen().requests.len(), attempts, "{setting}");
    }
}

#[test]
fn number_of_resends_stands_in_the_log() {
    let (upstream, proxy) = started();
    bad_then_good(&upstream, refusal(1303, ""));
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
    for part in ["sending again", "\"http.request.resend_count\":1"] {
        let found = proxy.stderr.find(|line| line.contains(part));
        assert!(found.is_some(), "{part}: {}", proxy.stderr.to_end());
    }
}

#[test]
fn unreachable_upstream_is_asked_again_also_for_a_create() {
    let (_closed, nobody) = closed();
    let upstream = Upstream::ok();
    let url = format!("http://{nobody}");
    let proxy = Proxy::to(&upstream).setting("upstream.url", url).start();
    let answer = proxy.post("/v1/x", "{}");
    assert_eq!(answer.refusal(), (502, 9101));
    assert_eq!(answer.error(["attempts"]), [json!(3)]);
}

#[test]
fn time_for_all_attempts_is_bounded() {
    let (upstream, proxy) = started_with(&[("retry.total_time", "0s")]);
    upstream.answer(refusal(1303, ""));
    assert_eq!(proxy.post("/v1/x", "{}").error(["attempts"]), [json!(1)]);
    assert_has(
        proxy.admin("/metrics").text(),
        &["kling_proxy_resends_withheld_total{reason=\"time\"} 1"],
    );
}

#[test]
fn retry_after_is_obeyed_where_it_fits_and_else_passed_on() {
    let (upstream, proxy) = started();
    bad_then_good(&upstream, refusal(1302, "retry-after: 1"));
    let begun = Instant::now();
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
    assert!(
        begun.elapsed() >= Duration::from_secs(1),
        "{:?}",
        begun.elapsed()
    );

    let before = upstream.seen().requests.len();
    upstream.answer(refusal(1302, "retry-after: 60"));
    let answer = proxy.post("/v1/x", "{}");
    assert_eq!(answer.header("retry-after"), Some("60"));
    assert_eq!(upstream.seen().requests.len() - before, 1);
}

#[test]
fn token_found_too_early_or_too_late_is_replaced_once() {
    let (upstream, proxy) = started_with(&[("retry.attempts", "5")]);
    upstream.answer(refusal(1004, ""));
    assert_eq!(proxy.post("/v1/x", "{}").error(["attempts"]), [json!(2)]);
    let minted = "kling_proxy_tokens_minted_total{outcome=\"ok\"} 2";
    assert_has(proxy.admin("/metrics").text(), &[minted]);
}

#[test]
fn api_key_is_not_sent_again_after_a_refusal() {
    let upstream = Upstream::expecting(Credential::ApiKey("api-key-of-retry"));
    let command = Command::new([]).upstream(&upstream);
    let proxy = command.env("KLING_API_KEY", "api-key-of-retry").start();
    upstream.answer(refusal(1004, ""));
    assert_eq!(proxy.get("/v1/x").error(["attempts"]), [json!(1)]);
}

/// A body that is not all the same, so that a wrong order or a gap shows.
fn body(size: usize) -> Vec<u8> {
    let letters = (b'a'..=b'z').chain(b'0'..=b'8');
    letters.cycle().take(size).collect()
}

#[test]
fn body_is_sent_again_byte_for_byte() {
    let (upstream, proxy) = started();
    for size in [1, 3_000, 65_536, 900_000] {
        let body = body(size);
        let chunked = format!(
            "{size:x}\r\n{}\r\n0\r\n\r\n",
            String::from_utf8_lossy(&body)
        );
        let chunked = request("POST /v1/x", "transfer-encoding: chunked", chunked);
        for request in [post("/v1/x", &body), chunked] {
            let before = upstream.seen().requests.len();
            bad_then_good(&upstream, refusal(1303, "retry-after: 0"));
            assert_eq!(proxy.send(request).status(), 200, "{size}");
            let seen = upstream.seen().requests.split_off(before);
            assert_eq!(seen.len(), 2, "{size}");
            for each in seen {
                assert!(each.text().as_bytes() == body, "{size} bytes, but others");
            }
        }
    }
}

#[test]
fn body_over_a_bound_is_sent_once() {
    for (key, reason) in [
        ("retry.replay_body", "body"),
        ("retry.replay_memory", "memory"),
    ] {
        let (upstream, proxy) = started_with(&[(key, "64KiB")]);
        upstream.answer(refusal(1303, "retry-after: 0"));
        let answer = proxy.post("/v1/x", body(65_537));
        assert_eq!(answer.error(["attempts"]), [json!(1)], "{key}");
        let counted = [
            format!("kling_proxy_request_bodies_not_kept_total{{reason=\"{reason}\"}} 1"),
            "kling_proxy_resends_withheld_total{reason=\"body\"} 1".to_owned(),
        ];
        assert_has(proxy.admin("/metrics").text(), &[&counted[0], &counted[1]]);
        // What was kept is given back.
        for _ in 0..3 {
            let answer = proxy.post("/v1/x", body(40_000));
            assert_eq!(answer.error(["attempts"]), [json!(3)], "{key}");
        }
    }
}

/// R30.
#[test]
fn failing_upstream_is_not_flooded() {
    const REQUESTS: usize = 400;
    let (upstream, proxy) = started_with(&[("retry.attempts", "10"), ("retry.total_time", "1s")]);
    upstream.script(|_| vec![Step::Close]);
    let address = proxy.address;
    let clients = (0..40).map(|client| {
        thread::spawn(move || {
            for _ in 0..REQUESTS / 40 {
                let request = if client % 2 == 0 {
                    get("/v1/x")
                } else {
                    post("/v1/x", "{}")
                };
                assert_eq!(Connection::to(address).send(request).answer().status(), 502);
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.join().unwrap();
    }
    let requests = upstream.seen().requests;
    let creates = requests
        .iter()
        .filter(|each| each.method() == "POST")
        .count();
    assert_eq!(creates, REQUESTS / 2, "each create exactly once");
    assert!(
        requests.len() <= REQUESTS * 12 / 10 + 100,
        "{}",
        requests.len()
    );
    assert!(
        requests.len() > REQUESTS + 50,
        "some were sent again: {}",
        requests.len()
    );
}

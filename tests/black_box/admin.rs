//! The admin listener's own guard: what is not health or metrics is for this machine, and for no page.

use crate::support::{
    Command, Connection, Message, Proxy, Upstream, eventually, request, started, started_with,
};

const QUIT: &str = "POST /quit";

/// What the admin listener answers to a request with these header lines.
fn ask(proxy: &Proxy, line: &str, headers: &str) -> Message {
    let mut bytes = format!("{line} HTTP/1.1\r\n{headers}\r\n");
    bytes += if line.starts_with("POST") {
        "content-length: 0\r\n\r\n"
    } else {
        "\r\n"
    };
    Connection::to(proxy.listener("admin")).send(bytes).answer()
}

/// R6.
#[test]
fn admin_listener_refuses_foreign_hosts_and_pages() {
    let (_upstream, proxy) = started_with(&[
        ("admin.quit", "true"),
        ("access.allowed_origins", r#"["http://app.test"]"#),
    ]);
    for (headers, refusal) in [
        ("host: evil.test", (421, 9001)),
        ("host: localhost.evil.test:5547", (421, 9001)),
        ("host: localhost\r\norigin: http://evil.test", (403, 9002)),
        ("host: localhost\r\norigin: null", (403, 9002)),
        ("host: localhost\r\norigin: http://app.test", (403, 9002)),
        ("host: localhost\r\nsec-fetch-site: cross-site", (403, 9002)),
        ("host: localhost\r\nsec-fetch-site: same-site", (403, 9002)),
    ] {
        for line in [QUIT, "GET /", "GET /quit", "GET /settings"] {
            let answer = ask(&proxy, line, headers);
            assert_eq!(answer.refusal(), refusal, "{line} with {headers}");
            assert_eq!(answer.header("access-control-allow-origin"), None);
        }
        assert_eq!(ask(&proxy, "GET /metrics", headers).status(), 200);
    }
    assert_eq!(
        ask(&proxy, "GET /health/ready", "host: localhost").status(),
        200
    );
}

/// R6.
#[test]
fn health_and_metrics_change_nothing_and_no_page_reads_them() {
    let (_upstream, proxy) = started_with(&[]);
    let page = "host: localhost\r\norigin: https://evil.test";
    for path in ["/health/live", "/health/ready", "/metrics"] {
        for (method, status) in [("GET", 200), ("POST", 405), ("PUT", 405), ("DELETE", 405)] {
            let answer = ask(&proxy, &format!("{method} {path}"), page);
            assert_eq!(answer.status(), status, "{method} {path}");
            assert!(!answer.head.contains("access-control-"), "{}", answer.head);
        }
    }
}

/// R6.
#[test]
fn quit_is_a_post_and_off_by_default() {
    let (_upstream, proxy) = started_with(&[]);
    assert_eq!(ask(&proxy, QUIT, "host: localhost").refusal(), (404, 9007));
    let (_upstream, proxy) = started_with(&[("admin.quit", "true")]);
    for method in ["GET", "PUT", "OPTIONS"] {
        let answer = ask(&proxy, &format!("{method} /quit"), "host: localhost");
        assert_eq!(answer.status(), 405, "{method}");
    }
    assert_eq!(
        ask(&proxy, "GET /health/ready", "host: localhost").status(),
        200
    );
}

#[test]
fn quit_ends_the_proxy_as_a_signal_does() {
    let (upstream, proxy) = started_with(&[("admin.quit", "true")]);
    let gate = upstream.hold();
    let mut slow = proxy.connect();
    slow.send(request("GET /v1/slow", "", ""));
    upstream.wait(|seen| seen.requests.len() == 1);
    let answer = ask(&proxy, QUIT, "host: 127.0.0.1");
    assert_eq!(
        (answer.status(), &answer.json()["phase"]),
        (200, &"stopping".into())
    );
    eventually("it drains", || {
        ask(&proxy, "GET /health/ready", "host: localhost").status() == 503
    });
    gate.open();
    assert_eq!(slow.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

/// R6: what other machines can reach shows health and metrics, and that is all.
#[test]
fn admin_listener_beyond_loopback_serves_health_and_metrics_only() {
    let upstream = Upstream::ok();
    let proxy = Proxy::to(&upstream)
        .setting("admin.address", "0.0.0.0:0")
        .start();
    for line in [QUIT, "GET /", "GET /quit"] {
        assert_eq!(ask(&proxy, line, "host: localhost").status(), 404, "{line}");
    }
    assert_eq!(
        ask(&proxy, "GET /health/live", "host: 10.0.0.7").status(),
        200
    );

    let finished = Command::new([])
        .keys()
        .setting("admin.address", "0.0.0.0:0")
        .setting("admin.quit", "true")
        .run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert!(finished.stderr.contains("admin.quit"), "{finished:?}");
}

/// R25: nothing that the admin listener shows can run in a browser.
#[test]
fn admin_answers_run_no_script() {
    let (_upstream, proxy) = started();
    for line in ["GET /metrics", "GET /health/ready", "GET /", "GET /nothing"] {
        let answer = ask(&proxy, line, "host: localhost");
        assert_eq!(
            answer.told(["content-security-policy", "x-content-type-options"]),
            [Some("default-src 'self'"), Some("nosniff")],
            "{line}"
        );
    }
}

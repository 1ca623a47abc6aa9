//! The admin listener's own guard: what is not health or metrics is for this machine, and for no page.

use std::{
    fs::{self, Permissions},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use crate::support::{
    Command, Connection, Message, Proxy, Upstream, eventually, get, post, request, started,
    started_with,
};

const QUIT: &str = "POST /quit";
/// Far more than the admin listener has room for.
const SILENT: usize = 1000;

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
            // It would not help here.
            let message = answer.json()["message"].to_string();
            assert!(!message.contains("allowed_origins"), "{headers}");
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

/// R6. The data listener asks for client tokens, and the admin listener does not.
#[test]
fn tasks_are_shown_to_this_machine_if_clients_need_no_token() {
    let (_upstream, proxy) = started_with(&[("state.url", "memory")]);
    proxy.post("/v1/videos/text2video", r#"{"external_task_id":"a cat/1"}"#);
    let listed = proxy.get("/_proxy/tasks").json();
    let task = &listed["tasks"][0];
    assert_eq!(proxy.admin("/_proxy/tasks").json(), listed);
    for path in ["a%20cat%2F1", task["ref"].as_str().unwrap()] {
        assert_eq!(proxy.admin(&format!("/_proxy/tasks/{path}")).json(), *task);
    }
    assert!(proxy.admin("/").text().contains("href=\"/_proxy/tasks\""));
    for (line, headers, refusal) in [
        ("GET", "host: evil.test", (421, 9001)),
        (
            "GET",
            "host: localhost\r\norigin: https://evil.test",
            (403, 9002),
        ),
        ("DELETE", "host: localhost", (405, 9005)),
        ("POST", "host: localhost", (405, 9005)),
    ] {
        let answer = ask(&proxy, &format!("{line} /_proxy/tasks/8"), headers);
        assert_eq!(answer.refusal(), refusal, "{line} with {headers}");
    }
    for path in ["/_proxy/tasksx", "/_proxy/events", "/_proxy/tasks/8"] {
        assert_eq!(proxy.admin(path).refusal(), (404, 9007), "{path}");
    }

    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    fs::write(&tokens, "0123456789abcdef0123456789abcdef").unwrap();
    fs::set_permissions(&tokens, Permissions::from_mode(0o600)).unwrap();
    let tokens = ("access.client_tokens_file", tokens.to_str().unwrap());
    for setting in [tokens, ("admin.address", "0.0.0.0:0")] {
        let (_upstream, proxy) = started_with(&[("state.url", "memory"), setting]);
        hides_tasks(proxy.listener("admin"));
    }
    // Only this user can connect to a Unix socket.
    let upstream = Upstream::ok();
    let socket = folder.path().join("socket");
    let proxy = Proxy::to(&upstream)
        .setting("listen.address", "[]")
        .setting("listen.unix_socket", socket.to_str().unwrap())
        .begin();
    hides_tasks(proxy.listener("admin"));
}

/// Fails if an admin listener shows tasks, or a link to them.
fn hides_tasks(admin: SocketAddr) {
    let ask = |path| Connection::to(admin).send(get(path)).answer();
    for path in ["/_proxy/tasks", "/_proxy/tasks/8"] {
        assert_eq!(ask(path).status(), 404, "{path}");
    }
    assert!(!ask("/").text().contains("/_proxy/tasks"));
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

/// R33.
#[test]
fn silent_connections_do_not_blind_the_admin_listener() {
    let (_upstream, proxy) = started_with(&[("limits.header_timeout", "10m")]);
    let admin = proxy.listener("admin");
    let silent: Vec<_> = (0..SILENT).map(|_| Connection::to(admin)).collect();
    for path in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(proxy.admin(path).status(), 200, "{path}");
    }
    drop(silent);
}

/// R33: who connects again and again takes the place of other silent ones, not that of a probe.
#[test]
fn silent_connections_that_come_again_do_not_starve_a_probe() {
    let (_upstream, proxy) = started_with(&[("limits.header_timeout", "10m")]);
    let admin = proxy.listener("admin");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut silent = Vec::new();
            while !is_over.load(Relaxed) {
                // That it is refused is as good.
                silent.extend(TcpStream::connect(admin));
                if silent.len() > SILENT {
                    silent.remove(0);
                }
            }
        });
        let is_live = || {
            let probe = Connection::try_to(admin);
            let answer = probe.and_then(|mut probe| probe.send(get("/health/live")).try_answer());
            answer.is_ok_and(|answer| answer.status() == 200)
        };
        for probe in 0..5 {
            eventually(&format!("probe {probe} is answered"), is_live);
        }
        is_over.store(true, Relaxed);
    });
}

/// R33.
#[test]
fn admin_listener_answers_although_clients_hold_all_descriptors() {
    let upstream = Upstream::ok();
    let proxy = Proxy::to(&upstream).after("ulimit -n 64;").start();
    let clients: Vec<_> = (0..100).map(|_| proxy.connect()).collect();
    for path in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(proxy.admin(path).status(), 200, "{path}");
    }
    drop(clients);
}

/// R33: creates whose clients have gone hold a descriptor each, and no connection of a client bounds them.
#[test]
fn admin_listener_answers_although_upstream_holds_all_descriptors() {
    let upstream = Upstream::ok();
    let gate = upstream.hold();
    let proxy = Proxy::to(&upstream)
        .setting("retry.attempts", "1")
        .after("ulimit -n 64;")
        .start();
    let none_left = |line: &str| line.contains("Too many open files");
    let mut creates = 0;
    while !proxy.stderr.has(none_left) {
        let mut client = proxy.connect();
        client.send(post("/v1/videos/text2video", "{}"));
        eventually("the create is sent, or cannot be", || {
            upstream.seen().requests.len() > creates || proxy.stderr.has(none_left)
        });
        creates += 1;
    }
    // They take what the clients have left that have gone.
    let clients: Vec<_> = (0..20).map(|_| proxy.connect()).collect();
    for path in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(proxy.admin(path).status(), 200, "{path}");
    }
    drop(clients);
    gate.open();
}

//! The process: how it starts, tells its health, drains and ends.

use std::{collections::BTreeMap, net::TcpStream, thread, time::Duration};

use tokio::time::Instant;

use crate::support::{
    Connection, Gate, Proxy, SUCCESS, Signal, Step, Upstream, assert_has, closed, eventually, get,
    kling, post, reply, request, send, started, started_with,
};

/// Sends a request and waits until upstream has it.
fn in_flight(upstream: &Upstream, proxy: &Proxy) -> Connection {
    let mut connection = proxy.connect();
    connection.send(post("/v1/slow", "{}"));
    upstream.wait(|seen| {
        seen.requests
            .iter()
            .any(|request| request.target() == "/v1/slow")
    });
    connection
}

fn drain_began(proxy: &Proxy) {
    eventually("listener closed", || {
        TcpStream::connect(proxy.address).is_err()
    });
}

/// Samples of `/metrics` by name and labels.
fn metrics(proxy: &Proxy) -> BTreeMap<String, f64> {
    let answer = proxy.admin("/metrics");
    let samples = answer.text().lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').expect("a sample");
        (name.to_owned(), value.parse().expect("a number"))
    };
    samples.map(sample).collect()
}

/// The sum over all samples of a family that carry this label.
fn sum(samples: &BTreeMap<String, f64>, family: &str, label: &str) -> f64 {
    let wanted = |name: &str| name.split('{').next() == Some(family) && name.contains(label);
    let samples = samples.iter().filter(|(name, _)| wanted(name));
    samples.map(|(_, value)| value).sum()
}

#[test]
fn start_up_prints_a_line_for_each_listener() {
    let (upstream, proxy) = started();
    let admin = proxy.listener("admin");
    proxy.signal(Signal::TERM);
    let output = proxy.stdout.to_end();
    let words = output
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let proxy = format!("proxy http://{} -> {}", proxy.address, upstream.url);
    let admin = format!("admin http://{admin}");
    let words: Vec<_> = words.collect();
    let [first, second, third] = words.as_slice() else {
        panic!("{words:?}");
    };
    assert_eq!([first, second], [&proxy, &admin]);
    let is_file = third.starts_with("tasks /") && third.ends_with("/kling-proxy/tasks.db");
    assert!(is_file, "{third}");
}

#[test]
fn terminated_proxy_finishes_what_is_in_flight() {
    for signal in [Signal::TERM, Signal::INT] {
        let (upstream, proxy) = started();
        let gate = upstream.hold();
        let mut idle = proxy.connect();
        let mut slow = in_flight(&upstream, &proxy);
        proxy.signal(signal);
        assert_eq!(idle.rest(), b"", "an idle connection is closed first");
        gate.open();
        assert_eq!(slow.answer().text(), SUCCESS);
        assert_eq!(proxy.end().0, Some(0), "{signal:?}");
    }
}

#[test]
fn draining_proxy_takes_no_new_connection_and_is_not_ready() {
    let (upstream, proxy) = started();
    let gate = upstream.hold();
    let mut slow = in_flight(&upstream, &proxy);
    proxy.signal(Signal::TERM);
    drain_began(&proxy);
    let ready = proxy.admin("/health/ready");
    assert_eq!((ready.status(), ready.json().is_object()), (503, true));
    gate.open();
    assert_eq!(slow.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn drain_cuts_what_outlives_its_limit_and_says_so() {
    let (upstream, proxy) = started_with(&[("shutdown.drain", "500ms")]);
    let _gate = upstream.hold();
    let mut slow = in_flight(&upstream, &proxy);
    let begun = Instant::now();
    proxy.signal(Signal::TERM);
    let (code, log) = proxy.end();
    let took = begun.elapsed();
    assert_eq!(code, Some(0));
    assert!(took >= Duration::from_millis(500), "{took:?}");
    let line = log
        .lines()
        .find(|line| line.contains("shutdown.drain is over"));
    assert_has(line.unwrap_or(&log), &["WARN", "\"cut.requests\":1"]);
    assert_eq!(slow.answer().refusal(), (502, 9104));
}

/// Half of each body has passed when the signal comes.
#[test]
fn drain_finishes_slow_requests_uploads_and_downloads() {
    const EACH: usize = 17;
    let (upstream, proxy) = started();
    let gate = Gate::default();
    let half = vec![b'a'; 50_000];
    let (held, first, second) = (gate.clone(), reply(200, "", half.repeat(2)), half.clone());
    upstream.script(move |request| match request.target() {
        "/v1/slow" => vec![Step::Wait(held.clone()), send(kling(200, SUCCESS))],
        "/video.mp4" => {
            let first = first[..first.len() - second.len()].to_vec();
            vec![send(first), Step::Wait(held.clone()), send(&second)]
        }
        _ => vec![send(kling(200, SUCCESS))],
    });
    let send_all = |request: &[u8]| -> Vec<_> {
        let mut connections: Vec<_> = (0..EACH).map(|_| proxy.connect()).collect();
        for connection in &mut connections {
            connection.send(request);
        }
        connections
    };
    let mut slow = send_all(&post("/v1/slow", "{}"));
    let mut downloads = send_all(&get("/video.mp4"));
    let upload = post("/v1/upload", half.repeat(2));
    let (first, second) = upload.split_at(upload.len() - half.len());
    let mut uploads = send_all(first);
    for download in &mut downloads {
        assert_eq!(download.head().status(), 200);
    }
    upstream.wait(|seen| seen.requests.len() == 2 * EACH && seen.bytes > EACH * half.len());

    proxy.signal(Signal::TERM);
    drain_began(&proxy);
    gate.open();
    for upload in &mut uploads {
        upload.send(second);
    }
    for connection in slow.iter_mut().chain(&mut uploads) {
        let answer = connection.answer();
        assert_eq!(answer.text(), SUCCESS);
        assert_eq!(answer.header("connection"), Some("close"));
        assert_eq!(connection.rest(), b"");
    }
    for download in &mut downloads {
        assert_eq!(download.rest().len(), 2 * half.len());
    }
    let (code, log) = proxy.end();
    assert_eq!(code, Some(0));
    assert!(!log.contains("cut."), "{log}");
    assert_eq!(upstream.last().body.len(), 2 * half.len());
}

#[test]
fn stopping_proxy_serves_on_for_its_delay_but_is_not_ready() {
    let (_upstream, proxy) = started_with(&[("shutdown.delay", "1h")]);
    let mut idle = proxy.connect();
    proxy.signal(Signal::TERM);
    eventually("not ready", || proxy.admin("/health/ready").status() == 503);
    for _ in 0..20 {
        assert_eq!(proxy.get("/v1/x").status(), 200);
        assert_eq!(idle.send(get("/v1/x")).answer().status(), 200);
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn drain_begins_after_the_delay() {
    let (upstream, proxy) = started_with(&[("shutdown.delay", "1s")]);
    let gate = upstream.hold();
    let mut slow = in_flight(&upstream, &proxy);
    let begun = Instant::now();
    proxy.signal(Signal::TERM);
    drain_began(&proxy);
    assert!(begun.elapsed() >= Duration::from_secs(1));
    gate.open();
    assert_eq!(slow.answer().status(), 200);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn second_instance_on_a_port_fails() {
    let (upstream, first) = started();
    let taken = first.address.to_string();
    for key in ["listen.address", "admin.address"] {
        let finished = Proxy::to(&upstream).setting(key, &taken).run();
        assert_eq!(finished.code, Some(1), "{key}: {finished:?}");
        assert_has(&finished.stderr, &[&taken]);
    }
    assert_eq!(first.get("/v1/x").status(), 200);
}

#[test]
fn connection_over_the_limit_waits_for_its_turn() {
    let (upstream, proxy) = started_with(&[("limits.connections", "1")]);
    let mut first = proxy.connect();
    first.send(get("/first")).answer();
    let mut second = proxy.connect();
    second.send(get("/second"));
    for _ in 0..20 {
        first.send(get("/first")).answer();
    }
    drop(first);
    assert_eq!(second.answer().status(), 200);
    let lines = upstream.first_lines();
    assert_eq!(
        lines.iter().position(|line| line.contains("second")),
        Some(21)
    );
}

/// R33: half of 256 descriptors are for clients, and each of those may take one towards upstream.
#[test]
fn no_more_clients_are_taken_than_there_are_descriptors_for_and_the_log_says_so() {
    const FITTING: usize = 64;
    let upstream = Upstream::ok();
    let gate = upstream.hold();
    let proxy = Proxy::to(&upstream).after("ulimit -n 256;").start();
    let warning = proxy
        .stderr
        .find(|line| line.contains("limits.connections"));
    let parts = ["WARN", "10000", "12432", "256", "64", "LimitNOFILE"];
    assert_has(&warning.expect("a warning"), &parts);
    let mut clients: Vec<_> = (0..2 * FITTING).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(get("/v1/x"));
    }
    upstream.wait(|seen| seen.requests.len() == FITTING);
    assert_eq!(proxy.admin("/health/live").status(), 200);
    gate.open();
    // Those that are served make room for the others.
    for mut client in clients {
        assert_eq!(client.answer().status(), 200);
    }
    proxy.signal(Signal::TERM);
    let (_, log) = proxy.end();
    assert!(!log.contains("Too many open files"), "{log}");
}

#[test]
fn nothing_is_said_of_descriptors_where_there_are_enough() {
    let upstream = Upstream::ok();
    // The soft limit is raised to the hard one.
    for limit in ["ulimit -n 256;", "ulimit -S -n 64; ulimit -H -n 256;"] {
        let proxy = Proxy::to(&upstream)
            .setting("limits.connections", "64")
            .after(limit)
            .start();
        let mut clients: Vec<_> = (0..64).map(|_| proxy.connect()).collect();
        for client in &mut clients {
            assert_eq!(client.send(get("/v1/x")).answer().status(), 200, "{limit}");
        }
        proxy.signal(Signal::TERM);
        let (_, log) = proxy.end();
        assert!(!log.contains("open files"), "{limit}: {log}");
    }
}

#[test]
fn healthy_proxy_says_so_on_the_admin_listener_whatever_the_host() {
    let (upstream, proxy) = started();
    let mut admin = Connection::to(proxy.listener("admin"));
    let mut ask = |path, host| {
        let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
        admin.send(head).answer()
    };
    for path in ["/health/startup", "/health/live", "/health/ready"] {
        for host in ["localhost", "10.1.2.3:5547"] {
            let answer = ask(path, host);
            assert_eq!(answer.status(), 200, "{path} at {host}");
            assert_eq!(answer.header("content-type"), Some("application/json"));
            assert!(answer.json().is_object(), "{}", answer.text());
        }
    }
    assert_eq!(ask("/metrics", "10.1.2.3").status(), 200);
    for path in ["/v1/videos/text2video", "/quit", "/health"] {
        assert_eq!(ask(path, "localhost").status(), 404, "{path}");
    }
    assert_eq!(
        upstream.first_lines(),
        [""; 0],
        "health asks nothing of upstream"
    );
}

#[test]
fn admin_listener_can_be_off() {
    let (_upstream, proxy) = started_with(&[("admin.address", "off")]);
    assert_eq!(proxy.get("/v1/x").status(), 200);
    proxy.signal(Signal::TERM);
    assert!(!proxy.stdout.to_end().contains("admin"));
}

/// R6.
#[test]
fn nothing_of_the_admin_listener_is_reachable_through_the_data_listener() {
    let (_upstream, proxy) = started();
    for path in [
        "/metrics",
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/quit",
    ] {
        assert_eq!(proxy.get(path).text(), SUCCESS, "{path}");
    }
    let admin = proxy.listener("admin");
    let there = format!("GET http://{admin}/metrics HTTP/1.1\r\nhost: {admin}\r\n\r\n");
    assert_eq!(proxy.send(there).text(), SUCCESS);
}

#[test]
fn metrics_count_requests_refusals_and_tokens() {
    let (upstream, proxy) = started();
    let gate = upstream.hold();
    let mut slow = in_flight(&upstream, &proxy);
    let now = |family, label| sum(&metrics(&proxy), family, label);
    eventually("in flight", || {
        now("kling_proxy_requests_in_flight", "") > 0.5
    });
    gate.open();
    slow.answer();
    proxy.get("/v1/x");
    proxy.send("GET /v1/x HTTP/1.1\r\nhost: evil.test\r\n\r\n");
    for (family, label, value) in [
        ("kling_proxy_requests_in_flight", "", 0.0),
        ("kling_proxy_requests_total", "", 3.0),
        ("kling_proxy_requests_total", r#"method="POST""#, 1.0),
        ("kling_proxy_requests_total", r#"status_class="4xx""#, 1.0),
        ("kling_proxy_request_duration_seconds_count", "", 3.0),
        ("kling_proxy_guard_refusals_total", "host_not_allowed", 1.0),
        ("kling_proxy_upstream_attempts_total", "", 2.0),
        ("kling_proxy_tokens_minted_total", "", 1.0),
        ("kling_proxy_build_info", "", 1.0),
    ] {
        let what = format!("{family} {label} = {value}");
        eventually(&what, || (now(family, label) - value).abs() < 0.1);
    }
}

#[test]
fn loop_of_proxies_ends_at_its_first_turn() {
    let (upstream, (socket, address)) = (Upstream::ok(), closed());
    let to = |url: String| Proxy::to(&upstream).setting("upstream.url", url);
    let second = to(format!("http://{address}")).start();
    let first = to(format!("http://{}", second.address)).setting("listen.address", &address);
    let first = first.start();
    drop(socket);
    for proxy in [&first, &second] {
        let answer = proxy.post("/v1/videos/text2video", "{}");
        assert_eq!(answer.refusal(), (400, 9000));
        assert_has(answer.text(), &["leads back"]);
    }
    for proxy in [&first, &second] {
        let posts = sum(&metrics(proxy), "kling_proxy_requests_total", "POST");
        assert!((posts - 3.0).abs() < 0.1, "{posts}");
    }
    assert_eq!(upstream.seen().connections, 0);
}

#[test]
fn upstream_on_this_machine_is_told_through_which_proxies_a_request_came() {
    let (upstream, proxy) = started();
    proxy.get("/v1/x");
    let id = upstream
        .last()
        .header("kling-proxy-hop")
        .unwrap()
        .to_owned();
    proxy.send(request(
        "GET /v1/x",
        "kling-proxy-hop: a, b\nkling-proxy-hop: c",
        "",
    ));
    let last = upstream.last();
    let lines = last.head.lines();
    let hops: Vec<_> = lines
        .filter_map(|line| line.strip_prefix("kling-proxy-hop: "))
        .collect();
    assert_eq!(hops, ["a, b", "c", &*id]);
    let again = request("POST /v1/x", &format!("kling-proxy-hop: a,{id}"), "{}");
    assert_eq!(proxy.send(again).refusal(), (400, 9000));
    assert_eq!(upstream.seen().requests.len(), 2);
}

#[test]
fn log_line_is_one_json_object_with_control_characters_escaped() {
    let (upstream, proxy) = started();
    upstream.answer(kling(
        400,
        r#"{"code":1200,"message":"a\r\n\u001b[31mb\u0000"}"#,
    ));
    proxy.get("/v1/%0d%0a%1b");
    proxy.send("GET /a HTTP/1.1\r\nhost: evil.test\r\n\r\n");
    proxy.signal(Signal::TERM);
    let (_, log) = proxy.end();
    assert_ne!(log, "");
    for line in log.lines() {
        let object: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(object.is_ok_and(|object| object.is_object()), "{line}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

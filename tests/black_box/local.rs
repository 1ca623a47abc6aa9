//! Requests that the proxy answers itself: `/` and the icon of a browser.

use crate::support::{
    Connection, Message, Proxy, Upstream, assert_has, get, request, started, started_with,
};

/// Sends requests that must not reach upstream.
fn answers(upstream: &Upstream, proxy: &Proxy, lines: &[&str]) -> Vec<Message> {
    let answers = lines.iter().map(|line| proxy.send(request(line, "", "")));
    let answers = answers.collect();
    assert_eq!(upstream.first_lines(), [""; 0]);
    answers
}

#[test]
fn front_page_says_what_answers_and_where_the_rest_is() {
    let (upstream, proxy) = started();
    let answers = answers(
        &upstream,
        &proxy,
        &["GET /", "GET /?x=1", "GET http://localhost/"],
    );
    for answer in &answers {
        assert_eq!(answer.status(), 200);
        assert_eq!(
            answer.told([
                "content-type",
                "x-content-type-options",
                "kling-proxy-error"
            ]),
            [Some("text/plain; charset=utf-8"), Some("nosniff"), None]
        );
        assert!(answer.header("kling-proxy-request-id").is_some());
    }
    let text = answers[0].text();
    let admin = proxy.listener("admin");
    let health = format!("http://{admin}/health/ready");
    assert_has(text, &["kling-proxy ", &upstream.url, &health]);
    let is_narrow = |line: &str| line.len() <= 110;
    assert!(
        text.lines().all(is_narrow) && text.ends_with('\n'),
        "{text}"
    );
    assert_eq!(proxy.admin("/health/ready").status(), 200);
}

#[test]
fn head_of_the_front_page_is_that_of_its_get() {
    let (upstream, proxy) = started();
    let [length, type_] = ["content-length", "content-type"];
    let whole = proxy.get("/");
    let mut connection = proxy.connect();
    let head = connection.send(request("HEAD /", "", "")).head();
    assert_eq!(head.status(), 200);
    assert_eq!(head.told([length, type_]), whole.told([length, type_]));
    assert_eq!(head.header(length), Some(&*whole.body.len().to_string()));
    // No body follows the head.
    assert_eq!(connection.send(get("/")).answer().text(), whole.text());
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn icon_is_answered_without_upstream() {
    let (upstream, proxy) = started();
    let lines = [
        "GET /favicon.ico",
        "HEAD /favicon.ico",
        "GET /favicon.ico?v=2",
    ];
    for answer in answers(&upstream, &proxy, &lines) {
        assert_eq!((answer.status(), answer.body.len()), (204, 0));
    }
}

#[test]
fn proxy_without_an_admin_listener_says_so_on_its_front_page() {
    let (_upstream, proxy) = started_with(&[("admin.address", "off")]);
    assert_has(proxy.get("/").text(), &["no admin listener"]);
}

#[test]
fn other_methods_and_other_spellings_of_the_front_page_are_forwarded() {
    let (upstream, proxy) = started();
    for line in [
        "POST /",
        "PUT /",
        "DELETE /",
        "OPTIONS /",
        "GET //",
        "GET /.",
        "GET /%2f",
        "POST /favicon.ico",
        "GET /favicon.ico/",
        "GET /v1/favicon.ico",
    ] {
        assert_eq!(proxy.send(request(line, "", "")).status(), 200, "{line}");
        let arrived = upstream.last();
        assert_eq!(arrived.first_line(), format!("{line} HTTP/1.1"));
    }
}

/// R1, R3, R38.
#[test]
fn own_answers_are_for_the_clients_that_may_call() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = command.file("tokens", "studio:first-token-01234\n");
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .setting("access.allowed_origins", r#"["http://app.test"]"#)
        .start();
    let token = "kling-proxy-token: first-token-01234";
    for path in ["/", "/favicon.ico", "/_proxy/x"] {
        for (headers, refusal) in [
            ("x-a: b".to_owned(), (401, 9003)),
            (
                "kling-proxy-token: another-token-01234".to_owned(),
                (401, 9003),
            ),
            (format!("{token}\norigin: http://evil.test"), (403, 9002)),
            (format!("{token}\nsec-fetch-site: cross-site"), (403, 9002)),
            (format!("{token}\nhost: localhost"), (421, 9001)),
        ] {
            let answer = proxy.send(request(&format!("GET {path}"), &headers, ""));
            assert_eq!(answer.refusal(), refusal, "{path} with {headers}");
        }
        let foreign = format!("GET {path} HTTP/1.1\r\nhost: evil.test\r\n{token}\r\n\r\n");
        assert_eq!(proxy.send(foreign).refusal(), (421, 9001), "{path}");
    }
    let headers = format!("{token}\norigin: http://app.test");
    let answer = proxy.send(request("GET /", &headers, ""));
    assert_eq!(
        (
            answer.status(),
            answer.header("access-control-allow-origin")
        ),
        (200, Some("http://app.test"))
    );
    let answer = proxy.send(request("GET /_proxy/x", token, ""));
    assert_eq!(answer.refusal(), (404, 9007));
    assert_eq!(upstream.first_lines(), [""; 0]);
}

/// R15, R38.
#[test]
fn own_answers_need_no_place_in_the_lists_of_forwarded_methods_and_paths() {
    let (upstream, proxy) = started_with(&[
        ("access.allowed_methods", r#"["POST"]"#),
        ("access.allowed_paths", r#"["/v1/videos"]"#),
    ]);
    for (line, status) in [
        ("GET /", 200),
        ("HEAD /", 200),
        ("GET /favicon.ico", 204),
        ("GET /_proxy/x", 404),
    ] {
        let answer = proxy.connect().send(request(line, "", "")).head();
        assert_eq!(answer.status(), status, "{line}");
    }
    for (line, refusal) in [
        ("POST /", (403, 9004)),
        ("GET //", (405, 9005)),
        ("TRACE /_proxy/x", (405, 9005)),
        ("TRACE /", (405, 9005)),
    ] {
        let answer = proxy.send(request(line, "", ""));
        assert_eq!(answer.refusal(), refusal, "{line}");
    }
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn own_answers_are_counted_and_logged_as_requests_without_an_attempt() {
    let (_upstream, proxy) = started_with(&[("log.filter", "kling_proxy=debug")]);
    let total = r#"kling_proxy_requests_total{method="GET",status_class="2xx"} 2"#;
    proxy.get("/");
    proxy.get("/favicon.ico");
    let metrics = proxy.admin("/metrics");
    assert_has(metrics.text(), &[total]);
    let mut lines = metrics.text().lines();
    let attempts = "kling_proxy_upstream_attempts_total{";
    assert!(
        lines.all(|line| !line.starts_with(attempts) || line.ends_with(" 0")),
        "{}",
        metrics.text()
    );
    for path in ["/", "/favicon.ico"] {
        let path = format!(r#""url.path":"{path}""#);
        let line = proxy.stderr.find(|line| line.contains(&path));
        assert_has(&line.expect("a line"), &["DEBUG", "answered"]);
    }
}

#[test]
fn admin_listener_lists_what_it_has() {
    for quit in [false, true] {
        let (_upstream, proxy) = started_with(&[("admin.quit", &quit.to_string())]);
        let page = proxy.admin("/");
        assert_eq!(
            (page.status(), page.header("content-type")),
            (200, Some("text/html; charset=utf-8"))
        );
        let links: Vec<_> = page.text().split("href=\"").skip(1).collect();
        let links: Vec<_> = links
            .iter()
            .filter_map(|rest| rest.split('"').next())
            .collect();
        assert_eq!(
            links,
            [
                "/health/ready",
                "/health/live",
                "/health/startup",
                "/metrics",
                "/_proxy/tasks"
            ]
        );
        for link in links {
            assert_eq!(proxy.admin(link).status(), 200, "{link}");
        }
        assert_eq!(page.text().contains("POST /quit"), quit);
        let mut admin = Connection::to(proxy.listener("admin"));
        let head = admin.send(request("HEAD /", "", "")).head();
        assert_eq!(head.status(), 200);
        assert_eq!(
            admin.send(request("POST /", "", "")).answer().refusal(),
            (405, 9005)
        );
    }
}

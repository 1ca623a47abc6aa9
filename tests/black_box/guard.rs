//! A request that may not pass is refused before anything is spent: upstream sees nothing of it.

use serde_json::json;

use crate::support::{
    Command, Message, Proxy, SUCCESS, Upstream, assert_has, get, mint, now, post, raw, reply,
    request, started, started_with,
};

/// `{"alg":"none","typ":"JWT"}` and `{"exp":9999999999,"nbf":0}`, without a signature.
const UNSIGNED: &str = "authorization: Bearer eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.\
    eyJleHAiOjk5OTk5OTk5OTksIm5iZiI6MH0.";

/// The answer to a request that upstream must not see.
#[track_caller]
fn refused(upstream: &Upstream, proxy: &Proxy, bytes: impl AsRef<[u8]>) -> Message {
    let before = upstream.seen().requests.len();
    let answer = proxy.send(&bytes);
    let seen = &upstream.seen().requests[before..];
    let bytes = bytes.as_ref().escape_ascii();
    assert!(seen.is_empty(), "{bytes} passed as {seen:?}");
    answer
}

fn with_host(lines: &str) -> String {
    format!("GET /v1/x HTTP/1.1\r\n{lines}\r\n\r\n")
}

/// R1.
#[test]
fn host_outside_the_list_is_refused_and_the_setting_named() {
    let (upstream, proxy) = started();
    for host in [
        "evil.test",
        "evil.test:5546",
        "localhost.evil.test",
        "127.0.0.1.nip.io",
        "127.0.0.2",
        "0.0.0.0",
        "0.0.0.0:5546",
        "[::]",
        "2130706433",
    ] {
        let answer = proxy.send(with_host(&format!("host: {host}")));
        assert_eq!(answer.refusal(), (421, 9001), "{host}");
        assert_has(answer.text(), &["access.allowed_hosts"]);
    }
    assert_eq!(upstream.seen().connections, 0);
}

/// R2.
#[test]
fn host_is_what_its_own_header_says_and_no_other() {
    let (upstream, proxy) = started();
    for other in [
        "x-forwarded-host: ",
        "x-forwarded-server: ",
        "forwarded: host=",
        "x-original-host: ",
        "x-host: ",
        "x-http-host-override: ",
        "origin: http://",
    ] {
        let answer = proxy.send(with_host(&format!("host: evil.test\r\n{other}localhost")));
        assert_eq!(answer.refusal(), (421, 9001), "{other}");
    }
    assert_eq!(upstream.seen().connections, 0);
    for other in ["x-forwarded-host: ", "forwarded: host=", "x-host: "] {
        let answer = proxy.send(with_host(&format!("host: localhost\r\n{other}evil.test")));
        assert_eq!(answer.status(), 200, "{other}");
    }
}

/// R4.
#[test]
fn rebound_page_is_refused_by_its_host_alone() {
    // Of our own origin, as far as its browser can tell: no other header gives it away.
    let origin = "origin: http://rebound.test:5546";
    let allowed = r#"["http://rebound.test:5546"]"#;
    for (upstream, proxy) in [
        started(),
        started_with(&[("access.allowed_origins", allowed)]),
    ] {
        for headers in [
            "accept: */*",
            "sec-fetch-site: none",
            "sec-fetch-site: same-origin",
            origin,
        ] {
            let lines = with_host(&format!("host: rebound.test:5546\r\n{headers}"));
            assert_eq!(proxy.send(lines).refusal(), (421, 9001), "{headers}");
        }
        assert_eq!(upstream.seen().connections, 0);
    }
}

/// R1.
#[test]
fn empty_missing_second_or_malformed_host_is_refused() {
    let (upstream, proxy) = started();
    for lines in [
        "host:",
        "accept: */*",
        "host: localhost\r\nhost: localhost",
        "host: localhost\r\nhost: evil.test",
        "host: localhost, evil.test",
        "host: localhost@evil.test",
        "host: evil.test/localhost",
        "host: localhost:80:80",
        "host: local host",
    ] {
        let refusal = proxy.send(with_host(lines)).refusal();
        assert!(
            [(400, 9000), (421, 9001)].contains(&refusal),
            "{lines}: {refusal:?}"
        );
    }
    assert_eq!(upstream.seen().connections, 0);
}

/// R1.
#[test]
fn loopback_hosts_pass_with_and_without_port() {
    let (_upstream, proxy) = started();
    for host in [
        "localhost",
        "localhost:8080",
        "LOCALHOST:80",
        "127.0.0.1",
        "127.0.0.1:5546",
        "[::1]",
        "[::1]:1",
    ] {
        let answer = proxy.send(with_host(&format!("host: {host}")));
        assert_eq!(answer.status(), 200, "{host}");
    }
}

#[test]
fn refusal_shows_the_host_and_the_setting_that_would_allow_it() {
    let command = Proxy::to(&Upstream::ok());
    let hosts = r#"["localhost","127.0.0.1"]"#;
    let proxy = command.setting("access.allowed_hosts", hosts).start();
    let advice = |name: &str| {
        format!(r#"; to allow it, set access.allowed_hosts = ["localhost","127.0.0.1","{name}"]"#)
    };
    let long = "a".repeat(300);
    for (lines, message) in [
        (
            "host: new.host:5546",
            format!(
                "host `new.host:5546` is not in `access.allowed_hosts`{}",
                advice("new.host")
            ),
        ),
        (
            "host: [::1]:5546",
            format!(
                "host `[::1]:5546` is not in `access.allowed_hosts`{}",
                advice("[::1]")
            ),
        ),
        // No setting can hold these.
        (
            "host: a\"b,c",
            r#"host `a"b,c` is not in `access.allowed_hosts`"#.to_owned(),
        ),
        (
            "host: \u{202e}evil\u{9b}",
            r"host `\u{202e}evil\u{9b}` is not in `access.allowed_hosts`".to_owned(),
        ),
        (
            &format!("host: {long}"),
            format!("host `{}…` is not in `access.allowed_hosts`", &long[..255]),
        ),
        (
            "host: localhost\r\nhost: localhost",
            "the request has more than one `Host` header".to_owned(),
        ),
        ("accept: */*", "the request has no `Host` header".to_owned()),
    ] {
        let answer = proxy.send(with_host(lines));
        assert_eq!(answer.refusal(), (421, 9001), "{lines}");
        assert_eq!(answer.json()["message"], message, "{lines}");
    }
    let line = proxy.stderr.find(|line| line.contains("evil"));
    assert_has(&line.unwrap(), &[r"\\u{202e}evil\\u{9b}"]);
}

#[test]
fn refusal_does_not_repeat_a_list_of_any_length() {
    let hosts: Vec<_> = (0..100).map(|n| format!("host-{n}.test")).collect();
    let hosts = json!(hosts).to_string();
    let (_upstream, proxy) = started_with(&[("access.allowed_hosts", &hosts)]);
    let answer = proxy.send(with_host("host: new.host"));
    let message = "host `new.host` is not in `access.allowed_hosts`; to allow it, add \"new.host\" to this list";
    assert_eq!(answer.json()["message"], message);
}

#[test]
fn refusal_shows_the_page_and_the_setting_that_would_allow_it() {
    let hosts = r#"["http://localhost:3000"]"#;
    let (_upstream, proxy) = started_with(&[("access.allowed_origins", hosts)]);
    let foreign = "is not in `access.allowed_origins`";
    for (headers, message) in [
        (
            "origin: https://app.test:8443",
            format!(
                "the origin `https://app.test:8443` of this page {foreign}; to allow it, set \
                 access.allowed_origins = [\"http://localhost:3000\",\"https://app.test:8443\"]"
            ),
        ),
        (
            "origin: http://localhost:3000\norigin: http://b.test",
            format!(
                "the origin `http://b.test` of this page {foreign}; to allow it, set \
                 access.allowed_origins = [\"http://localhost:3000\",\"http://b.test\"]"
            ),
        ),
        (
            "origin: null",
            format!(
                "the origin `null` of this page {foreign}, and cannot be allowed: serve the page \
                 by http or https"
            ),
        ),
        (
            "origin: http://a.test/\u{202e}",
            format!(
                r"the origin `http://a.test/\u{{202e}}` of this page {foreign}, and cannot be allowed: serve the page by http or https"
            ),
        ),
        (
            "sec-fetch-site: cross-site",
            "a page of another site (`sec-fetch-site: cross-site`) sent this request without its \
             origin, so that no setting can allow it: send it by `fetch`"
                .to_owned(),
        ),
    ] {
        let answer = proxy.send(request("GET /v1/x", headers, ""));
        assert_eq!(answer.refusal(), (403, 9002), "{headers}");
        assert_eq!(answer.json()["message"], message, "{headers}");
    }
}

#[test]
fn allowed_hosts_are_a_setting() {
    let upstream = Upstream::ok();
    let hosts = r#"["kling-proxy"]"#;
    let proxy = Proxy::to(&upstream)
        .setting("access.allowed_hosts", hosts)
        .start();
    for (host, status) in [
        ("kling-proxy", 200),
        ("kling-proxy:5546", 200),
        ("localhost", 421),
    ] {
        let answer = proxy.send(with_host(&format!("host: {host}")));
        assert_eq!(answer.status(), status, "{host}");
    }
}

/// R7.
#[test]
fn target_that_is_not_a_path_of_ours_is_refused() {
    let (upstream, proxy) = started();
    for (line, host, refusals) in [
        (
            "GET http://169.254.169.254/x",
            "169.254.169.254",
            "400/9000 421/9001",
        ),
        ("GET http://169.254.169.254/x", "localhost", "400/9000"),
        (
            "GET https://api-singapore.klingai.com/v1/x",
            "localhost",
            "400/9000",
        ),
        ("GET http://localhost/x", "evil.test", "400/9000 421/9001"),
        ("GET http://localhost:1/x", "localhost:2", "400/9000"),
        ("GET http://localhost/x", "127.0.0.1", "400/9000"),
        ("GET http://user@localhost/x", "localhost", "400/9000"),
        ("GET localhost:5546", "localhost:5546", "400/9000"),
        ("OPTIONS *", "localhost", "400/9000"),
        (
            "CONNECT api-singapore.klingai.com:443",
            "localhost",
            "405/9005",
        ),
        ("CONNECT localhost:443", "localhost:443", "405/9005"),
        ("TRACE /", "localhost", "405/9005"),
    ] {
        let answer = proxy.send(format!("{line} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
        let (status, code) = answer.refusal();
        assert!(
            refusals.contains(&format!("{status}/{code}")),
            "{line}: {}",
            answer.text()
        );
    }
    assert_eq!(upstream.seen().connections, 0);
}

/// R3.
#[test]
fn request_of_a_foreign_web_page_is_refused() {
    let (upstream, proxy) = started();
    for (line, header) in [
        ("GET /v1/x", "origin: https://evil.test"),
        ("GET /v1/x", "origin: null"),
        ("GET /v1/x", "origin: http://localhost.evil.test"),
        ("POST /v1/x", "origin: http://evil.test:5546"),
        ("POST /v1/x", "sec-fetch-site: cross-site"),
        ("GET /v1/x", "sec-fetch-site: same-site"),
        ("OPTIONS /v1/x", "origin: https://evil.test"),
        // Its body, which never comes, is not waited for.
        (
            "POST /v1/x",
            "origin: https://evil.test\ncontent-length: 1000000",
        ),
    ] {
        let answer = refused(&upstream, &proxy, request(line, header, ""));
        assert_eq!(answer.refusal(), (403, 9002), "{line}, {header}");
        assert!(
            !answer.head.to_lowercase().contains("access-control-"),
            "{}",
            answer.head
        );
    }
    for header in ["sec-fetch-site: none", "sec-fetch-site: same-origin"] {
        let answer = proxy.send(request("GET /v1/x", header, ""));
        assert_eq!(answer.status(), 200, "{header}");
    }
}

/// R3.
#[test]
fn page_of_an_allowed_origin_may_call_and_read_errors_too() {
    let origin = "http://localhost:3000";
    let hosts = r#"["http://localhost:3000"]"#;
    let (upstream, proxy) = started_with(&[("access.allowed_origins", hosts)]);
    let cors = ["access-control-allow-origin", "vary"];
    let headers = format!("origin: {origin}\nsec-fetch-site: cross-site");
    let answer = proxy.send(request("GET /v1/x", &headers, ""));
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.told(cors), [Some(origin), Some("Origin")]);
    let exposed = answer.header("access-control-expose-headers");
    assert_has(exposed.unwrap(), &["kling-proxy-error", "retry-after"]);

    upstream.answer(reply(500, "access-control-allow-origin: *", ""));
    let answer = proxy.send(request("POST /v1/x", &headers, ""));
    assert_eq!(answer.refusal(), (500, 9103));
    assert_eq!(answer.told(cors), [Some(origin), Some("Origin")]);

    for foreign in ["http://localhost:3001", "https://localhost:3000", "null"] {
        let header = format!("origin: {foreign}");
        let answer = proxy.send(request("GET /v1/x", &header, ""));
        assert_eq!(answer.refusal(), (403, 9002), "{foreign}");
        assert_eq!(answer.told(cors), [None, Some("Origin")], "{foreign}");
    }
    let image = proxy.send(request("GET /v1/x", "sec-fetch-site: cross-site", ""));
    assert_eq!(image.refusal(), (403, 9002), "no origin, no permission");
    let second = format!("{headers}\norigin: https://evil.test");
    let two = proxy.send(request("GET /v1/x", &second, ""));
    assert_eq!(two.refusal(), (403, 9002), "one of two is foreign");
}

/// R3.
#[test]
fn preflight_is_answered_here_and_only_for_an_allowed_origin() {
    let hosts = r#"["http://localhost:3000"]"#;
    let (upstream, proxy) = started_with(&[("access.allowed_origins", hosts)]);
    let preflight = |origin: &str| {
        let headers = "access-control-request-method: POST\n\
            access-control-request-headers: content-type\n\
            access-control-request-private-network: true";
        let headers = format!("origin: {origin}\n{headers}");
        refused(&upstream, &proxy, request("OPTIONS /v1/x", &headers, ""))
    };
    let answer = preflight("http://localhost:3000");
    assert_eq!(answer.status(), 204);
    let told = answer.told([
        "access-control-allow-origin",
        "access-control-allow-methods",
        "access-control-allow-headers",
        "access-control-allow-private-network",
        "vary",
    ]);
    let origin = "http://localhost:3000";
    assert_eq!(
        told,
        [origin, "POST", "content-type", "true", "Origin"].map(Some)
    );
    assert_eq!(preflight("http://evil.test").refusal(), (403, 9002));
}

/// R15, R38.
#[test]
fn only_listed_methods_and_paths_are_forwarded() {
    let (upstream, proxy) = started_with(&[
        ("access.allowed_methods", r#"["GET"]"#),
        ("access.allowed_paths", r#"["/v1/videos", "/account"]"#),
    ]);
    for (line, outcome) in [
        ("GET /v1/videos/text2video?x=/../y", None),
        ("GET /account/costs", None),
        ("POST /v1/videos/text2video", Some((405, 9005))),
        ("GET /v1/images/generations", Some((403, 9004))),
        ("GET /v1/videosx", Some((403, 9004))),
        ("GET /v1/videos/../images", Some((403, 9004))),
        ("GET /v1/videos/%2e%2e/images", Some((403, 9004))),
        ("GET /v1/videos/..%2fimages", Some((403, 9004))),
        ("GET /v1/videos/text2video;a=b", None),
        ("GET /v1/videos/..;/images", Some((403, 9004))),
        ("GET /v1/videos/..;a=b/images", Some((403, 9004))),
        ("GET /v1/videos/%252e%252e/images", Some((403, 9004))),
        ("GET /v1/videos/%25252e%25252e/images", Some((403, 9004))),
        ("GET /v1/videos/%c0%ae%c0%ae/images", Some((403, 9004))),
        (
            "GET /v1/videos/%ef%bc%8e%ef%bc%8e/images",
            Some((403, 9004)),
        ),
        ("GET /v1/videos/%00", Some((403, 9004))),
        ("GET /v1/videos/%0d%0a", Some((403, 9004))),
        ("GET /v1/videos/%u002e%u002e/images", Some((403, 9004))),
    ] {
        let request = request(line, "", "");
        match outcome {
            None => assert_eq!(proxy.send(request).status(), 200, "{line}"),
            Some(outcome) => {
                assert_eq!(
                    refused(&upstream, &proxy, request).refusal(),
                    outcome,
                    "{line}"
                );
            }
        }
    }
}

/// R17.
#[test]
fn body_over_the_limit_is_refused_and_never_arrives_whole() {
    let (upstream, proxy) = started_with(&[("limits.request_body", "1KiB")]);
    let chunk = |size: usize| format!("{size:x}\r\n{}\r\n", "a".repeat(size));
    for (framing, body) in [
        ("content-length: 1025", String::new()),
        ("content-length: 1099511627776", String::new()),
        ("transfer-encoding: chunked", chunk(1025)),
        ("transfer-encoding: chunked", chunk(1024) + &chunk(1)),
    ] {
        let head = request("POST /v1/x", framing, "");
        let answer = refused(&upstream, &proxy, [head, body.into()].concat());
        assert_eq!(answer.refusal(), (413, 9006), "{framing}");
    }
    for (framing, body) in [
        ("content-length: 1024", "a".repeat(1024)),
        ("transfer-encoding: chunked", chunk(1024) + "0\r\n\r\n"),
    ] {
        let head = request("POST /v1/x", framing, "");
        assert_eq!(
            proxy.send([head, body.into()].concat()).status(),
            200,
            "{framing}"
        );
        assert_eq!(upstream.last().body.len(), 1024, "{framing}");
    }
}

#[test]
fn refusal_before_the_body_was_read_closes_the_connection() {
    // What follows on the connection is the body, which must not be taken for a request.
    let (upstream, proxy) = started_with(&[("limits.request_body", "10B")]);
    let head = request("POST /", "content-length: 1000", "");
    let answers = raw(proxy.address, [head, get("/smuggled")].concat());
    let answers = String::from_utf8_lossy(&answers);
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 1, "{answers}");
    assert_eq!(upstream.seen().connections, 0);
}

/// R12.
#[test]
fn what_is_not_http_gets_a_bare_400_or_431_or_nothing() {
    let (upstream, proxy) = started();
    let huge = format!("x-huge: {}", "a".repeat(1 << 20));
    for (bytes, status) in [
        (b"\x16\x03\x01\x02\x00\r\n\r\n".to_vec(), "400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), "400"),
        (request("GET /v1/x", "content-length: +5", "abcde"), "400"),
        (
            request("GET /v1/x", "content-length: 5\ncontent-length: 6", "abcde"),
            "400",
        ),
        (
            request("GET /v1/x", "transfer-encoding: xchunked", "0"),
            "400",
        ),
        (request("GET /v1/x", "x a: b", ""), "400"),
        (request("GET /v1/x", "x-a: b\0c", ""), "400"),
        (request("GET /v1/x", &huge, ""), "431"),
    ] {
        let answer = raw(proxy.address, &bytes);
        let line = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
        let bare = line.is_empty() || line == format!("HTTP/1.1 {status}");
        assert!(bare, "{line} to {:.80}", bytes.escape_ascii().to_string());
    }
    assert_eq!(upstream.seen().connections, 0);
}

#[test]
fn our_own_paths_are_reserved() {
    let (upstream, proxy) = started();
    for path in [
        "/_proxy",
        "/_proxy/",
        "/_proxy/x",
        "/_proxy/../v1/x",
        "/_proxy?a=b",
        "/_proxy/x/?a=b",
    ] {
        let answer = refused(&upstream, &proxy, get(path));
        assert_eq!(answer.refusal(), (404, 9007), "{path}");
    }
    for path in ["/_proxyx", "/_proxy%2f", "//_proxy/", "/v1/_proxy/"] {
        assert_eq!(proxy.get(path).status(), 200, "{path}");
    }
}

/// R5.
#[test]
fn listener_beyond_loopback_needs_protection() {
    let upstream = Upstream::ok();
    for address in ["0.0.0.0:0", "[::]:0", r#"["127.0.0.1:0","0.0.0.0:0"]"#] {
        let finished = Proxy::to(&upstream)
            .setting("listen.address", address)
            .run();
        assert_eq!(finished.code, Some(78), "{address}: {finished:?}");
        let ways_out = ["listen.unsafe_allow_remote", "access.client_tokens_file"];
        assert_has(&finished.stderr, &ways_out);
    }
    for command in [
        Proxy::to(&upstream).setting("listen.unsafe_allow_remote", "true"),
        with_client_tokens(&upstream),
    ] {
        let proxy = command.setting("listen.address", "0.0.0.0:0").start();
        assert!(proxy.address.ip().is_unspecified());
    }
}

/// A proxy that wants client tokens: `first-token` of a client with a name, or `second-token`.
fn with_client_tokens(upstream: &Upstream) -> Command {
    let command = Proxy::to(upstream);
    let file = command.file("tokens", "studio:first-token-01234\n\nsecond-token-01234\n");
    command.setting("access.client_tokens_file", file.to_str().unwrap())
}

/// A JWT as an unchanged Kling client makes it, valid between these seconds from now.
fn client_jwt([from, to]: [i64; 2], secret: &str) -> String {
    let time = |offset| now().checked_add_signed(offset);
    let claims = json!({ "iss": "any", "exp": time(to), "nbf": time(from) });
    let token = mint(&json!({ "alg": "HS256", "typ": "JWT" }), &claims, secret);
    format!("authorization: Bearer {token}")
}

#[test]
fn client_token_is_accepted_in_each_of_three_ways() {
    let upstream = Upstream::ok();
    let proxy = with_client_tokens(&upstream).start();
    for header in [
        "kling-proxy-token: first-token-01234",
        "kling-proxy-token: second-token-01234",
        "authorization: Bearer first-token-01234",
        "authorization: Bearer second-token-01234",
        &client_jwt([-5, 1800], "first-token-01234"),
        &client_jwt([-5, 1800], "second-token-01234"),
    ] {
        let answer = proxy.send(request("GET /v1/x", header, ""));
        assert_eq!(answer.status(), 200, "{header}");
        assert_eq!(upstream.last().header("kling-proxy-token"), None);
    }
}

/// The JWT of a client, signed well, whose header names another algorithm.
fn signed_by(algorithm: &str) -> String {
    let claims = json!({ "exp": now() + 1800, "nbf": now() - 5 });
    let token = mint(&json!({ "alg": algorithm }), &claims, "first-token-01234");
    format!("authorization: Bearer {token}")
}

/// R28, R37.
#[test]
fn client_without_a_token_of_ours_is_refused_and_not_told_why() {
    let upstream = Upstream::ok();
    let proxy = with_client_tokens(&upstream).start();
    let mut bodies = Vec::new();
    for header in [
        "accept: */*",
        "kling-proxy-token:",
        "kling-proxy-token: studio",
        "kling-proxy-token: studio:first-token-01234",
        "kling-proxy-token: first-token-0123",
        "authorization: Basic first-token-01234",
        "authorization: first-token-01234",
        "cookie: kling-proxy-token=first-token-01234",
        &client_jwt([-5, 1800], "another-token-01234"),
        UNSIGNED,
        &client_jwt([-3600, -60], "first-token-01234"),
        &client_jwt([3600, 7200], "first-token-01234"),
        &client_jwt([-5, 25 * 3600], "first-token-01234"),
        &signed_by("HS384"),
        &signed_by("none"),
        &format!("authorization: Bearer {}", "x".repeat(5_000)),
        &format!("kling-proxy-token: {}", "x".repeat(5_000)),
    ] {
        let answer = refused(&upstream, &proxy, request("GET /v1/x", header, ""));
        assert_eq!(answer.refusal(), (401, 9003), "{header}");
        let mut body = answer.json();
        body["request_id"].take();
        bodies.push(body);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
}

#[test]
fn request_over_the_limit_in_flight_is_refused_at_once() {
    let (upstream, proxy) = started_with(&[("limits.in_flight", "1")]);
    let gate = upstream.hold();
    let mut first = proxy.connect();
    first.send(get("/v1/first"));
    upstream.wait(|seen| seen.requests.len() == 1);

    let answer = refused(&upstream, &proxy, post("/v1/second", "{}"));
    assert_eq!(answer.refusal(), (503, 9301));
    assert_eq!(answer.header("x-should-retry"), Some("true"));
    assert!(answer.header("retry-after").is_some(), "{}", answer.head);

    gate.open();
    assert_eq!(first.answer().text(), SUCCESS);
    assert_eq!(proxy.get("/v1/third").status(), 200);
}

/// R36.
#[test]
fn client_leaves_places_for_others_and_half_while_they_want_it() {
    let upstream = Upstream::ok();
    let proxy = with_client_tokens(&upstream)
        .setting("limits.in_flight", "8")
        .start();
    let [first, second] = ["first", "second"].map(|name| {
        let token = format!("kling-proxy-token: {name}-token-01234");
        request("GET /v1/x", &token, "")
    });
    let begun = |request: &[u8]| {
        let mut connection = proxy.connect();
        connection.send(request);
        connection
    };
    // One place is for whoever else comes.
    let gate = upstream.hold();
    let mut greedy: Vec<_> = (0..7).map(|_| begun(&first)).collect();
    upstream.wait(|seen| seen.requests.len() == 7);
    assert_eq!(begun(&first).answer().refusal(), (503, 9301));
    let mut modest = vec![begun(&second)];
    upstream.wait(|seen| seen.requests.len() == 8);
    gate.open();
    for connection in greedy.iter_mut().chain(&mut modest) {
        assert_eq!(connection.answer().status(), 200);
    }
    // From then on it may have half.
    let gate = upstream.hold();
    let mut greedy: Vec<_> = (0..4).map(|_| begun(&first)).collect();
    upstream.wait(|seen| seen.requests.len() == 12);
    assert_eq!(begun(&first).answer().refusal(), (503, 9301));
    let mut modest: Vec<_> = (0..4).map(|_| begun(&second)).collect();
    upstream.wait(|seen| seen.requests.len() == 16);
    gate.open();
    for connection in greedy.iter_mut().chain(&mut modest) {
        assert_eq!(connection.answer().status(), 200);
    }
}

#[test]
fn crowd_over_the_limit_in_flight_is_refused_while_those_within_it_wait() {
    let (upstream, proxy) = started_with(&[("limits.in_flight", "8")]);
    let gate = upstream.hold();
    let begun = |_| {
        let mut connection = proxy.connect();
        connection.send(post("/v1/x", "{}"));
        connection
    };
    let mut admitted: Vec<_> = (0..8).map(begun).collect();
    upstream.wait(|seen| seen.requests.len() == 8);
    let crowd: Vec<_> = (0..100).map(begun).collect();
    for mut refused in crowd {
        let answer = refused.answer();
        assert_eq!(answer.refusal(), (503, 9301));
        assert!(answer.header("retry-after").is_some(), "{}", answer.head);
    }
    gate.open();
    for connection in &mut admitted {
        assert_eq!(connection.answer().text(), SUCCESS);
    }
    assert_eq!(upstream.seen().requests.len(), 8);
}

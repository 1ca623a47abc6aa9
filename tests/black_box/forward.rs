//! What is not ours to change travels byte for byte; what must not travel does not.

use crate::support::{
    Command, Message, Proxy, SUCCESS, Step, Upstream, get, gzip, parse_headers, reply, request,
    send, started, started_with,
};

/// Headers of a request that upstream saw, less the three that are ours.
fn arrived(request: &Message) -> Vec<(String, &str)> {
    let mut headers = request.headers();
    headers.retain(|(name, _)| !["host", "authorization", "kling-proxy-hop"].contains(&&**name));
    headers
}

/// R15.
#[test]
fn path_and_query_arrive_byte_for_byte() {
    let (upstream, proxy) = started();
    let long = format!("/v1/{}?{}", "a".repeat(3 << 10), "b=1&".repeat(768));
    for target in [
        "/v1/videos/text2video",
        "/v1/videos/image2video/",
        "/v1/images/kolors-virtual-try-on//831",
        "/kling/v1/videos/text2video/1",
        "//",
        "//v1//x//",
        "/..",
        "/./",
        "/a/./b",
        "/a/../b",
        "/../../etc/passwd",
        "/v1/%2e%2e/x",
        "/v1/%2E/x",
        "/v1/a%2Fb%2fc",
        "/a\\b\\..\\c",
        "/a%5cb",
        "/a%00b%0d%0a",
        "/%",
        "/%zz",
        "/%E5%8F%AF%E7%81%B5",
        "/a;b=c;d",
        "/@user:pass@host",
        "/a:80/b",
        "/~me",
        "/a|b",
        "/*",
        "/!$&'()*+,=",
        "/v1?",
        "/v1/?",
        "/v1??a=?",
        "/v1/x?a=b&&c&=&d=",
        "/v1/x?q=%20+%2B",
        "/v1/x?u=http://other.test/../a",
        "/v1/x?a=[1]&b={2}",
        "/_proxyx",
        "/_proxy%2fx",
        "/metrics",
        "/health/ready",
        &long,
    ] {
        proxy.get(target);
        let line = format!("GET {target} HTTP/1.1");
        assert_eq!(upstream.last().first_line(), line);
    }
}

#[test]
fn method_arrives_as_it_came() {
    let (upstream, proxy) = started();
    for method in [
        "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE",
    ] {
        let request = request(&format!("{method} /v1/x"), "", "");
        let answer = proxy.connect().send(request).head();
        assert_eq!((answer.status(), upstream.last().method()), (200, method));
    }
}

#[test]
fn body_and_its_framing_arrive_as_they_came() {
    let (upstream, proxy) = started();
    let binary: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let chunked = [b"186a0\r\n", &binary[..], b"\r\n0\r\n\r\n"].concat();
    for (framing, sent, body) in [
        ("content-length: 100000", &binary, &binary),
        ("transfer-encoding: chunked", &chunked, &binary),
        ("content-length: 0", &vec![], &vec![]),
        ("", &vec![], &vec![]),
    ] {
        let head = request("POST /v1/images/generations", framing, "");
        proxy.connect().send(head).send(sent).answer();
        let last = upstream.last();
        assert_eq!(arrived(&last), parse_headers(framing), "{framing}");
        assert!(last.body == *body, "{framing}: another body arrived");
    }
}

#[test]
fn continue_is_given_where_it_is_expected() {
    // curl expects it before a body of more than a megabyte.
    let (upstream, proxy) = started();
    let mut connection = proxy.connect();
    connection.send(request(
        "POST /",
        "expect: 100-continue\ncontent-length: 5",
        "",
    ));
    assert_eq!(connection.head().status(), 100);
    assert_eq!(connection.send("frame").answer().status(), 200);
    assert_eq!(upstream.last().body, b"frame");
}

/// R9, R10 and R11.
#[test]
fn credentials_hop_by_hop_forwarding_and_override_headers_never_arrive() {
    let (upstream, proxy) = started();
    for trap in [
        "Authorization: Bearer of-the-client",
        "Authorization: Bearer one\nAuthorization: Bearer two",
        "Proxy-Authorization: Basic YTpi",
        "Cookie: a=b\ncookie: c=d",
        "kling-proxy-token: secret",
        "Kling-Proxy-Account: other\nkling-proxy-wait: 60\nkling-proxy-x: 1",
        "Connection: Authorization\nAuthorization: Bearer x",
        "Connection: close, authorization\nAuthorization: Bearer x",
        "Connection: \nConnection: authorization, host\nAuthorization: Bearer x",
        "Connection: x-named,,  X-Other\nX-Named: 1\nx-other: 2",
        "Connection: keep-alive\nKeep-Alive: timeout=5, max=100",
        "Proxy-Connection: keep-alive",
        "TE: trailers\nConnection: TE",
        "Trailer: x-checksum",
        "Upgrade: websocket\nConnection: Upgrade",
        "X-Forwarded-For: 10.0.0.1\nX-Forwarded-Host: evil.test\nX-Forwarded-Proto: https",
        "X-Forwarded-Port: 1\nX-Forwarded-Prefix: /a\nX-Forwarded-Anything: 1",
        "Forwarded: for=10.0.0.1;host=evil.test",
        "X-Real-IP: 10.0.0.1",
        "Via: 1.1 other",
        "x_forwarded_for: 10.0.0.1\nauthorization_: a\ncontent_length: 5",
        "X-HTTP-Method-Override: DELETE\nX-HTTP-Method: DELETE\nX-Method-Override: DELETE",
        "X-Original-URL: /v1/y\nX-Original-URI: /v1/y\nX-Rewrite-URL: /v1/y",
        "X-Original-Host: evil.test\nX-Original-Method: DELETE",
    ] {
        let headers = format!("accept: */*\n{trap}");
        let answer = proxy.send(request("GET /v1/x", &headers, ""));
        let (status, last) = (answer.status(), upstream.last());
        let expected = (200, parse_headers("accept: */*"));
        assert_eq!((status, arrived(&last)), expected, "{trap}");
    }
}

#[test]
fn ordinary_headers_arrive_unchanged() {
    let (upstream, proxy) = started();
    let headers = r#"Accept: application/json, text/*;q=0.5
        Accept-Encoding: gzip;q=0.9, deflate
        Accept-Language: zh-CN,zh;q=0.9
        Cache-Control: no-cache
        Content-Length: 2
        Content-Type: application/json; charset=utf-8
        Idempotency-Key: 5ce1a0d2
        If-None-Match: "abc"
        Range: bytes=0-99
        User-Agent: python-requests/2.32
        X-Empty:
        X-Forward: not X-Forwarded-
        X-Original: not X-Original-URL
        X-Request-Id: client-1
        X-Title: 可灵
        X-Twice: a
        X-Twice: b"#
        .replace("\n        ", "\n");
    proxy
        .connect()
        .send(request("POST /v1/x", &headers, ""))
        .send("{}")
        .answer();
    assert_eq!(arrived(&upstream.last()), parse_headers(&headers));
}

#[test]
fn accept_encoding_arrives_without_what_the_proxy_cannot_read() {
    let (upstream, proxy) = started();
    for (sent, arrives) in [
        ("x-none: 1", "x-none: 1"),
        (
            "accept-encoding: gzip, deflate",
            "accept-encoding: gzip, deflate",
        ),
        (
            "accept-encoding: gzip, deflate, br, zstd",
            "accept-encoding: gzip, deflate",
        ),
        (
            "Accept-Encoding: br;q=1.0, gzip;q=0.8\nAccept-Encoding: zstd\nAccept-Encoding: identity;q=0.1",
            "accept-encoding: gzip;q=0.8\naccept-encoding: identity;q=0.1",
        ),
        ("accept-encoding: br", "accept-encoding: identity"),
        (
            "accept-encoding: *",
            "accept-encoding: gzip, deflate, identity",
        ),
    ] {
        proxy.send(request("GET /v1/x", sent, ""));
        assert_eq!(arrived(&upstream.last()), parse_headers(arrives), "{sent}");
    }
}

#[test]
fn answer_loses_its_hop_by_hop_headers_and_no_others() {
    let (upstream, proxy) = started();
    let kept = "Content-Length: 2\r\nContent-Type: application/json\r\n\
        Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nETag: \"1\"\r\nServer: kling\r\n\
        X-Request-Id: up-1\r\n\
        X-Twice: 1\r\nX-Twice: 2\r\n";
    let dropped = "Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n\
        Proxy-Connection: a\r\nTrailer: x\r\nUpgrade: h2c\r\n";
    upstream.answer(format!("HTTP/1.1 200 OK\r\n{kept}{dropped}\r\n{{}}").into());
    let answer = proxy.get("/v1/x");
    let mut headers = answer.headers();
    headers.retain(|(name, _)| name != "kling-proxy-request-id");
    assert_eq!((headers, answer.text()), (parse_headers(kept), "{}"));
}

/// R50.
#[test]
fn answer_cannot_act_on_localhost_beyond_itself() {
    let acting = "Strict-Transport-Security: max-age=31536000\nClear-Site-Data: \"*\"\n\
        Set-Cookie: a=b; Path=/\nSet-Cookie: c=d\nService-Worker-Allowed: /\n\
        Alt-Svc: h3=\":443\"\nNEL: {}\nReport-To: {}\nReporting-Endpoints: a=\"/\"\n\
        Access-Control-Allow-Origin: *";
    let page = "<script>fetch('/v1/videos/text2video', {method: 'POST'})</script>";
    let cases = [
        (200, "application/json", SUCCESS),
        (400, "application/json", r#"{"code":1200}"#),
        (200, "text/html", page),
        (502, "text/html", page),
        (200, "image/svg+xml", page),
    ];
    for format in ["kling", "upstream"] {
        let settings = [("errors.format", format), ("retry.attempts", "1")];
        let (upstream, proxy) = started_with(&settings);
        for (status, media_type, body) in cases {
            let headers = format!("content-type: {media_type}\nx-kept: a\n{acting}");
            upstream.answer(reply(status, &headers, body));
            let answer = proxy.get("/v1/x");
            assert_eq!(answer.header("x-kept"), Some("a"));
            for line in acting.lines() {
                let (name, _) = line.split_once(':').unwrap();
                assert_eq!(answer.header(name), None, "{status} {media_type}: {name}");
            }
            // A browser that is led there shows it as a page without scripts.
            if media_type != "application/json" {
                let told = ["x-content-type-options", "content-security-policy"];
                let told = told.map(|name| answer.header(name));
                assert_eq!(told, [Some("nosniff"), Some("sandbox")], "{media_type}");
            }
        }
    }
}

/// R35.
#[test]
fn trailers_of_an_answer_are_dropped() {
    let (upstream, proxy) = started();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\ntrailer: set-cookie, x-trailer\r\n\r\n";
    let chunk = format!("{:x}\r\n{SUCCESS}\r\n", SUCCESS.len());
    let trailers = "0\r\nset-cookie: a=b\r\nx-trailer: a\r\nkling-proxy-error: a\r\n\r\n";
    upstream.answer(format!("{head}{chunk}{trailers}").into());
    for _ in 0..2 {
        let headers = "te: trailers\nconnection: te, close";
        let mut client = proxy.connect();
        let rest = client.send(request("GET /v1/x", headers, "")).rest();
        let rest = String::from_utf8(rest).unwrap().to_ascii_lowercase();
        assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
        for name in ["set-cookie", "x-trailer", "kling-proxy-error"] {
            assert!(!rest.contains(name), "{rest}");
        }
    }
    assert_eq!(upstream.seen().connections, 1, "its connection is kept");
}

#[test]
fn length_of_an_answer_does_not_count_beside_its_chunks() {
    let (upstream, proxy) = started();
    for length in [2, 50] {
        let framing = format!("content-length: {length}\r\ntransfer-encoding: chunked");
        let answer = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n5\r\nabcde\r\n0\r\n\r\n");
        upstream.answer(answer.into());
        let answer = proxy.get("/v1/x");
        assert_eq!(
            (answer.text(), answer.header("content-length")),
            ("abcde", None)
        );
    }
}

#[test]
fn body_of_an_answer_and_its_framing_pass_as_they_came() {
    let (upstream, proxy) = started();
    let gzip = gzip(SUCCESS);
    let length = format!("content-length: {}", gzip.len());
    let encoded = format!("content-encoding: gzip\ncontent-type: application/json\n{length}");
    for (headers, sent, body) in [
        (
            "content-type: application/json\ncontent-length: 3",
            &b"\0\x01\xff"[..],
            &b"\0\x01\xff"[..],
        ),
        (&encoded, &gzip, &gzip),
        (
            "content-length: 0\ncontent-type: application/json",
            b"",
            b"",
        ),
        (
            "content-type: application/a+json\ntransfer-encoding: chunked",
            b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            b"abcde",
        ),
    ] {
        let head = format!("HTTP/1.1 201 Created\n{headers}\ndate: now\n\n");
        upstream.answer([head.replace('\n', "\r\n").as_bytes(), sent].concat());
        let answer = proxy.get("/v1/x");
        let mut passed = answer.headers();
        passed.retain(|(name, _)| !["date", "kling-proxy-request-id"].contains(&&**name));
        assert_eq!((answer.status(), passed), (201, parse_headers(headers)));
        assert!(
            answer.body == body,
            "{headers}: {}",
            answer.body.escape_ascii()
        );
    }
}

#[test]
fn body_that_ends_with_its_connection_passes_whole() {
    let (upstream, proxy) = started();
    upstream.script(|_| {
        let closing = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc";
        vec![send(closing), Step::Close]
    });
    assert_eq!(proxy.get("/v1/x").text(), "abc");
}

#[test]
fn answer_to_head_keeps_the_length_it_speaks_of() {
    let (upstream, proxy) = started();
    upstream.script(|_| vec![send("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n")]);
    let mut connection = proxy.connect();
    for _ in 0..2 {
        let answer = connection.send(request("HEAD /v1/x", "", "")).head();
        assert_eq!(answer.header("content-length"), Some("1234"));
    }
}

/// R20.
#[test]
fn redirect_is_handed_on_and_not_followed() {
    let (upstream, proxy) = started();
    for (status, location) in [
        (301, "https://other.test/x"),
        (302, "/v1/y"),
        (307, "//other.test"),
        (308, "?a"),
    ] {
        upstream.answer(reply(status, &format!("location: {location}"), "moved"));
        let answer = proxy.get("/v1/x");
        assert_eq!(answer.status(), status);
        assert_eq!(answer.header("location"), Some(location));
        assert_eq!(answer.text(), "moved");
    }
    assert_eq!(upstream.first_lines(), ["GET /v1/x HTTP/1.1"; 4]);
}

/// R8.
#[test]
fn nothing_in_a_request_says_where_it_goes() {
    let (upstream, proxy) = started();
    let elsewhere = Upstream::ok();
    let url = &elsewhere.url;
    let (_, authority) = url.split_once("//").unwrap();
    let port = authority.replace("127.0.0.1", "");
    for header in [
        format!("x-forwarded-host: {authority}"),
        format!("forwarded: host=\"{authority}\";proto=http"),
        format!("x-original-host: {authority}"),
        format!("x-original-url: {url}/v1/x"),
        format!("x-rewrite-url: {url}/v1/x"),
        format!("x-upstream-url: {url}"),
        format!("x-target-url: {url}"),
        format!("x-base-url: {url}"),
        format!("x-api-base: {url}"),
        format!("kling-base-url: {url}"),
        format!("kling-proxy-upstream: {url}"),
        format!("upstream.url: {url}"),
        format!("x-portkey-custom-host: {url}"),
        format!("destination: {url}"),
        format!("alt-used: {authority}"),
        format!("referer: {url}/"),
    ] {
        proxy.send(request("GET /v1/x", &header, ""));
        assert_eq!(upstream.last().target(), "/v1/x", "{header}");
    }
    for target in [
        format!("/{url}/v1/x"),
        format!("//{authority}/v1/x"),
        format!("/@{authority}/v1/x"),
        format!("/v1/x?base_url={url}&upstream={url}&host={authority}"),
    ] {
        proxy.get(&target);
        assert_eq!(upstream.last().target(), target);
    }
    for member in ["api_base", "base_url", "upstream_url", "host"] {
        let body = format!(r#"{{"{member}":"{url}"}}"#);
        proxy.post("/v1/x", &body);
        assert_eq!(upstream.last().text(), body);
    }
    proxy.send(format!(
        "GET /v1/port HTTP/1.1\r\nhost: localhost{port}\r\n\r\n"
    ));
    assert_eq!(upstream.last().target(), "/v1/port");
    assert_eq!(elsewhere.seen().connections, 0);
}

/// R29.
#[test]
fn proxy_variables_of_the_environment_are_ignored() {
    let elsewhere = Upstream::ok();
    for upstream in [Upstream::ok(), Upstream::tls("http/1.1")] {
        let variables = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];
        let set = |command: Command, name: &str| {
            let command = command.env(name, &elsewhere.url);
            command.env(&name.to_lowercase(), &elsewhere.url)
        };
        let proxy = variables
            .into_iter()
            .fold(Proxy::to(&upstream), set)
            .start();
        assert_eq!(proxy.get("/v1/x").status(), 200, "{}", upstream.url);
        assert_eq!(upstream.last().target(), "/v1/x");
    }
    assert_eq!(elsewhere.seen().connections, 0);
}

/// R7.
#[test]
fn absolute_form_with_our_authority_is_forwarded_as_its_path_and_query() {
    let (upstream, proxy) = started();
    for (authority, target) in [
        ("localhost", "/v1/x?a=b"),
        ("localhost:5546", "/v1//x/?"),
        ("127.0.0.1:5546", "/a/../b"),
        ("[::1]", "/v1/x"),
    ] {
        let head = format!("GET http://{authority}{target} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
        assert_eq!(proxy.send(&head).status(), 200, "{head}");
        let line = format!("GET {target} HTTP/1.1");
        assert_eq!(upstream.last().first_line(), line, "{head}");
    }
}

/// R14.
#[test]
fn request_id_is_the_clients_where_that_is_well_formed() {
    let (_upstream, proxy) = started();
    let longest = "a".repeat(64);
    let too_long = "a".repeat(65);
    for (sent, kept) in [
        ("client-1._A", true),
        (&longest, true),
        ("", false),
        ("a b", false),
        ("a/b", false),
        ("\u{e9}", false),
        (&too_long, false),
    ] {
        let answer = proxy.send(request("GET /v1/x", &format!("x-request-id: {sent}"), ""));
        let id = answer.header("kling-proxy-request-id").unwrap();
        assert!(!id.is_empty() && (id == sent) == kept, "{sent} became {id}");
    }
}

#[test]
fn upstream_over_tls_sees_the_same() {
    for protocol in ["http/1.1", "h2"] {
        let upstream = Upstream::tls(protocol);
        let proxy = Proxy::to(&upstream).start();
        let headers = "connection: x-hop\nx-hop: 1\nx-tag: a";
        let answer = proxy.send(request("POST /v1//x/%2e?a=b&&", headers, "{\"a\": 1}\n"));
        assert_eq!(answer.text(), SUCCESS, "{protocol}");
        let last = upstream.last();
        assert_eq!([last.method(), last.target()], ["POST", "/v1//x/%2e?a=b&&"]);
        assert_eq!(last.text(), "{\"a\": 1}\n", "{protocol}");
        let expected = parse_headers("content-length: 9\nx-tag: a");
        assert_eq!(arrived(&last), expected, "{protocol}");
    }
}

#[test]
fn connection_is_reused_after_an_answer_in_chunks() {
    let (upstream, proxy) = started();
    let chunks = format!("{:x}\r\n{SUCCESS}\r\n0\r\n\r\n", SUCCESS.len());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked";
    upstream.answer(format!("{head}\r\n\r\n{chunks}").into_bytes());
    let mut client = proxy.connect();
    for _ in 0..5 {
        assert_eq!(client.send(get("/v1/x")).answer().text(), SUCCESS);
    }
    assert_eq!(upstream.seen().connections, 1);
}

#[test]
fn connections_to_upstream_are_reused() {
    let (upstream, proxy) = started();
    for _ in 0..20 {
        assert_eq!(proxy.send(get("/v1/videos/text2video/1")).status(), 200);
    }
    // Each worker keeps its own; there are at most four.
    let connections = upstream.seen().connections;
    assert!(connections <= 4, "{connections} connections");
}

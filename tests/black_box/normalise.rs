//! Every error leaves in one shape, whoever made it; what is no error passes byte for byte.

use serde_json::{Value, json};

use crate::support::{
    Command, Message, Proxy, SUCCESS, Step, Upstream, closed, get, gzip, kling, post, reply,
    request, send, started, started_with, started_without_retry,
};

/// May a request with this answer be sent again?
#[derive(Clone, Copy, PartialEq)]
enum Again {
    Yes,
    No,
    /// A read may, a create may not: its task may exist.
    Read,
}
use Again::{No, Read, Yes};

/// The vendor's table word for word (definition, explanation, solution), with what is ours.
type Row = (u64, u16, &'static str, Again, [&'static str; 3]);
#[rustfmt::skip]
const TABLE: [Row; 21] = [
    (1000, 401, "authentication_failed", No, ["Authentication failed", "Authentication failed", "Check if the Authorization is correct"]),
    (1001, 401, "authorization_missing", No, ["Authentication failed", "Authorization is empty", "Fill in the correct Authorization in the Request Header"]),
    (1002, 401, "authorization_invalid", No, ["Authentication failed", "Authorization is invalid", "Fill in the correct Authorization in the Request Header"]),
    (1003, 401, "authorization_not_yet_valid", Yes, ["Authentication failed", "Authorization is not yet valid", "Check the start effective time of the token, wait for it to take effect or reissue"]),
    (1004, 401, "authorization_expired", Yes, ["Authentication failed", "Authorization has expired", "Check the validity period of the token and reissue it"]),
    (1100, 429, "account_exception", No, ["Account exception", "Account exception", "Verifying account configuration information"]),
    (1101, 429, "account_in_arrears", No, ["Account exception", "Account in arrears (postpaid scenario)", "Recharge the account to ensure sufficient balance"]),
    (1102, 429, "resource_pack_depleted", No, ["Account exception", "Resource pack depleted or expired (prepaid scenario)", "Purchase additional resource packages, or activate the post-payment service (if available)"]),
    (1103, 403, "access_denied", No, ["Account exception", "Unauthorized access to requested resource, such as API/model", "Verifying account permissions"]),
    (1200, 400, "invalid_parameters", No, ["Invalid request parameters", "Invalid request parameters", "Check whether the request parameters are correct"]),
    (1201, 400, "invalid_parameter_value", No, ["Invalid request parameters", "Invalid parameters, such as incorrect key or illegal value", "Refer to the specific information in the message field of the returned body and modify the request parameters"]),
    (1202, 404, "invalid_method", No, ["Invalid request parameters", "The requested method is invalid", "Review the API documentation and use the correct request method"]),
    (1203, 404, "resource_not_found", No, ["Invalid request parameters", "The requested resource does not exist, such as the model", "Refer to the specific information in the message field of the returned body and modify the request parameters"]),
    (1300, 400, "platform_policy", No, ["Trigger strategy", "Trigger strategy of the platform", "Check if any platform policies have been triggered"]),
    (1301, 400, "content_policy", No, ["Trigger strategy", "Trigger the content security policy of the platform", "Check the input content, modify it, and resend the request"]),
    (1302, 429, "rate_limited", Yes, ["Trigger strategy", "The API request is too fast, exceeding the platform’s rate limit", "Reduce the request frequency, try again later, or contact customer service to increase the limit"]),
    (1303, 429, "concurrency_limited", Yes, ["Trigger strategy", "Concurrency or QPS exceeds the prepaid resource package limit", "Reduce the request frequency, try again later, or contact customer service to increase the limit"]),
    (1304, 429, "ip_not_allowed", No, ["Trigger strategy", "Trigger the platform’s IP whitelisting policy", "Contact customer service"]),
    (5000, 500, "internal_error", Read, ["Internal error", "Server internal error", "Try again later, or contact customer service"]),
    (5001, 503, "unavailable", Read, ["Internal error", "Server temporarily unavailable, usually due to maintenance", "Try again later, or contact customer service"]),
    (5002, 504, "internal_timeout", Read, ["Internal error", "Server internal timeout, usually due to a backlog", "Try again later, or contact customer service"]),
];

const CONCURRENCY: &str = r#"{"code":1303,"message":"m","request_id":"r"}"#;
const JSON: &str = "content-type: application/json";

fn envelope(status: u16, code: u64) -> Vec<u8> {
    kling(
        status,
        format!(r#"{{"code":{code},"message":"it says","request_id":"up-1"}}"#),
    )
}

/// The same request as a read and as a create.
fn both() -> [(bool, Vec<u8>); 2] {
    [(true, get("/v1/x")), (false, post("/v1/x", "{}"))]
}

#[test]
fn service_code_has_its_row_whatever_the_status_it_came_with() {
    let (upstream, proxy) = started_without_retry();
    for (code, status, kind, again, [definition, explanation, solution]) in TABLE {
        for (upstream_status, (read, request)) in [status, 200, 418]
            .into_iter()
            .flat_map(|status| both().map(|both| (status, both)))
        {
            upstream.answer(envelope(upstream_status, code));
            let answer = proxy.send(request);
            let row = format!("{code} under {upstream_status}, read: {read}");
            let retryable = again == Yes || again == Read && read;

            let mut body = answer.json();
            let hint = body["error"].as_object_mut().unwrap().remove("hint");
            let expected = json!({
                "code": code,
                "message": "it says",
                "request_id": "up-1",
                "error": {
                    "type": kind,
                    "source": "upstream",
                    "upstream_status": upstream_status,
                    "definition": definition,
                    "explanation": explanation,
                    "solution": solution,
                    "retryable": retryable,
                    "attempts": 1,
                },
            });
            assert_eq!((answer.status(), body), (status, expected), "{row}");
            assert!(hint.is_some() || read || again != Read, "no hint: {row}");

            let headers = answer.told(["content-type", "kling-proxy-error", "x-should-retry"]);
            let retry = if retryable { "true" } else { "false" };
            let expected = ["application/json", kind, retry].map(Some);
            assert_eq!(headers, expected, "{row}");
            let seconds = answer
                .header("retry-after")
                .map(|value| value.parse::<u32>().unwrap());
            let waits = retryable && [429, 503].contains(&status);
            assert_eq!(seconds.is_some(), waits, "{row}");
        }
    }
}

#[test]
fn lists_by_post_are_reads() {
    let (upstream, proxy) = started();
    upstream.answer(envelope(500, 5000));
    for (line, retry) in [
        ("POST /tasks", "true"),
        ("POST /tasks?a=b", "true"),
        ("POST /solutions", "true"),
        ("POST /account/billing/balance", "true"),
        ("OPTIONS /v1/x", "true"),
        ("POST /solutions/virtual_try_on", "false"),
        ("POST /v1/tasks", "false"),
        ("PUT /tasks", "false"),
        ("DELETE /v1/x", "false"),
    ] {
        let answer = proxy.send(request(line, "", ""));
        assert_eq!(answer.header("x-should-retry"), Some(retry), "{line}");
    }
}

#[test]
fn code_is_found_wherever_it_stands_and_however_it_is_written() {
    let (upstream, proxy) = started();
    for body in [
        CONCURRENCY,
        r#"{"code":"1303","message":"m","request_id":"r"}"#,
        r#"{"code":" 1303","message":"m","request_id":"r"}"#,
        r#"{"code":1303.0,"message":"m","request_id":"r"}"#,
        "\u{feff}{\"message\":\"m\",\"request_id\":\"r\",\"code\":1303}",
        r#"{"message":"m","request_id":"r","code":1303}"#,
        "\n { \"message\" : \"m\",\r\n\t\"code\" : 1303 , \"request_id\":\"r\", \"data\": null }\n",
        r#"{"message":"m","data":{"code":0,"x":["code",{"code":1}]},"request_id":"r","code":1303}"#,
        r#"{"data":"\"code\":0,}","message":"m","request_id":"r","code":1303}"#,
    ] {
        for (header, bytes) in [
            (JSON, body.into()),
            ("content-type: Application/JSON; charset=utf-8", body.into()),
            (
                "content-type: application/json\ncontent-encoding: gzip",
                gzip(body),
            ),
        ] {
            upstream.answer(reply(200, header, bytes));
            let answer = proxy.get("/v1/x");
            assert_eq!(answer.refusal(), (429, 1303), "{header}: {body}");
            let json = answer.json();
            assert_eq!(
                [&json["message"], &json["request_id"]],
                ["m", "r"],
                "{body}"
            );
            assert_eq!(answer.header("content-encoding"), None, "{body}");
        }
    }
}

#[test]
fn code_is_found_beside_a_message_that_is_no_utf8() {
    let (upstream, proxy) = started();
    for body in [
        &b"{\"code\":1303,\"message\":\"m \xb2\xa2\",\"request_id\":\"r\"}"[..],
        b"{\"message\":\"m \xb2\xa2\",\"request_id\":\"r\",\"code\":1303}",
        b"\xef\xbb\xbf{\"message\":\"m \xb2\xa2\",\"request_id\":\"r\",\"code\":\" 1303\"}",
    ] {
        upstream.answer(reply(200, JSON, body));
        let answer = proxy.get("/v1/x");
        assert_eq!(answer.refusal(), (429, 1303), "{}", body.escape_ascii());
        let json = answer.json();
        let told = [&json["message"], &json["request_id"]];
        assert_eq!(told, ["m \u{fffd}\u{fffd}", "r"], "{}", body.escape_ascii());
    }
}

/// Upstream encodes by what it is asked for, and prefers what the proxy cannot read.
#[test]
fn code_is_found_whatever_encoding_the_client_asks_for() {
    let (upstream, proxy) = started();
    upstream.script(|request| {
        let asked = request.header("accept-encoding").unwrap_or_default();
        let (encoding, body) = if asked.contains("br") || asked.contains('*') {
            ("br", b"\x0b\x02\x80".to_vec())
        } else if asked.contains("gzip") {
            ("gzip", gzip(CONCURRENCY))
        } else {
            ("identity", CONCURRENCY.into())
        };
        let headers = format!("{JSON}\ncontent-encoding: {encoding}");
        vec![send(reply(200, &headers, body))]
    });
    for asked in ["br", "gzip, deflate, br, zstd", "br, *;q=0.1", "*", "gzip"] {
        let headers = format!("accept-encoding: {asked}");
        let answer = proxy.send(request("GET /v1/x", &headers, ""));
        assert_eq!(answer.refusal(), (429, 1303), "{asked}");
    }
}

#[test]
fn success_and_foreign_json_pass_byte_for_byte() {
    let (upstream, proxy) = started();
    let late = format!(r#"{{"data":"{}","code":1303}}"#, "a".repeat(70_000));
    for body in [
        SUCCESS,
        r#"{ "code" : 0, "data":{"task_status":"failed","task_status_msg":"risk","code":1301}}"#,
        r#"{"code":"0","message":"SUCCEED"}"#,
        r#"{"code":0.0,"message":"SUCCEED"}"#,
        "\u{feff}{\"code\":0,\"message\":\"SUCCEED\"}",
        r#"{"data":{"code":1303,"msg":"inner"}}"#,
        r#"{"code":0,"data":{"code":1303,"msg":"inner"}}"#,
        r#"{"code":null}"#,
        r#"{"code":"invalid_key"}"#,
        r#"{"error":{"code":1303}}"#,
        r#"[{"code":1303}]"#,
        "1303",
        r#"{"code":13"#,
        "not json at all",
        "",
        &late,
    ] {
        upstream.answer(kling(200, body));
        let answer = proxy.get("/v1/x");
        let told = (answer.status(), answer.header("kling-proxy-error"));
        assert_eq!(told, (200, None), "{body:.80}");
        assert!(
            answer.text() == body,
            "{body:.80} became {:.80}",
            answer.text()
        );
    }
    for content_type in ["text/plain", "video/mp4"] {
        let header = format!("content-type: {content_type}");
        upstream.answer(reply(200, &header, CONCURRENCY));
        let answer = proxy.get("/v1/x");
        assert_eq!((answer.status(), answer.text()), (200, CONCURRENCY));
    }
}

#[test]
fn data_and_other_headers_of_an_error_are_kept() {
    let (upstream, proxy) = started();
    let data = r#""data":{"id":829836802793406551123,"ratio":1.10,"list":[1,null,"é"]}"#;
    let body = format!(r#"{{"code":1201,"message":"no \"x\"","request_id":"r",{data}}}"#);
    let headers = "x-trace: abc\netag: \"a\"\nconnection: x-hop\nx-hop: 1";
    upstream.answer(reply(400, &format!("{JSON}\n{headers}"), body));
    let answer = proxy.get("/v1/x");
    assert_eq!(answer.refusal(), (400, 1201));
    assert_eq!(answer.json()["message"], "no \"x\"");
    assert!(answer.text().contains(data), "{}", answer.text());
    let kept = answer.told(["x-trace", "etag", "x-hop"]);
    assert_eq!(kept, [Some("abc"), Some("\"a\""), None]);
}

#[test]
fn null_data_is_left_out_and_a_missing_request_id_is_ours() {
    let (upstream, proxy) = started();
    upstream.answer(kling(400, r#"{"code":1200,"message":"m","data":null}"#));
    let body = proxy
        .send(request("GET /v1/x", "x-request-id: client-1", ""))
        .json();
    assert_eq!(body.get("data"), None);
    assert_eq!(body["request_id"], "client-1");
}

#[test]
fn unknown_code_keeps_upstreams_status() {
    let (upstream, proxy) = started();
    for (upstream_status, status) in [(200, 502), (201, 502), (400, 400), (418, 418), (503, 503)] {
        upstream.answer(envelope(upstream_status, 1999));
        let answer = proxy.get("/v1/x");
        assert_eq!(answer.refusal(), (status, 1999), "{upstream_status}");
        let told = answer.error(["type", "source", "upstream_status"]);
        let kind = "unknown_service_code";
        assert_eq!(
            told,
            [json!(kind), json!("upstream"), json!(upstream_status)]
        );
        assert_eq!(answer.header("kling-proxy-error"), Some(kind));
    }
}

#[test]
fn upstreams_own_retry_after_is_kept_where_sending_again_can_help() {
    let (upstream, proxy) = started();
    for (status, code, told) in [
        (429, 1302, Some("77")),
        (503, 5001, Some("77")),
        (429, 1102, None),
        (429, 1304, None),
    ] {
        let body = format!(r#"{{"code":{code},"message":"m","request_id":"r"}}"#);
        upstream.answer(reply(status, &format!("{JSON}\nretry-after: 77"), body));
        assert_eq!(proxy.get("/v1/x").header("retry-after"), told, "{code}");
    }
}

#[test]
fn reason_phrase_speaks_of_the_status_that_it_stands_beside() {
    let (upstream, proxy) = started();
    let headers = format!("{JSON}\r\ncontent-length: {}", CONCURRENCY.len());
    let answer = format!("HTTP/1.1 400 Too Bad\r\n{headers}\r\n\r\n{CONCURRENCY}");
    upstream.answer(answer.into());
    assert_eq!(
        proxy.get("/v1/x").first_line(),
        "HTTP/1.1 429 Too Many Requests"
    );
}

#[test]
fn error_that_is_no_envelope_becomes_one() {
    let (upstream, proxy) = started_without_retry();
    let html = format!("<html><h1>502</h1>{}", "é".repeat(600));
    let start: String = html.chars().take(512).collect();
    let text = "content-type: text/html; charset=utf-8";
    let encoded = format!("{text}\ncontent-encoding: gzip");
    let cut = r#"{"code":1303,"mess"#;
    for (status, headers, body, excerpt) in [
        (502, text, html.clone().into_bytes(), json!(start)),
        (502, &encoded, gzip(html), json!(start)),
        (
            404,
            "content-type: text/plain",
            b"nothing here".into(),
            json!("nothing here"),
        ),
        (500, "", b"".into(), Value::Null),
        (
            403,
            JSON,
            br#"{"error":"x"}"#.into(),
            json!(r#"{"error":"x"}"#),
        ),
        (429, JSON, cut.into(), json!(cut)),
        (
            503,
            "content-type: image/png",
            b"\x89\xff\0\x01".into(),
            Value::Null,
        ),
    ] {
        upstream.answer(reply(status, headers, body));
        for (read, request) in both() {
            let answer = proxy.send(request);
            let told = told_by_us(&answer, "upstream_bad_response");
            let expected = [
                json!(status),
                json!(status >= 500 && read),
                json!(1),
                excerpt.clone(),
            ];
            assert_eq!(answer.refusal(), (status, 9103), "{headers}, read: {read}");
            assert_eq!(told, expected, "{status}, {headers}, read: {read}");
        }
    }
}

#[test]
fn error_body_that_is_cut_off_becomes_a_whole_error() {
    let (upstream, proxy) = started();
    let gzip = gzip(CONCURRENCY);
    for (headers, sent) in [
        ("content-length: 900", &b"{\"code\":1303,\"mess"[..]),
        ("transfer-encoding: chunked", b"9\r\n<html>oh \r\n5\r\nab"),
        ("content-encoding: gzip\r\ncontent-length: 900", &gzip[..20]),
    ] {
        let head = format!("HTTP/1.1 502 Bad Gateway\r\n{JSON}\r\n{headers}\r\n\r\n");
        let bytes = [head.as_bytes(), sent].concat();
        upstream.script(move |_| vec![send(&bytes), Step::Close]);
        assert_eq!(proxy.get("/v1/x").refusal(), (502, 9103), "{headers}");
    }
}

/// R18.
#[test]
fn error_body_of_any_size_takes_little_memory() {
    let large = vec![b'a'; 10 << 20];
    let bomb = gzip(vec![b'a'; 64 << 20]);
    for (header, body) in [("x-plain: 1", large), ("content-encoding: gzip", bomb)] {
        let (upstream, proxy) = started();
        proxy.get("/v1/x");
        let before = proxy.memory("VmRSS");
        upstream.answer(reply(
            500,
            &format!("content-type: text/plain\n{header}"),
            body,
        ));
        let answer = proxy.get("/v1/x");
        assert_eq!(answer.refusal(), (500, 9103), "{header}");
        assert_eq!(
            answer.error(["excerpt"]),
            [json!("a".repeat(512))],
            "{header}"
        );
        let growth = proxy.memory("VmHWM").saturating_sub(before);
        assert!(growth < 4 << 20, "{header}: grew by {growth} bytes");
    }
}

#[test]
fn actionable_statuses_stop_clients_that_repeat_every_429() {
    let (upstream, proxy) = started_with(&[("errors.status", "actionable")]);
    for (code, documented, ..) in TABLE {
        let status = match code {
            1100..=1102 => 402,
            1304 => 403,
            _ => documented,
        };
        upstream.answer(envelope(documented, code));
        assert_eq!(proxy.get("/v1/x").refusal(), (status, code));
    }
}

#[test]
fn upstream_format_leaves_status_and_body_and_adds_the_headers() {
    let (upstream, proxy) = started_with(&[("errors.format", "upstream")]);
    for (status, content_type, body, kind) in [
        (429, "application/json", CONCURRENCY, "concurrency_limited"),
        (200, "application/json", CONCURRENCY, "concurrency_limited"),
        (502, "text/html", "<html>", "upstream_bad_response"),
    ] {
        upstream.answer(reply(
            status,
            &format!("content-type: {content_type}"),
            body,
        ));
        let answer = proxy.get("/v1/x");
        assert_eq!((answer.status(), answer.text()), (status, body));
        let headers = answer.told(["content-type", "kling-proxy-error", "x-should-retry"]);
        assert_eq!(headers, [content_type, kind, "true"].map(Some), "{status}");
    }
}

#[test]
fn error_of_head_has_the_headers_and_no_body() {
    let (upstream, proxy) = started();
    upstream.script(|_| {
        vec![send(
            "HTTP/1.1 404 Not Found\r\ncontent-length: 900\r\n\r\n",
        )]
    });
    let mut connection = proxy.connect();
    for _ in 0..2 {
        let answer = connection.send(request("HEAD /v1/x", "", "")).head();
        let told = (answer.status(), answer.header("kling-proxy-error"));
        assert_eq!(told, (404, Some("upstream_bad_response")));
    }
}

/// What an error of the proxy's own says of upstream, retry, attempts and excerpt.
#[track_caller]
fn told_by_us(answer: &Message, kind: &str) -> [Value; 4] {
    assert_eq!(
        answer.error(["type", "source"]),
        [kind, "proxy"],
        "{}",
        answer.text()
    );
    assert_eq!(answer.header("kling-proxy-error"), Some(kind));
    let body = answer.json();
    assert!(
        body["message"].is_string() && body["request_id"].is_string(),
        "{body}"
    );
    for text in answer.error(["definition", "explanation", "solution"]) {
        assert!(text.as_str().is_some_and(|text| !text.is_empty()), "{body}");
    }
    answer.error(["upstream_status", "retryable", "attempts", "excerpt"])
}

#[test]
fn unreachable_upstream_is_told_and_may_be_asked_again() {
    let upstream = Upstream::tls("http/1.1");
    let (_closed, nobody) = closed();
    let by_address = upstream.url.replace("localhost", "127.0.0.1");
    for (key, value) in [
        ("upstream.url", format!("http://{nobody}")),
        ("upstream.url", "https://does-not-exist.invalid".to_owned()),
        ("upstream.url", by_address),
        ("upstream.ca_file", String::new()),
    ] {
        let proxy = Proxy::to(&upstream).setting(key, &value).start();
        for (_, request) in both() {
            let answer = proxy.send(request);
            let [status, retryable, ..] = told_by_us(&answer, "upstream_unreachable");
            assert_eq!(answer.refusal(), (502, 9101), "{key} = {value}");
            assert_eq!([status, retryable], [Value::Null, json!(true)], "{value}");
        }
    }
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn lost_connection_is_told_and_only_a_read_may_be_asked_again() {
    let (upstream, proxy) = started_without_retry();
    upstream.script(|_| vec![Step::Close]);
    for (read, request) in both() {
        let answer = proxy.send(request);
        let told = told_by_us(&answer, "upstream_disconnected");
        assert_eq!(answer.refusal(), (502, 9104), "read: {read}");
        assert_eq!(told, [Value::Null, json!(read), json!(1), Value::Null]);
        let [hint] = answer.error(["hint"]);
        assert!(
            hint.is_string() || read,
            "a create that may exist, without a hint"
        );
    }
}

#[test]
fn create_arrives_at_most_once_whatever_becomes_of_its_connection() {
    let (upstream, proxy) = started();
    upstream.script(|request| match request.target().rsplit('/').next() {
        Some("kept") => vec![send(kling(200, SUCCESS))],
        Some("closed") => vec![send(kling(200, SUCCESS)), Step::Close],
        _ => vec![Step::Close],
    });
    for round in 0..60 {
        let fate = ["kept", "closed", "lost"][round % 3];
        let status = proxy.post(&format!("/{round}/{fate}"), "{}").status();
        assert!([200, 502].contains(&status), "{round}: {status}");
    }
    let mut creates = upstream.first_lines();
    let arrived = creates.len();
    creates.sort();
    creates.dedup();
    assert_eq!(creates.len(), arrived, "a create arrived twice");
}

/// So that a shell's prompt stands on a line of its own.
#[test]
fn body_of_an_error_ends_with_a_newline() {
    let upstream = Upstream::ok();
    upstream.script(|_| vec![send(kling(429, CONCURRENCY))]);
    let proxy = Proxy::to(&upstream).setting("retry.attempts", "1").start();
    for answer in [proxy.post("/v1/x", "{}"), proxy.get("/_proxy/nothing")] {
        assert!(answer.status() >= 400, "{}", answer.head);
        assert!(answer.text().ends_with("}}\n"), "{:?}", answer.text());
    }
    for path in ["/health/startup", "/health/live", "/health/ready"] {
        let answer = proxy.admin(path);
        assert!(
            answer.text().ends_with("}\n"),
            "{path}: {:?}",
            answer.text()
        );
    }
    let health = Command::new(["health"])
        .setting("admin.address", proxy.listener("admin").to_string())
        .run();
    assert!(health.stdout.ends_with('}'), "{health:?}");
}

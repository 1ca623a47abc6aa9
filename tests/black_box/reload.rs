//! What changes while the proxy runs: client tokens and settings, and who called.

use std::{fs, path::PathBuf, thread, time::Duration};

use tokio::time::Instant;

use crate::support::{
    Connection, PATIENCE, Proxy, Signal, Upstream, assert_has, eventually, get, kling, request,
};

/// How long a file of client tokens may be wrong before its old tokens end too.
const GRACE: Duration = Duration::from_mins(1);

/// The status of a request that shows this client token.
fn status(proxy: &Proxy, token: &str) -> u16 {
    let header = format!("kling-proxy-token: {token}");
    proxy.send(request("GET /v1/x", &header, "")).status()
}

/// A proxy that wants one of these client tokens, and their file.
fn admitting(upstream: &Upstream, tokens: &str) -> (PathBuf, Proxy) {
    let command = Proxy::to(upstream);
    let file = command.file("tokens", tokens);
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    (file, proxy)
}

/// Waits for a line of the log with all these parts.
fn logged(proxy: &Proxy, parts: &[&str]) {
    let wanted = |line: &str| parts.iter().all(|part| line.contains(part));
    let found = proxy.stderr.find(wanted);
    assert!(found.is_some(), "no {parts:?} in {}", proxy.stderr.to_end());
}

#[test]
fn name_of_a_client_token_stands_in_logs_and_metrics() {
    let upstream = Upstream::ok();
    let (_file, proxy) = admitting(&upstream, "studio:first-token-01234\nsecond-token-01234\n");
    for token in ["first-token-01234", "second-token-01234"] {
        let header = format!("authorization: Bearer {token}");
        let answer = proxy.send(request("POST /v1/x", &header, "{}"));
        assert_eq!(answer.status(), 200, "{token}");
    }
    logged(&proxy, &["\"client\":\"studio\"", "answered"]);
    logged(&proxy, &["\"client\":\"unnamed\"", "answered"]);
    assert_has(
        proxy.admin("/metrics").text(),
        &[
            "kling_proxy_client_requests_total{client=\"studio\"} 1",
            "kling_proxy_client_requests_total{client=\"unnamed\"} 1",
        ],
    );
}

#[test]
fn changed_client_tokens_are_noticed_and_a_broken_file_keeps_the_old_ones() {
    let upstream = Upstream::ok();
    let (file, proxy) = admitting(&upstream, "first-token-01234\n");
    assert_eq!(status(&proxy, "first-token-01234"), 200);

    // No signal: it is noticed by itself.
    fs::write(&file, "second-token-01234\n").unwrap();
    eventually("the new token is accepted", || {
        status(&proxy, "second-token-01234") == 200
    });
    assert_eq!(status(&proxy, "first-token-01234"), 401);

    fs::write(&file, "short\n").unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "line 1", "keeping"]);
    assert_eq!(status(&proxy, "second-token-01234"), 200);
    fs::remove_file(&file).unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "cannot read", "keeping"]);
    assert_eq!(status(&proxy, "second-token-01234"), 200);
}

/// Whether the proxy says that nobody can call it, or that somebody can.
fn is_told_closed(proxy: &Proxy, closed: bool) -> bool {
    let ready = proxy.admin("/health/ready");
    assert_eq!(proxy.admin("/health/live").status(), 200);
    let metrics = proxy.admin("/metrics");
    let valid = format!("kling_proxy_client_tokens_valid {}", u8::from(!closed));
    if closed {
        ready.status() == 503
            && ready.text().contains("access.client_tokens_file")
            && metrics.text().contains(&valid)
    } else {
        ready.status() == 200 && metrics.text().contains(&valid)
    }
}

/// R41.
#[test]
fn emptied_file_of_client_tokens_closes_the_proxy_at_once() {
    let upstream = Upstream::ok();
    let (file, proxy) = admitting(&upstream, "first-token-01234\n");
    assert!(is_told_closed(&proxy, false));
    for empty in ["", "# first-token-01234\n"] {
        fs::write(&file, empty).unwrap();
        eventually("nobody is let in", || {
            status(&proxy, "first-token-01234") == 401
        });
        let answer = proxy.send(request("GET /v1/x", "", ""));
        assert_eq!(answer.refusal(), (401, 9003));
        assert!(is_told_closed(&proxy, true));
        logged(&proxy, &["WARN", "it holds no token", "none is accepted"]);

        fs::write(&file, "first-token-01234\n").unwrap();
        eventually("it opens again", || {
            status(&proxy, "first-token-01234") == 200
        });
        assert!(is_told_closed(&proxy, false));
    }
}

/// R41.
#[test]
fn file_of_client_tokens_that_stays_wrong_closes_the_proxy_after_a_minute() {
    let upstream = Upstream::ok();
    let tokens = "first-token-01234\n";
    let [short, missing] = [Some("short\n"), None].map(|broken| {
        let (file, proxy) = admitting(&upstream, tokens);
        let begun = Instant::now();
        match broken {
            Some(text) => fs::write(&file, text).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        (proxy, file, begun)
    });
    for (proxy, file, begun) in [short, missing] {
        while status(&proxy, "first-token-01234") == 200 {
            assert!(begun.elapsed() < GRACE + PATIENCE, "it never ends");
            thread::sleep(Duration::from_millis(100));
        }
        assert!(begun.elapsed() >= GRACE, "{:?}", begun.elapsed());
        assert!(is_told_closed(&proxy, true));
        logged(&proxy, &["WARN", "client tokens", "none is accepted"]);
        fs::write(&file, tokens).unwrap();
        eventually("it opens again", || {
            status(&proxy, "first-token-01234") == 200
        });
    }
}

#[test]
fn another_file_of_client_tokens_is_taken_over_on_sighup() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = ["first", "second", "third"].map(|name| {
        let file = command.file(name, &format!("{name}-token-0123456\n"));
        let path = file.to_str().unwrap();
        format!("[access]\nclient_tokens_file = \"{path}\"\n")
    });
    let settings = command.file("settings.toml", &tokens[0]);
    fs::write(command.home().join("third"), "").unwrap();
    let proxy = command
        .env("KLING_PROXY_CONFIG", settings.to_str().unwrap())
        .start();
    assert_eq!(status(&proxy, "first-token-0123456"), 200);
    fs::write(&settings, &tokens[1]).unwrap();
    proxy.signal(Signal::HUP);
    eventually("the tokens of the other file are accepted", || {
        status(&proxy, "second-token-0123456") == 200
    });
    assert_eq!(status(&proxy, "first-token-0123456"), 401);

    // One that holds no token is a wrong setting.
    fs::write(&settings, &tokens[2]).unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "it holds no token", "keeping the old"]);
    assert_eq!(status(&proxy, "second-token-0123456"), 200);
}

/// R41: what is there of a file that is being written, at the start of the proxy.
#[test]
fn file_of_client_tokens_that_is_being_written_is_waited_for() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let file = command.file("tokens", "");
    let writer = thread::spawn({
        let file = file.clone();
        move || {
            thread::sleep(Duration::from_millis(300));
            fs::write(&file, "first-token-01234\n").unwrap();
        }
    });
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    writer.join().unwrap();
    assert_eq!(status(&proxy, "first-token-01234"), 200);
}

#[test]
fn changes_are_noticed_while_upstream_refuses_everything() {
    let upstream = Upstream::ok();
    upstream.answer(kling(401, r#"{"code":1000}"#));
    let (file, proxy) = admitting(&upstream, "first-token-01234\n");
    fs::write(&file, "second-token-01234\n").unwrap();
    eventually("the old token is refused", || {
        let header = "kling-proxy-token: first-token-01234";
        proxy.send(request("GET /v1/x", header, "")).refusal() == (401, 9003)
    });
}

#[test]
fn sighup_takes_over_what_can_change_and_names_what_cannot() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let file = command.file("settings.toml", "");
    let proxy = command
        .env("KLING_PROXY_CONFIG", file.to_str().unwrap())
        .start();
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);

    let settings = "\
        [access]\nallowed_methods = [\"GET\"]\nallowed_origins = [\"http://app.test\"]\n\
        [log]\nfilter = \"kling_proxy=debug\"\n[upstream]\nresponse_timeout = \"7s\"\n\
        [errors]\nstatus = \"actionable\"\n";
    fs::write(&file, settings).unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "upstream.response_timeout", "next start"]);
    logged(&proxy, &["settings reloaded"]);
    assert_eq!(proxy.post("/v1/x", "{}").refusal(), (405, 9005));
    let page = request("GET /v1/page", "origin: http://app.test", "");
    let answer = proxy.send(page);
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some("http://app.test")
    );
    logged(&proxy, &["DEBUG", "/v1/page"]);

    upstream.answer(kling(429, r#"{"code":1102}"#));
    assert_eq!(proxy.get("/v1/x").status(), 402);
}

#[test]
fn settings_that_are_wrong_change_nothing() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let file = command.file("settings.toml", "");
    let proxy = command
        .env("KLING_PROXY_CONFIG", file.to_str().unwrap())
        .start();
    let settings = "[access]\nallowed_methods = [\"GET\"]\n[token]\nlifetime = \"5s\"\n";
    fs::write(&file, settings).unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "token.lifetime", "keeping the old ones"]);
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
}

/// R5, also later.
#[test]
fn reload_does_not_open_a_proxy_that_other_machines_can_reach() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = command.file("tokens", "first-token-01234\n");
    let protected = format!(
        "[access]\nclient_tokens_file = \"{}\"\n",
        tokens.to_str().unwrap()
    );
    let file = command.file("settings.toml", &protected);
    let proxy = command
        .setting("listen.address", "")
        .env("KLING_PROXY_CONFIG", file.to_str().unwrap())
        .argument("--listen=0.0.0.0:0")
        .start();
    fs::write(&file, "[listen]\nunsafe_allow_remote = true\n").unwrap();
    proxy.signal(Signal::HUP);
    logged(&proxy, &["WARN", "access.client_tokens_file", "keeping"]);
    let address = ([127, 0, 0, 1], proxy.address.port()).into();
    let answer = Connection::to(address).send(get("/v1/x")).answer();
    assert_eq!(answer.refusal(), (401, 9003));
}

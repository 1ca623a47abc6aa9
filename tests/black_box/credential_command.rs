//! A command that prints the credential: when it is run, with what, and what may go wrong.

use std::cell::Cell;
use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::{
    ACCESS_KEY, Command, Credential, Proxy, SECRET_KEY, Signal, Upstream, assert_has, eventually,
    kling,
};

/// A shell script that notes each of its runs in `runs`, and prints what stands in `printed`.
const SCRIPT: &str = "echo run >> runs; env > environment; cat printed";

/// A proxy that gets its credential from [`SCRIPT`].
fn printing(upstream: &Upstream, printed: &str) -> Command {
    let command = Command::new([]).upstream(upstream);
    command.file("printed", printed);
    let words = json!(["/bin/sh", "-c", SCRIPT]).to_string();
    command.setting("credentials.command", words)
}

fn pair(access_key: &str, secret_key: &str) -> String {
    json!({ "access_key": access_key, "secret_key": secret_key }).to_string()
}

/// Has the command print another key pair, asks by SIGHUP for the `nth` time for a new credential, and waits
/// until the log tells that it is there. By then whatever had the command run before has done so.
fn hang_up(proxy: &Proxy, home: &Path, nth: usize) {
    let printed = pair(ACCESS_KEY, &format!("{SECRET_KEY}{nth}"));
    fs::write(home.join("printed"), printed).unwrap();
    proxy.signal(Signal::HUP);
    let reloads = Cell::new(0);
    let is_changed = proxy.stderr.find(|line| {
        reloads.set(reloads.get() + usize::from(line.contains("settings reloaded")));
        reloads.get() == nth && line.contains("credential changed")
    });
    assert!(is_changed.is_some(), "{}", proxy.stderr.to_end());
}

fn runs(home: &Path) -> usize {
    fs::read_to_string(home.join("runs")).map_or(0, |runs| runs.lines().count())
}

#[test]
fn command_prints_a_pair_or_an_api_key() {
    let upstream = Upstream::ok();
    let proxy = printing(&upstream, &pair(ACCESS_KEY, SECRET_KEY)).start();
    assert_eq!(proxy.get("/v1/x").status(), 200);

    let upstream = Upstream::expecting(Credential::ApiKey("printed-api-key"));
    let proxy = printing(&upstream, r#"{"api_key":"printed-api-key"}"#).start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

#[test]
fn every_other_place_wins_over_the_command() {
    let upstream = Upstream::ok();
    let command = printing(&upstream, "no JSON").keys();
    let home = command.home();
    let proxy = command.start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
    assert_eq!(runs(&home), 0);
}

/// R22.
#[test]
fn command_gets_the_environment_without_our_secrets() {
    let upstream = Upstream::ok();
    let command = printing(&upstream, &pair(ACCESS_KEY, SECRET_KEY));
    let home = command.home();
    let _proxy = command
        .env("VAULT_ADDR", "kept")
        .env("KLING_PROXY_SANDBOX__SEED", "7")
        .env("KLING_JWT_TOKEN", "canary")
        .env("kling_pat", "canary")
        .env("KLINGSECRET", "canary")
        .env("CREDENTIALS_DIRECTORY", "/nowhere/canary")
        .start();
    let environment = fs::read_to_string(home.join("environment")).unwrap();
    assert_has(&environment, &["VAULT_ADDR=kept", "HOME="]);
    for ours in ["KLING", "canary"] {
        assert!(!environment.contains(ours), "{environment}");
    }
}

#[test]
fn command_is_run_again_on_sighup_and_after_a_refusal() {
    let upstream = Upstream::expecting(Credential::Any);
    let command = printing(&upstream, &pair(ACCESS_KEY, SECRET_KEY));
    let home = command.home();
    let proxy = command.start();
    assert_eq!(runs(&home), 1);
    hang_up(&proxy, &home, 1);
    assert_eq!(runs(&home), 2);

    // Within the minute a refusal is no reason. It may be heard of after the signal, but not after many.
    upstream.answer(kling(401, r#"{"code":1002,"message":"no"}"#));
    assert_eq!(proxy.get("/v1/x").refusal(), (401, 1002));
    for nth in 2..8 {
        hang_up(&proxy, &home, nth);
        assert_eq!(runs(&home), 1 + nth);
    }
}

#[test]
fn first_refusal_fetches_the_new_credential() {
    let upstream = Upstream::expecting(Credential::Any);
    let command = printing(&upstream, r#"{"api_key":"first-api-key"}"#);
    let home = command.home();
    let proxy = command.start();
    fs::write(home.join("printed"), r#"{"api_key":"second-api-key"}"#).unwrap();
    upstream.answer(kling(401, r#"{"code":1000,"message":"no"}"#));
    eventually("the second key is shown", || {
        assert_eq!(proxy.get("/v1/x").refusal(), (401, 1000));
        upstream.last().header("authorization") == Some("Bearer second-api-key")
    });
    assert_eq!(proxy.get("/v1/x").refusal(), (401, 1000));
    for nth in 1..7 {
        hang_up(&proxy, &home, nth);
        assert_eq!(runs(&home), 2 + nth, "not for each refusal");
    }
}

/// A stranger could have the command run by asking for a path that takes no key pair.
#[test]
fn refusal_where_the_credential_is_not_valid_runs_no_command() {
    let upstream = Upstream::ok();
    let command = Command::new([]).upstream(&upstream);
    command.file("printed", &pair(ACCESS_KEY, SECRET_KEY));
    let asked = command.file("asked", "start\n");
    let words = json!(["/bin/sh", "-c", "cat asked >> runs; cat printed"]);
    let home = command.home();
    let proxy = command
        .setting("credentials.command", words.to_string())
        .start();
    upstream.answer(kling(401, r#"{"code":1002,"message":"no"}"#));
    fs::write(&asked, "new\n").unwrap();
    for _ in 0..10 {
        for path in ["/tasks", "/text-to-video/kling-2.6", "//", "/nowhere"] {
            assert_eq!(proxy.get(path).refusal(), (401, 1002), "{path}");
        }
    }
    fs::write(&asked, "old\n").unwrap();
    assert_eq!(proxy.get("/v1/x").refusal(), (401, 1002));
    eventually("it is run again", || runs(&home) == 2);
    let runs = fs::read_to_string(home.join("runs")).unwrap();
    assert_eq!(runs, "start\nold\n");
}

#[test]
fn command_that_goes_wrong_is_told_without_what_it_printed() {
    let upstream = Upstream::ok();
    let half = json!({ "access_key": "canary-0123456789" }).to_string();
    for (printed, wrong) in [
        ("canary", "want one JSON object"),
        (r#"{"api_key":7}"#, "want one JSON object"),
        (r#"{"token":"canary"}"#, "want one JSON object"),
        ("{}", "want one JSON object"),
        (&half, "secret_key"),
        (r#"{"api_key":"canary canary"}"#, "visible characters"),
    ] {
        let finished = printing(&upstream, printed).run();
        assert_eq!(finished.code, Some(78), "{printed}: {finished:?}");
        assert_has(&finished.stderr, &["credentials.command", wrong]);
        assert!(!finished.stderr.contains("canary"), "{finished:?}");
    }
    for (words, wrong) in [
        (json!(["/nowhere/op"]), "cannot run it"),
        (json!(["/bin/sh", "-c", "exit 3"]), "exit status: 3"),
    ] {
        let command = Command::new([]).upstream(&upstream);
        let finished = command
            .setting("credentials.command", words.to_string())
            .run();
        assert_eq!(finished.code, Some(78), "{words}: {finished:?}");
        assert_has(&finished.stderr, &["credentials.command", wrong]);
    }
}

#[test]
fn broken_command_keeps_the_old_credential() {
    let upstream = Upstream::ok();
    let command = printing(&upstream, &pair(ACCESS_KEY, SECRET_KEY));
    let file = command.home().join("printed");
    let proxy: Proxy = command.start();
    fs::write(file, "sealed").unwrap();
    proxy.signal(Signal::HUP);
    let kept = |line: &str| line.contains("WARN") && line.contains("keeping what there is");
    assert!(
        proxy.stderr.find(kept).is_some(),
        "{}",
        proxy.stderr.to_end()
    );
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

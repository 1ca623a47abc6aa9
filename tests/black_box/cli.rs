//! The commands: what they print and how they end.

use crate::support::{ACCESS_KEY, Command, SECRET_KEY, assert_has, claims, verify};

#[test]
fn token_command_prints_a_valid_token_and_nothing_else() {
    let finished = Command::new(["token"]).keys().run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(verify(&finished.stdout, ACCESS_KEY, SECRET_KEY), Ok(()));
    let [exp, nbf] = ["exp", "nbf"].map(|name| claims(&finished.stdout)[name].as_u64());
    assert_eq!(exp.unwrap() - nbf.unwrap(), 1805);
}

#[test]
fn token_command_tells_the_claims_in_words() {
    let finished = Command::new(["token", "--decode"]).keys().run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(&finished.stdout, &["iss", "exp", "nbf", "HS256"]);
    for secret in [SECRET_KEY, "eyJ"] {
        assert!(!format!("{finished:?}").contains(secret), "{finished:?}");
    }
}

#[test]
fn token_command_without_keys_says_what_to_set() {
    let finished = Command::new(["token"]).run();
    assert_eq!(
        (finished.code, &*finished.stdout),
        (Some(78), ""),
        "{finished:?}"
    );
    assert_has(&finished.stderr, &["KLING_ACCESS_KEY", "KLING_SECRET_KEY"]);
}

#[test]
fn explain_shows_the_whole_table() {
    let finished = Command::new(["explain"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(&finished.stdout, &["1000", "1001", "1002", "1003", "1004"]);
    assert_has(&finished.stdout, &["1100", "1101", "1102", "1103"]);
    assert_has(&finished.stdout, &["1200", "1201", "1202", "1203"]);
    assert_has(&finished.stdout, &["1300", "1301", "1302", "1303", "1304"]);
    assert_has(&finished.stdout, &["5000", "5001", "5002"]);
}

#[test]
fn explain_shows_one_row_with_its_solution() {
    let finished = Command::new(["explain", "1303"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    // However it is wrapped.
    let text = finished
        .stdout
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    assert_has(&text, &["1303", "429", "concurrency_limited"]);
    assert_has(
        &text,
        &["Concurrency or QPS exceeds the prepaid resource package limit"],
    );
    assert_has(
        &text,
        &["Reduce the request frequency, try again later, or contact"],
    );
}

#[test]
fn explain_speaks_json() {
    let finished = Command::new(["explain", "1303", "--output", "json"]).run();
    let row: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(row["code"], 1303, "{row}");
    assert_eq!(row["type"], "concurrency_limited", "{row}");
}

#[test]
fn explain_of_an_unknown_code_fails() {
    let finished = Command::new(["explain", "4242"]).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(&finished.stderr, &["4242"]);
}

/// A flag that is heeded by no part of a command would be taken for one that is.
#[test]
fn flag_without_effect_is_refused() {
    for line in [
        "explain --listen 127.0.0.1:1",
        "--listen 127.0.0.1:1 explain",
        "health --listen 127.0.0.1:1",
        "wait --log-filter debug",
        "token --admin off",
        "sandbox --upstream https://api.test",
        "--sandbox check",
    ] {
        let words = line.split(' ');
        let finished = words.fold(Command::new([]), Command::argument).run();
        assert_eq!(finished.code, Some(2), "{line}: {finished:?}");
        assert_has(&finished.stderr, &["has no effect on"]);
    }
    for (command, heeded) in [("serve", true), ("settings", true), ("explain", false)] {
        let help = Command::new([command, "--help"]).run().stdout;
        assert_eq!(help.contains("--listen"), heeded, "{command}: {help}");
    }
    let flag = ["--listen", "127.0.0.1:1"];
    let before = Command::new([flag[0], flag[1], "settings"]).run();
    let after = Command::new(["settings", flag[0], flag[1]]).run();
    assert_has(&before.stdout, &[r#"listen.address = "127.0.0.1:1""#]);
    assert_eq!(before.stdout, after.stdout);
}

#[test]
fn help_says_what_a_newcomer_needs() {
    let finished = Command::new(["--help"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(
        &finished.stdout,
        &[
            "serve", "sandbox", "check", "token", "explain", "settings", "health", "wait",
        ],
    );
    assert_has(&finished.stdout, &["--sandbox", "KLING_ACCESS_KEY", "5546"]);
}

#[test]
fn wrong_command_line_ends_with_two() {
    for arguments in [
        ["--no-such-flag", "x"],
        ["no-such-command", "x"],
        ["explain", "not-a-code"],
        ["--listen", "--admin"],
        // A secret is never taken from the command line.
        ["--secret-key", "x"],
        ["--api-key", "x"],
    ] {
        let finished = Command::new(arguments).run();
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished:?}");
    }
}

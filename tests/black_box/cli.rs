//! The commands: what they print and how they end.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, process,
};

use serde_json::{Value, json};
use tempfile::TempDir;

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
fn explain_knows_codes_by_their_types() {
    let by_code = Command::new(["explain", "1303"]).run();
    let by_type = Command::new(["explain", "concurrency_limited"]).run();
    assert_eq!(by_type.code, Some(0), "{by_type:?}");
    assert_eq!(by_type.stdout, by_code.stdout);
    // As a header and a metric have it.
    let other = Command::new(["explain", "unknown_service_code"]).run();
    assert_eq!(other.code, Some(0), "{other:?}");
    assert_has(&other.stdout, &["unknown_service_code", "does not list"]);
    let wrong = Command::new(["explain", "concurrency-limit"]).run();
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    assert_has(&wrong.stderr, &["the nearest is concurrency_limited"]);
}

#[test]
fn explain_of_a_success_asks_for_nothing() {
    let finished = Command::new(["explain", "0"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(
        finished.stdout,
        "0 ok\n  status       200 OK\n  sent by      Kling\n  class        success: no error\n  \
         definition   Request successful\n  retryable    no: there is no error",
    );
}

#[test]
fn explain_speaks_json() {
    let finished = Command::new(["explain", "1303", "--output", "json"]).run();
    let row: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    assert_eq!(row["code"], 1303, "{row}");
    assert_eq!(row["type"], "concurrency_limited", "{row}");
}

/// The text has the columns that say something for the row, and JSON has all.
#[test]
fn explain_shows_how_a_code_is_treated() {
    let told = |code| {
        let finished = Command::new(["explain", code]).run();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        let lines = finished.stdout.lines().skip(1);
        let columns = lines.map(|line| line.trim().split_once(' ').unwrap());
        let columns = columns.map(|(name, text)| (name.to_owned(), text.trim().to_owned()));
        columns.collect::<BTreeMap<_, _>>()
    };
    for (code, name, text) in [
        (
            "1102",
            "class",
            "account: Kling accepts the credential, but refuses the request because of its account",
        ),
        ("1102", "resent", "no"),
        (
            "1102",
            "actionable",
            "402 Payment Required, with errors.status = \"actionable\"",
        ),
        (
            "1004",
            "resent",
            "once, with a new token; with an API key, not at all",
        ),
        (
            "1004",
            "hint",
            "this machine's clock and upstream's differ: correct this machine's clock",
        ),
        ("1302", "resent", "yes, after a longer wait each time"),
        (
            "1302",
            "retry-after",
            "1 s, unless Kling names another time",
        ),
        (
            "5001",
            "retry-after",
            "5 s, unless Kling names another time",
        ),
        (
            "1000",
            "message",
            "with \"3 parts\": an access key and a secret key are needed",
        ),
        ("9000", "connection", "closed after the answer"),
        ("9101", "resent", "yes, soon"),
        (
            "9301",
            "retryable",
            "yes: nothing was done, send it again later",
        ),
        ("9301", "resent", "no"),
    ] {
        let columns = told(code);
        assert_eq!(
            columns.get(name).map(String::as_str),
            Some(text),
            "{code}: {columns:?}"
        );
    }
    for name in ["hint", "message", "retry-after", "actionable", "connection"] {
        assert!(!told("1201").contains_key(name), "{name}");
    }

    let json = |code| -> Value {
        let finished = Command::new(["explain", code, "--output", "json"]).run();
        serde_json::from_str(&finished.stdout).unwrap()
    };
    let chosen = |code| {
        let row = json(code);
        [
            "class",
            "resent",
            "retry_after",
            "status",
            "actionable_status",
            "hint",
            "closes_connection",
            "phrases",
        ]
        .map(|name| row[name].clone())
    };
    let hint =
        "the account accepts only listed IP addresses: add the public address of this machine";
    let expected = json!(["address", "no", null, 429, 403, hint, false, []]);
    assert_eq!(json!(chosen("1304")), expected);
    let expected = json!(["capacity", "no", 1, 503, 503, null, false, []]);
    assert_eq!(json!(chosen("9301")), expected);
    let phrases = json!([
        { "text": "does not support AK/SK", "needs": "api_key" },
        { "text": "3 parts", "needs": "key_pair" },
    ]);
    assert_eq!(json("1002")["phrases"], phrases);
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
        "completions bash --config x",
        "--sandbox token",
        "run --port 1 -- true",
        "run --listen 127.0.0.1:1 -- true",
    ] {
        let words = line.split(' ');
        let finished = words.fold(Command::new([]), Command::argument).run();
        assert_eq!(finished.code, Some(2), "{line}: {finished:?}");
        assert_has(&finished.stderr, &["has no effect on"]);
    }
    for (command, heeded) in [
        ("serve", true),
        ("settings", true),
        ("run", false),
        ("explain", false),
    ] {
        let help = Command::new([command, "--help"]).run().stdout;
        assert_eq!(help.contains("--listen"), heeded, "{command}: {help}");
    }
    let flag = ["--listen", "127.0.0.1:1"];
    let before = Command::new([flag[0], flag[1], "settings"]).run();
    let after = Command::new(["settings", flag[0], flag[1]]).run();
    assert_has(&before.stdout, &[r#"listen.address = "127.0.0.1:1""#]);
    assert_eq!(before.stdout, after.stdout);
}

/// As the shell does at the tabulator key.
#[test]
fn bash_completes_commands_flags_and_values() {
    let finished = Command::new(["completions", "bash"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    for (line, last, completions) in [
        ("kling-proxy", "comp", "completions"),
        ("kling-proxy run", "--sa", "--sandbox"),
        ("kling-proxy wait", "--t", "--timeout"),
        ("kling-proxy completions", "f", "fish"),
        ("kling-proxy explain --output", "", "text json"),
    ] {
        let complete = format!(
            r#"{}
            COMP_WORDS=({line} '{last}') COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            complete=$(complete -p kling-proxy | sed -E 's/.*-F ([^ ]+) .*/\1/')
            $complete kling-proxy '{last}' "${{COMP_WORDS[COMP_CWORD - 1]}}"
            echo "${{COMPREPLY[*]}}""#,
            finished.stdout
        );
        let mut bash = process::Command::new("bash");
        let completed = bash.args(["-c", &complete]).output().unwrap();
        let stdout = String::from_utf8_lossy(&completed.stdout);
        assert_eq!(stdout.trim(), completions, "{line} {last}: {completed:?}");
    }
}

#[test]
fn completions_are_there_for_each_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let finished = Command::new(["completions", shell]).run();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        assert_has(&finished.stdout, &["kling-proxy", "explain", "timeout"]);
    }
    let finished = Command::new(["completions", "tcsh"]).run();
    assert_eq!(finished.code, Some(2), "{finished:?}");
}

#[test]
fn each_command_has_a_manual_page() {
    let help = Command::new(["--help"]).run().stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.map_while(|line| line.strip_prefix("  ")?.split(' ').next());
    let mut want: BTreeSet<_> = commands
        .filter(|command| *command != "help")
        .map(|command| format!("kling-proxy-{command}.1"))
        .collect();
    assert!(want.contains("kling-proxy-run.1"), "{help}");
    want.insert("kling-proxy.1".to_owned());

    let folder = TempDir::new().unwrap();
    let finished = Command::new(["man", folder.path().to_str().unwrap()]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let pages = fs::read_dir(&folder).unwrap().map(|page| page.unwrap());
    let pages = pages.map(|page| page.file_name().into_string().unwrap());
    assert_eq!(pages.collect::<BTreeSet<_>>(), want);
    let page = fs::read_to_string(folder.path().join("kling-proxy-wait.1")).unwrap();
    assert_has(&page, &[".TH kling-proxy-wait 1", "\\-\\-timeout"]);
    assert!(want.contains("kling-proxy-man.1"), "{help}");
    let new = folder.path().join("share/man/man1");
    let finished = Command::new(["man", new.to_str().unwrap()]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert!(new.join("kling-proxy.1").exists());
    let nowhere = Command::new(["man", "/dev/null/nowhere"]).run();
    assert_eq!(nowhere.code, Some(1), "{nowhere:?}");
    assert_has(&nowhere.stderr, &["/dev/null/nowhere"]);
}

/// Of each flag of a setting.
#[test]
fn defaults_that_help_prints_may_be_given() {
    let help = Command::new(["settings", "--help"]).run().stdout;
    let words: Vec<_> = help.split_whitespace().collect();
    let mut seen = BTreeMap::new();
    let mut flag = "";
    for (index, word) in words.iter().enumerate() {
        if word.starts_with("--") {
            flag = word;
        }
        if *word == "[default:" {
            seen.insert(flag, words[index + 1].trim_end_matches(']'));
        }
    }
    let flags = [
        ("--admin", "admin.address"),
        ("--listen", "listen.address"),
        ("--log-filter", "log.filter"),
        ("--log-format", "log.format"),
        ("--upstream", "upstream.url"),
    ];
    assert!(
        seen.keys().copied().eq(flags.map(|(flag, _)| flag)),
        "{help}"
    );
    for (flag, key) in flags {
        let unset = Command::new(["settings"]).setting(key, "").run().stdout;
        let given = Command::new(["settings", flag, seen[flag]]).run();
        assert_eq!(given.code, Some(0), "{flag}: {given:?}");
        let value = |text: &str| {
            let line = text
                .lines()
                .find(|line| line.starts_with(&format!("{key} = ")));
            line.map(|line| line.split(" # ").next().unwrap().trim().to_owned())
        };
        assert_eq!(value(&given.stdout), value(&unset), "{flag}");
    }
}

#[test]
fn port_is_that_of_the_data_listener_on_loopback() {
    let finished = Command::new(["settings", "--port", "8080"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(
        &finished.stdout,
        &[r#"listen.address = "127.0.0.1:8080""#, "# --port"],
    );
    for line in ["--port 1 --listen 127.0.0.1:1", "--port x", "--port 65536"] {
        let finished = line
            .split(' ')
            .fold(Command::new(["settings"]), Command::argument);
        let finished = finished.run();
        assert_eq!(finished.code, Some(2), "{line}: {finished:?}");
    }
}

#[test]
fn example_of_completions_makes_the_folder() {
    let help = Command::new(["completions", "--help"]).run().stdout;
    let lines: Vec<_> = help.lines().map(str::trim).collect();
    let mut examples = 0;
    for (index, line) in lines.iter().enumerate() {
        let Some((_, file)) = line.split_once(" > ") else {
            continue;
        };
        let (folder, _) = file.rsplit_once('/').unwrap();
        assert_eq!(lines[index - 1], format!("mkdir -p {folder}"), "{help}");
        examples += 1;
    }
    assert_eq!(examples, 3, "{help}");
}

#[test]
fn help_says_what_a_newcomer_needs() {
    let finished = Command::new(["--help"]).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(
        &finished.stdout,
        &[
            "serve",
            "run",
            "sandbox",
            "check",
            "token",
            "explain",
            "settings",
            "health",
            "wait",
            "completions",
            "man",
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

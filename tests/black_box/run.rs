//! `run -- COMMAND`: what the command gets, and what it does not.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    process::Stdio,
};

use rustix::process::{Pid, kill_process};
use serde_json::{Value, json};

use crate::support::{
    ACCESS_KEY, Command, Finished, Message, PATIENCE, Proxy, SECRET_KEY, SUCCESS, Signal, Upstream,
    assert_has, eventually, mint, now, post, request,
};

/// Announces its proxy as `serve` does, with its token, and waits for USR1 or whatever ends it.
const SAYS_WHERE: &str = r#"
    trap 'kill $!; echo bye; exit 5' USR1
    echo "proxy $KLING_BASE_URL -> $KLING_API_KEY"
    sleep 60 > /dev/null 2>&1 & wait
"#;

/// `run -- sh -c SCRIPT` to this upstream with its keys, not in the foreground of any terminal.
fn shell(upstream: &Upstream, script: &str) -> Command {
    Command::new(["run", "--", "/bin/sh", "-c", script])
        .upstream(upstream)
        .keys()
        .in_background()
}

/// The token of a command that has announced it.
fn token(proxy: &Proxy) -> String {
    let line = proxy.stdout.find(|line| line.starts_with("proxy")).unwrap();
    line.split_whitespace().last().unwrap().to_owned()
}

fn get(proxy: &Proxy, headers: &str) -> Message {
    proxy.send(request("GET /v1/x", headers, ""))
}

/// Ends the command by its own code.
fn end(proxy: Proxy) {
    proxy.signal(Signal::USR1);
    assert_eq!(proxy.end().0, Some(5));
}

#[test]
fn command_reaches_upstream_by_its_dummy_keys_and_nobody_else_does() {
    let upstream = Upstream::ok();
    let proxy = shell(&upstream, SAYS_WHERE).start();
    let token = token(&proxy);
    let claims = json!({ "iss": token, "exp": now() + 1800, "nbf": now() - 5 });
    let signed = |key: &str| mint(&json!({ "alg": "HS256", "typ": "JWT" }), &claims, key);
    for (headers, status) in [
        (format!("kling-proxy-token: {token}"), 200),
        (format!("authorization: Bearer {token}"), 200),
        (format!("authorization: Bearer {}", signed(&token)), 200),
        (format!("authorization: Bearer {}", signed(SECRET_KEY)), 401),
        ("kling-proxy-token: 0123456789abcdef".to_owned(), 401),
        (String::new(), 401),
    ] {
        let answer = get(&proxy, &headers);
        assert_eq!(answer.status(), status, "{headers}");
        if status == 401 {
            assert_eq!(answer.refusal(), (401, 9003), "{headers}");
        }
    }
    assert_eq!(upstream.seen().requests.len(), 3);
    end(proxy);
}

#[test]
fn refusal_names_what_run_has_set() {
    let proxy = shell(&Upstream::ok(), SAYS_WHERE).start();
    let answer = get(&proxy, "");
    assert_eq!(answer.refusal(), (401, 9003));
    let body = answer.json();
    assert_eq!(
        (&body["message"], &body["error"]["solution"]),
        (
            &json!("a valid client token is required: send `$KLING_API_KEY`, which `run` has set"),
            &json!(
                "Send `$KLING_API_KEY`, which `run` has set, in `kling-proxy-token` or as \
                 `Authorization: Bearer`"
            )
        )
    );
    let answer = proxy.send("GET /v1/x HTTP/1.1\r\nhost: new.host\r\n\r\n");
    assert_eq!(answer.refusal(), (421, 9001));
    assert_eq!(
        answer.json()["message"],
        "host `new.host` is not that of this proxy: send to `$KLING_BASE_URL`, which `run` has set"
    );
    end(proxy);
}

#[test]
fn without_a_credential_run_recommends_its_sandbox() {
    let finished = Command::new(["run", "--", "true"]).run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(
        &finished.stderr,
        &["`kling-proxy run --sandbox -- COMMAND`"],
    );
}

/// R22.
#[test]
fn command_sees_its_proxy_and_no_secret() {
    let upstream = Upstream::ok();
    let mut command = Command::new(["run", "--", "env"])
        .upstream(&upstream)
        .keys()
        .env("KLING_MODEL", "kling-v2-6")
        .env("KLING_PATH", "kept")
        .env("VAULT_ADDR", "kept");
    for name in [
        "KLINGAI_ACCESS_KEY_FILE",
        "KLINGAI_SECRET_KEY",
        "KLING_JWT_TOKEN",
        "KLING_PAT",
        "KLINGSECRET",
        "kling_token",
        "KlingPassphrase",
        "KLING_KEY_2",
        "KLING_PROXY_CREDENTIALS__API_KEY_FILE",
        "KLING_PROXY_CREDENTIALS__SECRET_KEY",
        "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE",
        "CREDENTIALS_DIRECTORY",
        "NOTIFY_SOCKET",
    ] {
        command = command.env(name, "/nowhere/canary");
    }
    let home = command.home();
    let finished = command.run();
    assert_eq!(
        (finished.code, &*finished.stderr),
        (Some(0), ""),
        "{finished:?}"
    );
    let lines = finished.stdout.lines();
    let mut seen: BTreeMap<_, _> = lines.filter_map(|line| line.split_once('=')).collect();
    let (url, token) = (seen["KLING_BASE_URL"], seen["KLING_API_KEY"]);
    let mut want = BTreeMap::from([
        ("HOME", home.to_str().unwrap()),
        ("KLING_MODEL", "kling-v2-6"),
        ("KLING_PATH", "kept"),
        ("VAULT_ADDR", "kept"),
        ("KLING_BASE_URL", url),
        ("KLING_API_BASE_URL", url),
        ("KLING_API_BASE", url),
        ("KLINGAI_BASE_URL", url),
    ]);
    for name in ["API_KEY", "ACCESS_KEY", "SECRET_KEY"] {
        for maker in ["KLING", "KLINGAI"] {
            want.insert(format!("{maker}_{name}").leak(), token);
        }
    }
    // A tool of the tests may have set its own.
    seen.retain(|name, _| !name.starts_with("LLVM_"));
    assert_eq!(seen, want);
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let digits = token.bytes().filter(u8::is_ascii_hexdigit).count();
    assert_eq!((token.len(), digits), (32, 32), "{token}");
    assert!(![ACCESS_KEY, SECRET_KEY].contains(&token));
}

#[test]
fn proxy_of_the_network_is_not_asked_for_ours() {
    let upstream = Upstream::ok();
    for (variables, seen) in [
        (&[][..], ":"),
        (&[("NO_PROXY", "a.test")], "a.test:"),
        (
            &[("HTTP_PROXY", "http://proxy.test")],
            "127.0.0.1:127.0.0.1",
        ),
        (
            &[("https_proxy", "http://proxy.test"), ("NO_PROXY", "a.test")],
            "a.test,127.0.0.1:",
        ),
        (
            &[
                ("ALL_PROXY", "x"),
                ("NO_PROXY", "a.test"),
                ("no_proxy", "b.test"),
            ],
            "a.test,127.0.0.1:b.test,127.0.0.1",
        ),
        (&[("HTTP_PROXY", "x"), ("no_proxy", "*")], ":*"),
    ] {
        let set = |command: Command, (name, value): &(&str, &str)| command.env(name, value);
        let command = shell(&upstream, "echo $NO_PROXY:$no_proxy");
        let finished = variables.iter().fold(command, set).run();
        assert_eq!(finished.stdout.trim_end(), seen, "{variables:?}");
    }
}

#[test]
fn each_run_has_a_token_of_its_own() {
    let upstream = Upstream::ok();
    let run = || shell(&upstream, "echo $KLING_API_KEY").run().stdout;
    assert_ne!(run(), run());
}

/// R22.
#[test]
fn command_cannot_look_into_the_proxy() {
    let upstream = Upstream::ok();
    let script =
        "cat /proc/$PPID/environ; echo $?; ls -l /proc/$$/fd | grep -c socket; ulimit -S -n";
    let finished = shell(&upstream, script)
        .after("ulimit -S -n 512;")
        .unprivileged()
        .run();
    assert_eq!(finished.stdout, "1\n0\n512", "{finished:?}");
    assert_has(&finished.stderr, &["Permission denied"]);
}

#[test]
fn output_and_exit_code_are_those_of_the_command() {
    let upstream = Upstream::ok();
    for (script, code, stdout, stderr) in [
        ("exit 0", 0, "", ""),
        ("echo out; echo err >&2; exit 7", 7, "out", "err"),
        ("exit 255", 255, "", ""),
        ("kill -9 $$", 137, "", ""),
        ("kill -TERM $$", 143, "", ""),
        ("cat", 0, "", ""),
    ] {
        let finished = shell(&upstream, script).run();
        let Finished {
            code: got,
            stdout: out,
            stderr: err,
        } = &finished;
        assert_eq!(
            (*got, &**out, &**err),
            (Some(code), stdout, stderr),
            "{script}"
        );
    }
    let arguments = ["run", "--", "echo", "--", "-a", "--sandbox"];
    let finished = Command::new(arguments).upstream(&upstream).keys().run();
    assert_eq!(finished.stdout, "-- -a --sandbox", "{finished:?}");
}

#[test]
fn command_that_cannot_be_run_is_told_as_a_shell_does() {
    let upstream = Upstream::ok();
    for (program, code) in [
        ("no-such-command", 127),
        ("/nowhere/command", 127),
        ("/etc/passwd", 126),
        ("/etc", 126),
    ] {
        let command = Command::new(["run", "--", program]);
        let finished = command.upstream(&upstream).keys().run();
        assert_eq!(finished.code, Some(code), "{finished:?}");
        assert_has(&finished.stderr, &["cannot run", program]);
    }
}

#[test]
fn nothing_is_run_without_a_credential_or_with_wrong_settings() {
    for (key, value) in [("KLING_API_KEY", ""), ("KLING_PROXY_TOKEN__LIFETIME", "5s")] {
        let command = Command::new(["run", "--", "touch", "started"]).env(key, value);
        let command = match value {
            "" => command,
            _ => command.keys(),
        };
        let started = command.home().join("started");
        let finished = command.run();
        assert_eq!(finished.code, Some(78), "{finished:?}");
        assert!(!started.exists(), "{key}");
    }
}

#[test]
fn signals_are_for_the_command() {
    let upstream = Upstream::ok();
    for (name, signal) in [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("TERM", Signal::TERM),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
    ] {
        let trap = format!("trap 'kill $!; echo bye from {name}; exit 3' {name}");
        let script = SAYS_WHERE.replace("exit 5' USR1", &format!("exit 5' ALRM\n{trap}"));
        let proxy = shell(&upstream, &script).start();
        proxy.signal(signal);
        let said = format!("bye from {name}");
        assert!(proxy.stdout.find(|line| line == said).is_some(), "{name}");
        assert_eq!(proxy.end().0, Some(3), "{name}");
    }
}

/// The command decides whether it ends.
#[test]
fn command_that_ignores_a_signal_is_waited_for() {
    let upstream = Upstream::ok();
    let proxy = shell(&upstream, &format!("trap '' TERM\n{SAYS_WHERE}")).start();
    proxy.signal(Signal::TERM);
    proxy.signal(Signal::TERM);
    let token = token(&proxy);
    let answer = get(&proxy, &format!("kling-proxy-token: {token}"));
    assert_eq!(answer.status(), 200);
    end(proxy);
}

/// As nohup(1) starts it.
#[test]
fn signal_that_we_were_started_to_ignore_is_ignored_by_the_command() {
    let upstream = Upstream::ok();
    let script = "kill -HUP $PPID; kill -HUP $$; echo survived";
    let finished = shell(&upstream, script).after("trap '' HUP;").run();
    assert_eq!(
        (finished.code, &*finished.stdout),
        (Some(0), "survived"),
        "{finished:?}"
    );
}

/// The terminal tells all in its foreground; told again, many programs end at once.
#[test]
fn interrupt_by_the_terminal_comes_once() {
    let upstream = Upstream::ok();
    let script = r"
        trap 'echo interrupted' INT
        trap 'echo end; exit 4' TERM
        echo up by $PPID.
        while :; do sleep 60 & wait $!; kill $!; done 2> /dev/null
    ";
    let home = tempfile::TempDir::new().unwrap();
    let program = env!("CARGO_BIN_EXE_kling-proxy");
    let line = format!("trap : INT; {program} run -- /bin/sh -c \"$SCRIPT\"; exit $?");
    let mut terminal = std::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env_clear()
        .env("HOME", home.path())
        .env("SCRIPT", script)
        .env("KLING_ACCESS_KEY", ACCESS_KEY)
        .env("KLING_SECRET_KEY", SECRET_KEY)
        .env("KLING_PROXY_UPSTREAM__URL", &upstream.url)
        .env("KLING_PROXY_UPSTREAM__WARM_UP", "false")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut keyboard, mut screen) = (
        terminal.stdin.take().unwrap(),
        terminal.stdout.take().unwrap(),
    );
    let mut shown = String::new();
    let mut wait_for = |what: &str| {
        while !shown.contains(what) {
            let mut bytes = [0; 1024];
            let read = screen.read(&mut bytes).unwrap();
            assert_ne!(read, 0, "no {what} in {shown}");
            shown += &String::from_utf8_lossy(&bytes[..read]);
        }
        shown.clone()
    };
    let shown = wait_for(".");
    let (_, id) = shown.trim().rsplit_once(' ').unwrap();
    let id = Pid::from_raw(id.trim_end_matches('.').parse().unwrap()).unwrap();
    // Two that come at the same moment count as one: let them not.
    kill_process(id, Signal::STOP).unwrap();
    keyboard.write_all(b"\x03").unwrap();
    wait_for("interrupted");
    kill_process(id, Signal::CONT).unwrap();
    kill_process(id, Signal::TERM).unwrap();
    let shown = wait_for("end");
    assert_eq!(shown.matches("interrupted").count(), 1, "{shown}");
    assert_eq!(terminal.wait().unwrap().code(), Some(4));
}

/// Sends a create of the command's, and hangs up once upstream has it.
fn create_and_go(upstream: &Upstream, proxy: &Proxy) {
    let create = String::from_utf8(post("/v1/x", "{}")).unwrap();
    let header = format!("\r\nkling-proxy-token: {}\r\n", token(proxy));
    let mut client = proxy.connect();
    client.send(create.replacen("\r\n", &header, 1));
    upstream.wait(|seen| seen.requests.len() == 1);
}

#[test]
fn create_in_flight_when_the_command_ends_is_carried_through() {
    let upstream = Upstream::ok();
    let gate = upstream.hold();
    let proxy = shell(&upstream, SAYS_WHERE).start();
    create_and_go(&upstream, &proxy);
    proxy.signal(Signal::USR1);
    assert!(proxy.stdout.find(|line| line == "bye").is_some());
    gate.open();
    let (code, log) = proxy.end();
    assert_eq!(code, Some(5));
    let success: Value = serde_json::from_str(SUCCESS).unwrap();
    let task = success["data"]["task_id"].as_str().unwrap();
    assert_has(&log, &["carried through", task]);
}

#[test]
fn second_signal_ends_the_drain_at_once() {
    let upstream = Upstream::ok();
    let _gate = upstream.hold();
    let proxy = shell(&upstream, SAYS_WHERE)
        .setting("log.filter", "kling_proxy=info")
        .setting("shutdown.drain", format!("{}s", 2 * PATIENCE.as_secs()))
        .start();
    create_and_go(&upstream, &proxy);
    proxy.signal(Signal::TERM);
    let drains = |line: &str| line.contains("shutting down");
    assert!(proxy.stderr.find(drains).is_some());
    eventually("it ends", || {
        // One that comes too soon may be what ended the command.
        proxy.signal(Signal::TERM);
        proxy.proc("status").contains("State:\tZ")
    });
    assert_eq!(proxy.end().0, Some(1));
}

/// Settings of a proxy that others share: addresses, names and tokens.
#[test]
fn proxy_is_for_the_command_alone_whatever_the_settings_say() {
    let upstream = Upstream::ok();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let command = shell(&upstream, SAYS_WHERE);
    let tokens = command.file("tokens", "shared:0123456789abcdef");
    fs::set_permissions(&tokens, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let socket = command.home().join("socket");
    let proxy = command
        .setting("listen.address", &address)
        .setting("admin.address", &address)
        .setting("listen.unix_socket", socket.to_str().unwrap())
        .setting("access.allowed_hosts", r#"["proxy.test"]"#)
        .setting("access.allowed_methods", r#"["GET"]"#)
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .setting("shutdown.delay", "1h")
        .start();
    let answer = get(&proxy, "kling-proxy-token: 0123456789abcdef");
    assert_eq!(answer.refusal(), (401, 9003));
    let own = format!("kling-proxy-token: {}", token(&proxy));
    assert_eq!(get(&proxy, &own).status(), 200);
    let create = proxy.send(request("POST /v1/x", &own, "{}"));
    assert_eq!(create.refusal(), (405, 9005), "what it may do stays");
    assert!(!socket.exists());
    end(proxy);
}

/// They name what is paid for.
#[test]
fn lines_of_creates_are_shown_and_of_reads_only_what_goes_wrong() {
    let mut command = Command::new(["run", "--sandbox", "--", "/bin/sh", "-c", SAYS_WHERE]);
    command = command.in_background();
    let proxy = command.start();
    let own = format!("kling-proxy-token: {}", token(&proxy));
    let create = format!("{own}\ncontent-type: application/json");
    let body = r#"{"model_name":"kling-v2-6","prompt":"a cat"}"#;
    let answer = proxy.send(request("POST /v1/videos/text2video", &create, body));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let line = proxy.stderr.find(|line| line.contains(r#""task.id""#));
    assert!(line.is_some_and(|line| line.contains("answered")));
    end(proxy);
}

#[test]
fn sandbox_can_be_upstream() {
    let flags: [&[&str]; 2] = [&["run", "--sandbox"], &["--sandbox", "run"]];
    for flags in flags {
        let mut command = Command::new([]).in_background();
        for argument in flags.iter().chain(&["--", "/bin/sh", "-c", SAYS_WHERE]) {
            command = command.argument(argument);
        }
        let proxy = command.start();
        let own = format!("kling-proxy-token: {}", token(&proxy));
        let answer = proxy.send(request(
            "GET /account/costs?start_time=1&end_time=2",
            &own,
            "",
        ));
        assert_eq!(answer.json()["code"], 0, "{}", answer.text());
        end(proxy);
    }
}

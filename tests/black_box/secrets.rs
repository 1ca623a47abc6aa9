//! Nothing that the proxy puts out holds a secret, whatever goes wrong and however much is logged.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    thread,
};

use serde_json::json;

use crate::support::{
    ACCESS_KEY, Command, Connection, Credential, Message, Proxy, SECRET_KEY, SUCCESS, Signal, Step,
    TOKEN, Upstream, assert_has, eventually, get, kling, may_give_away, mint, now, raw, reply,
    request, send, unprivileged,
};

const API_KEY: &str = "ApiKeyOfTheBlackBoxTests00000001";
const CLIENT_TOKEN: &str = "ClientTokenOfTheBlackBoxTests001";
/// What else a client may send that is nobody's business.
const COOKIE: &str = "CookieOfTheBlackBoxTests00000001";
/// A secret that is wrong.
const CANARY: &str = "Canary7";

/// How a proxy to this upstream is started.
type Start<'a> = &'a dyn Fn(&Upstream) -> Command;

/// Fails if one of these is in the text.
#[track_caller]
fn assert_keeps(text: &str, secrets: &[&str], what: &str) {
    for secret in secrets {
        let line = text.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{what}: {secret} was put out");
    }
}

/// A file in the home folder of a command, with this mode.
fn file_with_mode(command: &Command, name: &str, content: &str, mode: u32) -> PathBuf {
    let path = command.file(name, content);
    set_mode(&path, mode);
    path
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Answers each path in another way, most of them wrong.
fn misbehave(request: &Message) -> Vec<Step> {
    let tunnel = "HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n";
    match request.target() {
        "/html" => vec![send(reply(502, "content-type: text/html", "<h1>no</h1>"))],
        "/empty" => vec![send(reply(500, "", ""))],
        "/redirect" => vec![send(reply(302, "location: https://other.test/", ""))],
        "/garbage" => vec![send("\0garbage\r\n\r\n")],
        "/tunnel" => vec![send(tunnel)],
        "/cut" => vec![
            send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"),
            Step::Close,
        ],
        "/close" => vec![Step::Close],
        "/silent" => vec![Step::Hang],
        target => match target.trim_start_matches('/').parse::<u32>() {
            Ok(code) => vec![send(kling(
                400,
                format!("{{\"code\":{code},\"message\":\"no\"}}"),
            ))],
            Err(_) => vec![send(kling(200, SUCCESS))],
        },
    }
}

/// Requests that go well and that go wrong, each with all the credentials that a client can show.
fn requests() -> Vec<Vec<u8>> {
    let claims = json!({ "iss": "any", "exp": now() + 600, "nbf": now() - 5 });
    let jwt = mint(
        &json!({ "alg": "HS256", "typ": "JWT" }),
        &claims,
        CLIENT_TOKEN,
    );
    let ways = [
        format!(
            "kling-proxy-token: {CLIENT_TOKEN}\ncookie: a={COOKIE}\nauthorization: Bearer {jwt}"
        ),
        format!("authorization: Bearer {CLIENT_TOKEN}\nproxy-authorization: Basic {COOKIE}"),
        format!("authorization: Bearer {jwt}\ncookie: {COOKIE}"),
        // Refused: none of these is a client token.
        format!("authorization: Basic {CLIENT_TOKEN}"),
        format!("authorization: Bearer {jwt}x"),
        format!("kling-proxy-token: x{CLIENT_TOKEN}\ncookie: {COOKIE}"),
        format!("cookie: kling-proxy-token={CLIENT_TOKEN}"),
    ];
    let targets = [
        "/v1/x",
        "/1000",
        "/1002",
        "/1004",
        "/1102",
        "/1201",
        "/1303",
        "/5000",
        "/4242",
        "/html",
        "/empty",
        "/redirect",
        "/garbage",
        "/tunnel",
        "/cut",
        "/close",
        "/silent",
        "/_proxy/x",
        "http://other.test/",
    ];
    let lines = ["GET", "POST"].map(|method| targets.map(|target| format!("{method} {target}")));
    let right = |line: &String| request(line, &format!("connection: close\n{}", ways[0]), "");
    let mut requests: Vec<_> = lines.as_flattened().iter().map(right).collect();
    for way in &ways {
        for more in [
            "x-a: b",
            "host: evil.test",
            "origin: https://evil.test",
            "connection: upgrade, kling-proxy-token, cookie\nupgrade: websocket",
            "content-length: 1099511627776",
            "content-length: +5",
            "transfer-encoding: xchunked",
            "x a: b",
        ] {
            let headers = format!("connection: close\n{way}\n{more}");
            requests.push(request("POST /v1/x", &headers, ""));
        }
    }
    // A body that stalls, one that breaks, a head that does.
    for (framing, body) in [
        ("content-length: 9", "{}"),
        ("transfer-encoding: chunked", "2\r\n{}\r\nzz\r\n"),
        ("x-a: b\x1b", ""),
    ] {
        let head = request("POST /v1/x", &format!("{}\n{framing}", ways[0]), "");
        requests.push([&head, body.as_bytes()].concat());
    }
    requests
}

/// All that a proxy puts out, at `trace`, while it is asked all of this.
fn everything(command: Command, format: &str) -> String {
    let tokens = file_with_mode(
        &command,
        "tokens",
        &format!("studio:{CLIENT_TOKEN}\n"),
        0o600,
    );
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .setting("log.filter", "trace")
        .setting("log.format", format)
        .setting("limits.header_timeout", "500ms")
        .setting("upstream.idle_timeout", "300ms")
        .setting("upstream.response_timeout", "300ms")
        // A create that was never answered is waited for as long.
        .setting("shutdown.drain", "500ms")
        .start();
    // All at once, since most of them wait.
    let address = proxy.address;
    let mut heard: Vec<u8> = thread::scope(|scope| {
        let ask = |request| scope.spawn(move || raw(address, request));
        let asked: Vec<_> = requests().into_iter().map(ask).collect();
        let answers = asked.into_iter().map(|asked| asked.join().unwrap());
        answers.flatten().collect()
    });
    for path in [
        "/metrics",
        "/health/startup",
        "/health/live",
        "/health/ready",
        "/",
        "/quit",
        "/x",
    ] {
        let admin = Connection::to(proxy.listener("admin"))
            .send(get(path))
            .answer();
        heard.extend([admin.head.as_bytes(), &admin.body].concat());
    }
    proxy.signal(Signal::TERM);
    let heard = String::from_utf8_lossy(&heard);
    let log = format!("{}\n{}", proxy.stdout.to_end(), proxy.end().1);
    assert_has(&log, &["DEBUG", "proxy "]);
    assert_has(&heard, &["HTTP/1.1 ", "kling_proxy_requests_total", "421"]);
    format!("{heard}\n{log}")
}

/// R21.
#[test]
fn nothing_put_out_at_trace_holds_a_secret_whatever_goes_wrong() {
    let api_key = |upstream: &Upstream| {
        let command = Command::new([]).upstream(upstream);
        command.env("KLING_API_KEY", API_KEY)
    };
    let cases: [(&str, Upstream, Start); 6] = [
        ("pair", Upstream::ok(), &Proxy::to),
        (
            "API key",
            Upstream::expecting(Credential::ApiKey(API_KEY)),
            &api_key,
        ),
        ("http/1.1 over TLS", Upstream::tls("http/1.1"), &Proxy::to),
        ("h2", Upstream::tls("h2"), &Proxy::to),
        ("TLS failure", Upstream::tls("h2"), &|upstream| {
            Proxy::to(upstream).setting("upstream.ca_file", "")
        }),
        ("unreachable", Upstream::ok(), &|upstream| {
            Proxy::to(upstream).setting("upstream.url", "https://127.0.0.1:1")
        }),
    ];
    for (index, (what, upstream, start)) in cases.iter().enumerate() {
        upstream.script(misbehave);
        let output = everything(start(upstream), ["json", "pretty"][index % 2]);
        assert_keeps(
            &output,
            &[SECRET_KEY, API_KEY, CLIENT_TOKEN, COOKIE, TOKEN],
            what,
        );
        let seen = upstream.seen().requests;
        assert_eq!(seen.is_empty(), index > 3, "{what}: {}", seen.len());
        for request in seen {
            let signature = request
                .header("authorization")
                .unwrap()
                .rsplit(['.', ' '])
                .next();
            assert_keeps(&output, &[signature.unwrap()], what);
        }
    }
}

#[test]
fn credential_file_that_breaks_keeps_the_old_one_and_is_not_quoted() {
    let upstream = Upstream::ok();
    let command = Command::new([]).upstream(&upstream);
    let [access, secret] = [("access", ACCESS_KEY), ("secret", SECRET_KEY)]
        .map(|(name, key)| file_with_mode(&command, name, key, 0o600));
    let proxy = command
        .env("KLING_ACCESS_KEY_FILE", access.to_str().unwrap())
        .env("KLING_SECRET_KEY_FILE", secret.to_str().unwrap())
        .setting("log.filter", "trace")
        .start();
    // It hears SIGHUP by then.
    eventually("ready", || proxy.admin("/health/ready").status() == 200);
    for (content, mode, warning) in [
        (format!("two words {CANARY}"), 0o600, "not a key"),
        (CANARY.to_owned(), 0o602, "602"),
    ] {
        fs::write(&secret, &content).unwrap();
        set_mode(&secret, mode);
        proxy.signal(Signal::HUP);
        let warned = |line: &str| line.contains("WARN") && line.contains(warning);
        let line = proxy.stderr.find(warned).expect(warning);
        assert_has(&line, &["KLING_SECRET_KEY_FILE"]);
        assert_eq!(proxy.get("/v1/x").status(), 200, "{content:?}, {mode:o}");
    }
    proxy.signal(Signal::TERM);
    let output = format!("{}{}", proxy.stdout.to_end(), proxy.end().1);
    assert_keeps(&output, &[CANARY, SECRET_KEY, TOKEN], "rotation");
}

/// R21.
#[test]
fn no_command_prints_a_secret() {
    for (arguments, code) in [
        (vec!["token", "--decode"], 0),
        (vec!["settings"], 0),
        (vec!["settings", "--log-filter", "trace"], 0),
        (vec!["--help"], 0),
        (vec!["serve", "--help"], 0),
        (vec!["explain", "1000"], 0),
        (vec!["health"], 1),
        (vec!["serve", "--no-such-flag"], 2),
    ] {
        let with = |variable| {
            let command = arguments.iter().fold(Command::new([]), Command::argument);
            let command = command.setting("admin.address", "127.0.0.1:1").keys();
            command
                .env(variable, API_KEY)
                .setting("credentials.secret_key", CANARY)
                .run()
        };
        // The one below wins over the pair.
        let [pair, api_key] = ["KLING_UNUSED", "KLING_API_KEY"].map(with);
        assert_eq!(pair.code, Some(code), "{arguments:?}: {pair:?}");
        let output = format!("{pair:?}{api_key:?}");
        assert_keeps(&output, &[SECRET_KEY, API_KEY, CANARY, TOKEN], arguments[0]);
    }
}

#[test]
fn wrong_settings_are_told_without_the_secrets_in_them() {
    let start = || Command::new([]).keys();
    let file = |variable: &str, content: &str| {
        let command = start();
        let path = file_with_mode(&command, "wrong", content, 0o600);
        command.env(variable, path.to_str().unwrap())
    };
    for (what, command) in [
        (
            "an API key of two lines",
            start().env("KLING_API_KEY", format!("a\n{CANARY}")),
        ),
        (
            "half a pair",
            Command::new([]).env("KLING_SECRET_KEY", CANARY),
        ),
        (
            "a key with a space",
            start().env("KLING_SECRET_KEY", format!("{CANARY} x")),
        ),
        (
            "a misspelt variable",
            start().env("KLING_PROXY_SECRET_KEY", CANARY),
        ),
        (
            "a list",
            start().setting("credentials.secret_key", format!("[\"{CANARY}\"]")),
        ),
        (
            "broken TOML",
            start().config(&format!("[credentials]\nsecret_key = {CANARY}\n")),
        ),
        (
            "a misspelt key",
            start().config(&format!("[credentials]\nsecretkey = \"{CANARY}\"\n")),
        ),
        (
            "a file that holds no settings",
            file("KLING_PROXY_CONFIG", CANARY),
        ),
        (
            "a file that holds no certificate",
            file("KLING_PROXY_UPSTREAM__CA_FILE", CANARY),
        ),
        (
            "a key file of two words",
            file("KLING_API_KEY_FILE", &format!("a {CANARY}")),
        ),
        (
            "a short client token",
            file(
                "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE",
                &format!("a:{CANARY}"),
            ),
        ),
    ] {
        let finished = command.run();
        assert_eq!(finished.code, Some(78), "{what}: {finished:?}");
        assert_keeps(&format!("{finished:?}"), &[CANARY, SECRET_KEY], what);
    }
}

/// A proxy one of whose secret files has this mode, and that file.
fn start_with_mode(upstream: &Upstream, variable: &str, mode: u32) -> (Command, String) {
    let command = Command::new([]).upstream(upstream);
    let path = |name: &str, content: &str, mode| {
        let path = file_with_mode(&command, name, content, mode);
        path.to_str().unwrap().to_owned()
    };
    let access = path("keys/kling_access_key", ACCESS_KEY, 0o600);
    let (name, content) = match variable {
        "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE" => ("tokens", CLIENT_TOKEN),
        _ => ("keys/kling_secret_key", SECRET_KEY),
    };
    let file = path(name, content, mode);
    let command = match variable {
        "CREDENTIALS_DIRECTORY" => {
            command.env(variable, access.trim_end_matches("/kling_access_key"))
        }
        "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE" => command.keys().env(variable, &file),
        _ => command
            .env(variable, &file)
            .env("KLING_ACCESS_KEY", ACCESS_KEY),
    };
    (command, file)
}

/// R22.
#[test]
fn secret_file_is_warned_of_if_others_can_read_it_and_refused_if_they_can_write_it() {
    let upstream = Upstream::ok();
    for variable in [
        "KLING_SECRET_KEY_FILE",
        "CREDENTIALS_DIRECTORY",
        "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE",
    ] {
        for mode in [0o600, 0o400, 0o644, 0o444] {
            let (command, file) = start_with_mode(&upstream, variable, mode);
            let proxy = command.start();
            proxy.signal(Signal::TERM);
            let (_, log) = proxy.end();
            let warned = log
                .lines()
                .any(|line| line.contains("WARN") && line.contains(&file));
            assert_eq!(warned, mode & 0o004 != 0, "{variable}, {mode:o}: {log}");
        }
        for mode in [0o602, 0o620, 0o666, 0o622] {
            let (command, _) = start_with_mode(&upstream, variable, mode);
            let finished = command.run();
            assert_eq!(
                finished.code,
                Some(78),
                "{variable}, {mode:o}: {finished:?}"
            );
            assert_has(&finished.stderr, &["others can write it"]);
            assert_keeps(
                &format!("{finished:?}"),
                &[SECRET_KEY, CLIENT_TOKEN],
                variable,
            );
        }
    }
}

/// R22.
#[test]
fn secret_file_of_another_user_is_refused() {
    if !may_give_away("secrets::secret_file_of_another_user_is_refused") {
        return;
    }
    let upstream = Upstream::ok();
    for variable in ["KLING_SECRET_KEY_FILE", "CREDENTIALS_DIRECTORY"] {
        let (command, file) = start_with_mode(&upstream, variable, 0o600);
        chown(&file, Some(12345), None).unwrap();
        let finished = command.run();
        assert_eq!(finished.code, Some(78), "{variable}: {finished:?}");
        assert_has(&finished.stderr, &["belongs to user 12345"]);
        assert_keeps(&format!("{finished:?}"), &[SECRET_KEY], variable);
    }
}

/// R22.
#[test]
fn no_secret_is_on_the_command_line() {
    let upstream = Upstream::ok();
    let proxy = Proxy::to(&upstream).env("KLING_API_KEY", API_KEY).start();
    let line = proxy.proc("cmdline");
    assert_has(&line, &["kling-proxy"]);
    assert_keeps(&line, &[ACCESS_KEY, SECRET_KEY, API_KEY], "cmdline");
    // Nor can it be put there.
    for flag in [
        "--secret-key",
        "--access-key",
        "--api-key",
        "--client-token",
    ] {
        let finished = Command::new([]).argument(format!("{flag}={CANARY}")).run();
        assert_eq!(finished.code, Some(2), "{finished:?}");
        assert_keeps(&format!("{finished:?}"), &[CANARY], flag);
    }
}

/// R22.
#[test]
fn environment_of_the_process_is_closed_to_others_of_its_user() {
    let upstream = Upstream::ok();
    let proxy = Proxy::to(&upstream).unprivileged().start();
    let read = |path: &Path| unprivileged("cat").arg(path).output().unwrap();
    let its_own = read("/proc/self/environ".as_ref());
    assert!(its_own.status.success(), "one that any process may read");
    let ours = read(&proxy.path("environ"));
    assert_eq!((ours.status.success(), ours.stdout), (false, vec![]));
}

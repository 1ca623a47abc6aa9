//! `check`: each fault has a diagnosis and an exit code of its own, and what to do next.

use std::{
    fs::{self, Permissions},
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    thread,
    time::{Duration, UNIX_EPOCH},
};

use serde_json::{Value, json};
use socket2::Socket;

use crate::support::{
    ACCESS_KEY, Command, Credential, Finished, Issued, Proxy, Root, SECRET_KEY, SUCCESS, Step,
    TOKEN, Upstream, assert_has, claims, closed, kling, mint, now, reply, send,
};

const API_KEY: &str = "api-KeyOfTheBlackBoxTests00000001";
const DAY: u64 = 24 * 60 * 60;

/// What a check came to.
struct Report {
    finished: Finished,
    json: Value,
}

/// The exit code, the step that decided, and the type of its problem.
type Diagnosis<'a> = (i32, &'a str, &'a str);

// === impl Report ===

impl Report {
    /// Runs a check; whatever it says, no secret is in it.
    #[track_caller]
    fn of(command: Command) -> Self {
        let finished = command.argument("--output").argument("json").run();
        let said = format!("{finished:?}");
        for secret in [SECRET_KEY, ACCESS_KEY, API_KEY, TOKEN] {
            assert!(!said.contains(secret), "{secret} in {said}");
        }
        let json: Value = serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|error| panic!("{error}: {finished:?}"));
        assert_eq!(json["exit_code"].as_i64(), finished.code.map(i64::from));
        Self { finished, json }
    }

    fn step(&self, name: &str) -> &Value {
        let steps = self.json["steps"].as_array().unwrap();
        let step = steps.iter().find(|step| step["step"] == name);
        step.unwrap_or_else(|| panic!("no {name} in {}", self.json))
    }

    fn names(&self) -> Vec<&str> {
        let steps = self.json["steps"].as_array().unwrap();
        steps
            .iter()
            .map(|step| step["step"].as_str().unwrap())
            .collect()
    }

    /// What is wrong: of the first step that failed.
    fn diagnosis(&self) -> Diagnosis<'_> {
        let steps = self.json["steps"].as_array().unwrap();
        let failed = steps.iter().find(|step| step["status"] == "failure");
        let failed = failed.unwrap_or_else(|| panic!("no failure in {}", self.json));
        let problem = &failed["problems"][0];
        assert_ne!(problem["advice"], "", "{failed}");
        (
            self.finished.code.unwrap(),
            failed["step"].as_str().unwrap(),
            problem["type"].as_str().unwrap(),
        )
    }

    /// The problems of a step, by type.
    fn problems(&self, step: &str) -> Vec<&str> {
        let problems = self.step(step)["problems"].as_array().unwrap();
        problems
            .iter()
            .map(|problem| problem["type"].as_str().unwrap())
            .collect()
    }

    fn found(&self, step: &str) -> &str {
        self.step(step)["found"].as_str().unwrap()
    }
}

fn check() -> Command {
    Command::new(["check"])
}

/// A check with the right keys of this upstream.
fn check_of(upstream: &Upstream) -> Command {
    check().upstream(upstream).keys()
}

/// An answer whose `Date` is this many seconds from now.
fn dated(status: u16, seconds: i64, body: &str) -> Vec<u8> {
    let date = UNIX_EPOCH + Duration::from_secs(now().checked_add_signed(seconds).unwrap());
    let date = httpdate::fmt_http_date(date);
    let headers = format!("content-type: application/json\ndate: {date}");
    reply(status, &headers, body)
}

fn refusal(code: u16, message: &str) -> String {
    format!(r#"{{"code":{code},"message":"{message}","request_id":"up-1"}}"#)
}

/// A port where every connection is met with these bytes, or with silence.
fn peer(answer: Option<&'static str>) -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    if let Some(answer) = answer {
        let listener = listener.try_clone().unwrap();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
    }
    (listener, port)
}

/// A port whose queue of connections is full, so that the kernel does not answer further ones.
fn full() -> (Socket, TcpStream, String) {
    let (listener, address) = closed();
    listener.listen(0).unwrap();
    let first = TcpStream::connect(&address).unwrap();
    (listener, first, address)
}

#[test]
fn all_well_is_exit_0_and_takes_one_read() {
    let upstream = Upstream::tls("http/1.1");
    upstream.answer(dated(200, 0, SUCCESS));
    let report = Report::of(check_of(&upstream));
    assert_eq!(report.json["status"], "ok", "{}", report.json);
    assert_eq!(
        report.names(),
        [
            "settings",
            "credential",
            "trust",
            "name",
            "connection",
            "tls",
            "answer",
            "clock",
            "account"
        ]
    );
    assert_has(
        report.found("tls"),
        &["rcgen self signed cert", "good until"],
    );
    let [request] = &upstream.seen().requests[..] else {
        panic!("not one request");
    };
    assert_eq!(request.method(), "GET");
    let times = request.target().strip_prefix("/account/costs?").unwrap();
    let times: Vec<_> = times
        .split('&')
        .map(|time| time.split_once('=').unwrap())
        .collect();
    let [("start_time", start), ("end_time", end)] = times[..] else {
        panic!("{times:?}");
    };
    assert_eq!([start.len(), end.len()], [13, 13], "in milliseconds");
}

#[test]
fn text_says_each_step_and_what_to_do_next() {
    let upstream = Upstream::ok();
    let finished = check_of(&upstream).run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_eq!(finished.stdout.lines().count(), 8, "{finished:?}");
    assert_has(
        &finished.stdout,
        &["ok ", "account", "upstream knows", " ms)"],
    );

    upstream.answer(kling(429, refusal(1102, "Account balance not enough")));
    let finished = check_of(&upstream).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(&finished.stdout, &["FAILED", "1102", "balance not enough"]);
    assert_has(
        &finished.stdout,
        &["-> Purchase additional resource packages"],
    );
}

#[test]
fn problems_of_settings_are_told_as_serve_tells_them() {
    let wrong = |command: Command| {
        command
            .keys()
            .setting("token.lifetime", "1s")
            .setting("listen.adress", "x")
    };
    let serve = wrong(Command::new([])).run();
    let text = wrong(check()).run();
    assert_eq!(
        (text.code, &text.stderr, &*text.stdout),
        (Some(78), &serve.stderr, "")
    );
    let report = Report::of(wrong(check()));
    assert_eq!(report.diagnosis(), (78, "settings", "wrong_settings"));
    assert_eq!(report.finished.stderr, serve.stderr);
    assert_eq!(
        report.problems("settings").len(),
        serve.stderr.lines().count()
    );
}

#[test]
fn credential_that_cannot_be_used_is_told_by_what_to_set() {
    let diagnose = |command: Command, expected: &str, parts: &[&str]| {
        let report = Report::of(command);
        assert_eq!(report.diagnosis(), (78, "credential", expected));
        assert_has(&report.json.to_string(), parts);
    };
    diagnose(
        check(),
        "no_credential",
        &["KLING_ACCESS_KEY", "KLING_API_KEY"],
    );
    diagnose(
        check().env("KLING_SECRET_KEY", SECRET_KEY),
        "half_credential",
        &["set KLING_ACCESS_KEY too"],
    );
    diagnose(
        check().env("KLING_API_KEY", "two words"),
        "malformed_credential",
        &["KLING_API_KEY"],
    );
    diagnose(
        check().env("KLING_API_KEY_FILE", "/no/such/file"),
        "file_unreadable",
        &["/no/such/file"],
    );
    diagnose(
        check().setting("credentials.command", r#"["false"]"#),
        "command_failed",
        &["credentials.command"],
    );
    let command = check();
    let key = command.file("key", API_KEY);
    fs::set_permissions(&key, Permissions::from_mode(0o622)).unwrap();
    let key = key.to_str().unwrap();
    diagnose(
        command.env("KLING_API_KEY_FILE", key),
        "file_writable_by_others",
        &["chmod 600", key],
    );
}

#[test]
fn file_that_others_can_read_is_a_warning() {
    let command = check().argument("--offline");
    let path = command.file("secret", SECRET_KEY);
    let tokens = command.file("tokens", "0123456789abcdef");
    for path in [&path, &tokens] {
        fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    }
    let report = Report::of(
        command
            .env("KLING_ACCESS_KEY", ACCESS_KEY)
            .env("KLING_SECRET_KEY_FILE", path.to_str().unwrap())
            .setting("access.client_tokens_file", tokens.to_str().unwrap()),
    );
    assert_eq!(
        (report.finished.code, &report.json["status"]),
        (Some(0), &"warning".into())
    );
    assert_eq!(report.problems("credential"), ["credential_place"]);
    assert_eq!(
        report.problems("client_tokens"),
        ["file_readable_by_others"]
    );
}

#[test]
fn token_in_the_place_of_an_api_key_is_a_warning() {
    let token = mint(
        &json!({ "alg": "HS256" }),
        &json!({ "iss": "x" }),
        SECRET_KEY,
    );
    let report = Report::of(check().env("KLING_API_KEY", token).argument("--offline"));
    assert_eq!(report.problems("credential"), ["token_as_api_key"]);
}

#[test]
fn settings_file_that_shows_a_secret_is_a_warning() {
    for (mode, content, problems) in [
        (0o644, "[log]\nfilter = \"info\"", &[][..]),
        (0o600, "[credentials]\nsecret_key = \"x\"", &[]),
        (
            0o644,
            "[credentials]\nsecret_key = \"x\"",
            &["file_readable_by_others"],
        ),
    ] {
        let command = check().keys().config(content).argument("--offline");
        let path = command.home().join(".config/kling-proxy/config.toml");
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let report = Report::of(command);
        assert_eq!(report.problems("settings"), problems, "{mode:o} {content}");
        assert_eq!(report.finished.code, Some(0));
    }
}

#[test]
fn proxy_variables_are_told_to_be_without_effect() {
    for (variables, egress, found, problems) in [
        (&[][..], "", "", &[][..]),
        (&["NO_PROXY"], "", "", &[]),
        (
            &["HTTPS_PROXY"],
            "",
            "; HTTPS_PROXY is set and not used",
            &["proxy_variables_unused"],
        ),
        (
            &["HTTP_PROXY", "all_proxy"],
            "",
            "; HTTP_PROXY and all_proxy are set and not used",
            &["proxy_variables_unused"],
        ),
        (
            &["https_proxy"],
            "http://egress.test:3128",
            "; https_proxy is set and not used",
            &[],
        ),
    ] {
        let set = |command: Command, name: &&str| command.env(name, "http://canary:canary@a.test");
        let command = variables.iter().fold(check().keys(), set);
        let command = command.setting("upstream.proxy", egress);
        let report = Report::of(command.argument("--offline"));
        assert_eq!(report.finished.code, Some(0));
        assert_eq!(report.problems("settings"), problems, "{variables:?}");
        let told = report.found("settings");
        assert!(told.ends_with(found), "{variables:?}: {told}");
        assert_eq!(told.contains("not used"), !found.is_empty(), "{told}");
        assert!(!report.finished.stdout.contains("canary"));
    }
}

#[test]
fn offline_asks_nobody() {
    let upstream = Upstream::ok();
    let report = Report::of(check_of(&upstream).argument("--offline"));
    assert_eq!(report.finished.code, Some(0));
    assert_eq!(report.names(), ["settings", "credential", "trust"]);
    assert_eq!(upstream.seen().connections, 0);
}

#[test]
fn what_is_broken_on_the_way_is_told_apart() {
    let (_closed, refused) = closed();
    let (_plain, plain) = peer(Some("HTTP/1.1 400 Bad Request\r\n\r\n"));
    let (_cut, cut) = peer(Some(""));
    let (_silent, silent) = peer(None);
    let (_full, _first, full) = full();
    // Without any route, names cannot be resolved for that reason.
    let routed = UdpSocket::bind("0.0.0.0:0")
        .unwrap()
        .connect("192.0.2.1:443")
        .is_ok();
    let name = if routed {
        "name_not_resolved"
    } else {
        "no_network"
    };
    let route = if routed { "no_route" } else { "no_network" };
    for (url, step, problem) in [
        ("https://kling.invalid".to_owned(), "name", name),
        // A group of machines, to which TCP knows no way.
        ("https://224.0.0.1".to_owned(), "connection", route),
        (
            format!("https://{refused}"),
            "connection",
            "connection_refused",
        ),
        (
            format!("https://{full}"),
            "connection",
            "connection_timed_out",
        ),
        (format!("https://127.0.0.1:{plain}"), "tls", "not_tls"),
        (format!("https://127.0.0.1:{cut}"), "tls", "tls_failed"),
        (format!("https://127.0.0.1:{silent}"), "tls", "tls_failed"),
    ] {
        let command = check().keys().setting("upstream.url", &url);
        let report = Report::of(command.setting("upstream.connect_timeout", "2s"));
        assert_eq!(
            report.diagnosis(),
            (69, step, problem),
            "{url}: {}",
            report.json
        );
    }
}

#[test]
fn certificate_that_is_not_trusted_names_its_issuer() {
    let upstream = Upstream::tls("http/1.1");
    let report = Report::of(check().keys().setting("upstream.url", &upstream.url));
    assert_eq!(report.diagnosis(), (69, "tls", "certificate_not_trusted"));
    assert_has(
        report.found("tls"),
        &["issued by CN=rcgen self signed cert"],
    );
    assert_has(&report.step("tls").to_string(), &["upstream.ca_file"]);
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn certificate_of_another_name_is_told_so() {
    let upstream = Upstream::tls("http/1.1");
    let url = upstream.url.replace("localhost", "127.0.0.1");
    let report = Report::of(check_of(&upstream).setting("upstream.url", url));
    assert_eq!(
        report.diagnosis(),
        (69, "tls", "certificate_of_another_name")
    );
}

#[test]
fn certificate_that_is_over_is_told_with_this_machines_clock() {
    let (upstream, root) = (Upstream::ok(), Root::new());
    let command = Proxy::to(&upstream);
    let issued = root.issue_until("localhost", now() - DAY);
    let certificate = command.file("certificate.pem", &issued.certificate.pem());
    let key = command.file("key.pem", &issued.key.serialize_pem());
    let proxy = command
        .setting("listen.tls.certificate_file", certificate.to_str().unwrap())
        .setting("listen.tls.key_file", key.to_str().unwrap())
        .start();
    let command = check().keys();
    let ca_file = command.file("ca.pem", &root.pem());
    let url = format!("https://localhost:{}", proxy.address.port());
    let report = Report::of(
        command
            .setting("upstream.url", url)
            .setting("upstream.ca_file", ca_file.to_str().unwrap()),
    );
    assert_eq!(report.diagnosis(), (69, "tls", "certificate_out_of_time"));
    assert_has(report.found("tls"), &["this machine's clock says"]);
}

#[test]
fn trust_root_that_cannot_be_used_is_a_wrong_setting() {
    let command = check().keys();
    let path = command.file("ca.pem", "no certificate");
    let report = Report::of(command.setting("upstream.ca_file", path.to_str().unwrap()));
    assert_eq!(report.diagnosis(), (78, "trust", "ca_file_unusable"));
}

#[test]
fn wrong_clock_is_told_by_how_much() {
    for (seconds, code, direction) in [(600, 1004, "behind"), (-600, 1003, "ahead of")] {
        let upstream = Upstream::ok();
        upstream.answer(dated(401, seconds, &refusal(code, "no")));
        let report = Report::of(check_of(&upstream));
        assert_eq!(report.diagnosis(), (1, "clock", "clock_wrong"));
        let found = report.found("clock");
        assert!(
            found.starts_with("10m ") || found.starts_with("9m 5"),
            "{found}"
        );
        assert_has(found, &[direction]);

        upstream.answer(dated(200, seconds, SUCCESS));
        let report = Report::of(check_of(&upstream));
        assert_eq!(report.finished.code, Some(0), "{}", report.json);
        assert_eq!(report.problems("clock"), ["clock_wrong"]);
    }
}

#[test]
fn clock_that_the_proxy_makes_up_for_is_a_warning() {
    for (seconds, code) in [(3_600, Some(0)), (-3_600, Some(0)), (172_800, Some(1))] {
        let upstream = Upstream::lenient("http/1.1");
        upstream.script(move |request| {
            let claims = claims(request.header("authorization").unwrap());
            let [nbf, exp] = ["nbf", "exp"].map(|name| claims[name].as_u64().unwrap());
            let time = now().checked_add_signed(seconds).unwrap();
            vec![send(if (nbf..exp).contains(&time) {
                dated(200, seconds, SUCCESS)
            } else {
                dated(401, seconds, &refusal(1004, "expired"))
            })]
        });
        let report = Report::of(check_of(&upstream));
        assert_eq!(report.finished.code, code, "{}", report.json);
        assert_eq!(report.problems("clock"), ["clock_wrong"]);
        let requests = upstream.seen().requests.len();
        assert_eq!(requests, if code == Some(0) { 2 } else { 1 });
    }
}

#[test]
fn each_refusal_has_its_own_diagnosis() {
    let pair = Credential::Pair(ACCESS_KEY, SECRET_KEY);
    let no_pairs = "Authentication error. The current API does not support AK/SK; please go to \
                    the console (https://kling.ai/dev/api-key) to create API key.";
    let no_key = "The token was expected to have 3 parts, but got 0";
    for (credential, status, code, message, exit, problem) in [
        (
            pair,
            401,
            1000,
            "wrong signature",
            77,
            "authentication_failed",
        ),
        (pair, 401, 1001, "empty", 77, "authorization_missing"),
        (pair, 401, 1002, "invalid", 77, "authorization_invalid"),
        (pair, 401, 1002, no_pairs, 77, "api_key_needed"),
        (pair, 401, 1004, "expired", 77, "authorization_expired"),
        (pair, 429, 1101, "arrears", 1, "account_in_arrears"),
        (pair, 429, 1102, "balance", 1, "resource_pack_depleted"),
        (pair, 403, 1103, "denied", 1, "access_denied"),
        (pair, 429, 1304, "address", 1, "ip_not_allowed"),
        (pair, 200, 5000, "sorry", 1, "internal_error"),
        (
            Credential::ApiKey(API_KEY),
            401,
            1002,
            no_key,
            77,
            "key_pair_needed",
        ),
        (
            Credential::ApiKey(API_KEY),
            401,
            1000,
            "unknown",
            77,
            "authentication_failed",
        ),
    ] {
        let upstream = Upstream::expecting(credential);
        upstream.answer(kling(status, refusal(code, message)));
        let command = check().upstream(&upstream);
        let report = Report::of(match credential {
            Credential::ApiKey(key) => command.env("KLING_API_KEY", key),
            _ => command.keys(),
        });
        assert_eq!(
            report.diagnosis(),
            (exit, "account", problem),
            "{}",
            report.json
        );
        assert_has(report.found("account"), &[&code.to_string(), message]);
        assert_eq!(
            upstream.seen().requests.len(),
            1,
            "asked once, and nobody else"
        );
    }
}

#[test]
fn account_with_nothing_left_is_a_warning() {
    for (statuses, problems) in [
        (&["runOut", "expired"][..], &["resource_pack_depleted"][..]),
        (&["expired", "online"], &[]),
        (&[], &[]),
    ] {
        let packs: Vec<_> = statuses
            .iter()
            .map(|status| format!(r#"{{"status":"{status}","remaining_quantity":0.5}}"#))
            .collect();
        let data = format!(
            r#"{{"code":0,"resource_pack_subscribe_infos":[{}]}}"#,
            packs.join(",")
        );
        let upstream = Upstream::ok();
        upstream.answer(kling(200, format!(r#"{{"code":0,"data":{data}}}"#)));
        let report = Report::of(check_of(&upstream));
        assert_eq!(report.finished.code, Some(0));
        assert_eq!(report.problems("account"), problems, "{statuses:?}");
    }
}

#[test]
fn answer_that_is_not_klings_is_told_by_what_it_is() {
    let upstream = Upstream::ok();
    let elsewhere = format!("location: {}/elsewhere", upstream.url);
    let html = "content-type: text/html";
    for (answer, problem) in [
        (
            reply(502, html, "<h1>Bad Gateway</h1>"),
            "upstream_bad_response",
        ),
        (
            reply(200, html, "<h1>Please log in</h1>"),
            "upstream_bad_response",
        ),
        (kling(200, "{}"), "upstream_bad_response"),
        (kling(500, SUCCESS), "upstream_bad_response"),
        (reply(302, &elsewhere, ""), "redirected"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec(), "not_http"),
    ] {
        upstream.answer(answer);
        let report = Report::of(check_of(&upstream));
        assert_eq!(
            report.diagnosis(),
            (69, "answer", problem),
            "{}",
            report.json
        );
    }
    upstream.script(|_| vec![Step::Close]);
    let report = Report::of(check_of(&upstream));
    assert_eq!(report.diagnosis(), (69, "answer", "disconnected"));
    let requests = upstream.first_lines();
    assert!(
        requests.iter().all(|line| !line.contains("elsewhere")),
        "{requests:?}"
    );
}

#[test]
fn silent_upstream_is_given_up_in_time() {
    let upstream = Upstream::ok();
    for begun in ["", "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{"] {
        upstream.script(move |_| vec![send(begun), Step::Hang]);
        let command = check_of(&upstream).setting("upstream.response_timeout", "300ms");
        let report = Report::of(command);
        assert_eq!(report.diagnosis(), (69, "answer", "no_answer"));
    }
}

#[test]
fn upstream_that_repeats_the_token_is_not_quoted() {
    let upstream = Upstream::ok();
    upstream.script(|request| {
        let authorization = request.header("authorization").unwrap();
        assert_eq!(claims(authorization)["iss"], ACCESS_KEY);
        let signature = authorization.rsplit('.').next().unwrap();
        let message = format!("bad {authorization}, {signature} or {SECRET_KEY}");
        vec![send(kling(401, refusal(1000, &message)))]
    });
    let report = Report::of(check_of(&upstream));
    assert_eq!(report.diagnosis(), (77, "account", "authentication_failed"));
    assert_has(report.found("account"), &["redacted"]);
}

#[test]
fn proxies_of_the_environment_are_ignored() {
    let upstream = Upstream::ok();
    let command = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"]
        .iter()
        .fold(check_of(&upstream), |command, name| {
            command.env(name, "http://127.0.0.1:1")
        });
    assert_eq!(Report::of(command).finished.code, Some(0));
}

#[test]
fn certificate_of_ours_is_judged_by_its_end_and_its_names() {
    let root = Root::new();
    let run = |issued: &Issued, mode: u32| {
        let command = check().keys().argument("--offline");
        let write = |name: &str, content: String| -> PathBuf { command.file(name, &content) };
        let certificate = write("certificate.pem", issued.certificate.pem());
        let key = write("key.pem", issued.key.serialize_pem());
        fs::set_permissions(&key, Permissions::from_mode(mode)).unwrap();
        Report::of(
            command
                .setting("listen.tls.certificate_file", certificate.to_str().unwrap())
                .setting("listen.tls.key_file", key.to_str().unwrap()),
        )
    };
    let hour = 60 * 60;
    for (name, end, problems, parts) in [
        (
            "localhost",
            now() + 15 * DAY + hour,
            &[][..],
            "15 days left",
        ),
        (
            "localhost",
            now() + 13 * DAY + hour,
            &["certificate_ends_soon"],
            "13 days left",
        ),
        (
            "localhost",
            now() - DAY - hour,
            &["certificate_ended"],
            "over for 1 day",
        ),
        (
            "proxy.test",
            now() + 99 * DAY,
            &["certificate_of_another_name"],
            "for none of access.allowed_hosts; not for localhost, 127.0.0.1, [::1]",
        ),
        (
            "127.0.0.1",
            now() + 99 * DAY,
            &[],
            "for 127.0.0.1; not for localhost, [::1]",
        ),
    ] {
        let report = run(&root.issue_until(name, end), 0o600);
        assert_eq!(
            report.finished.code,
            Some(0),
            "warnings alone are no failure"
        );
        assert_eq!(
            report.problems("certificate"),
            problems,
            "{name} {}",
            report.json
        );
        assert_has(report.found("certificate"), &[parts]);
    }
    let report = run(&root.issue("localhost"), 0o644);
    assert_eq!(report.problems("certificate"), ["file_readable_by_others"]);
    let mixed = Issued {
        certificate: root.issue("localhost").certificate,
        key: root.issue("localhost").key,
    };
    let report = run(&mixed, 0o600);
    assert_eq!(
        report.diagnosis(),
        (78, "certificate", "certificate_unusable")
    );
}

/// Neither an account nor a network is needed, and the keys of the environment are not looked at.
#[test]
fn check_with_sandbox_goes_the_way_to_the_embedded_sandbox() {
    for command in [
        Command::new(["check", "--sandbox"]),
        Command::new(["--sandbox", "check"]).keys(),
    ] {
        let report = Report::of(command);
        assert_eq!(report.finished.code, Some(0), "{}", report.json);
        let names = report.names();
        assert_eq!(names[..3], ["settings", "credential", "trust"], "{names:?}");
        assert_eq!(*names.last().unwrap(), "account", "{names:?}");
        let credential = report.step("credential")["found"].as_str().unwrap();
        assert_has(credential, &["of the sandbox"]);
    }
    let offline = Report::of(Command::new(["check", "--sandbox", "--offline"]));
    assert_eq!(offline.names(), ["settings", "credential", "trust"]);
    let both = Command::new(["check", "--sandbox", "--upstream", "https://api.test"]).run();
    assert_eq!(both.code, Some(2), "{both:?}");
}

//! Settings: which source wins, which key is wrong, and that no secret is printed.

use crate::support::{Command, Proxy, Signal, Upstream, assert_has, closed};

/// `kling-proxy settings` with these flags.
fn settings(flags: &[&str]) -> Command {
    let command = Command::new(["settings"]);
    let command = flags.iter().fold(command, Command::argument);
    command
        .env("KLING_ACCESS_KEY", "canary-1")
        .env("KLING_SECRET_KEY", "canary-2")
}

/// The line that shows this key.
#[track_caller]
fn shown(command: Command, key: &str) -> String {
    let finished = command.run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let mut lines = finished.stdout.lines();
    lines
        .find(|line| line.trim_start().starts_with(key))
        .expect(key)
        .to_owned()
}

/// What start-up says of wrong settings.
#[track_caller]
fn problems(command: Command) -> String {
    let finished = command.keys().run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    finished.stderr
}

/// R6.
#[test]
fn proxy_that_would_call_itself_does_not_start() {
    let (_closed, address) = closed();
    for key in ["listen.address", "admin.address"] {
        let url = format!("http://{address}");
        let command = Command::new([]).keys().setting(key, &address);
        let told = command.setting("upstream.url", url).run();
        assert_eq!(told.code, Some(78), "{key}: {}", told.stderr);
        assert_has(&told.stderr, &["`upstream.url`", "this proxy itself"]);
    }
}

#[test]
fn later_source_wins_and_each_value_is_shown_with_its_source() {
    let file = "[log]\nfilter = \"warn\"\n";
    let named = |command: Command| {
        let path = command.file("named.toml", "[log]\nfilter = \"error\"\n");
        command.env("KLING_PROXY_CONFIG", path.to_str().unwrap())
    };
    let variable = |command: Command| command.setting("log.filter", "debug");
    let flagged = settings(&["--log-filter", "trace"]);
    for (command, parts) in [
        (settings(&[]), ["info", "default"]),
        (settings(&[]).config(file), ["warn", "config.toml"]),
        (named(settings(&[]).config(file)), ["error", "named.toml"]),
        (
            variable(named(settings(&[]))),
            ["debug", "KLING_PROXY_LOG__FILTER"],
        ),
        (variable(named(flagged)), ["trace", "--log-filter"]),
    ] {
        assert_has(&shown(command, "log.filter"), &parts);
    }
}

#[test]
fn flags_set_their_settings() {
    for (flag, value, key) in [
        ("--listen", "127.0.0.1:7001", "listen.address"),
        ("--admin", "127.0.0.1:7002", "admin.address"),
        (
            "--upstream",
            "https://api-beijing.klingai.com",
            "upstream.url",
        ),
        ("--log-format", "pretty", "log.format"),
        ("--log-filter", "warn", "log.filter"),
    ] {
        assert_has(&shown(settings(&[flag, value]), key), &[value, flag]);
    }
    let command = settings(&["--config"]);
    let file = command.file("other.toml", "[token]\nlifetime = \"7m\"\n");
    let line = shown(command.argument(file.to_str().unwrap()), "token.lifetime");
    assert_has(&line, &["7m", "other.toml"]);
}

#[test]
fn settings_file_that_is_named_must_exist() {
    let command = Command::new(["--config", "/nowhere/kling.toml"]);
    assert_has(&problems(command), &["/nowhere/kling.toml"]);
}

#[test]
fn settings_file_in_the_working_directory_is_not_read() {
    // A command runs in its home folder.
    let command = settings(&[]);
    for name in ["config.toml", "kling-proxy.toml", "kling-proxy/config.toml"] {
        command.file(name, "[log]\nfilter = \"error\"\n");
    }
    assert_has(&shown(command, "log.filter"), &["info", "default"]);
}

#[test]
fn secrets_are_not_shown() {
    let finished = settings(&[])
        .setting("credentials.secret_key", "canary-3")
        .run();
    assert_has(&finished.stdout, &["credentials.secret_key"]);
    for canary in ["canary-2", "canary-3"] {
        assert!(!format!("{finished:?}").contains(canary), "{finished:?}");
    }
}

#[test]
fn unknown_key_in_the_file_is_told_with_the_nearest_key() {
    for (file, nearest) in [
        ("[token]\nlifetme = \"5m\"\n", "token.lifetime"),
        ("[tokens]\nlifetime = \"5m\"\n", "token"),
        ("listen = { adress = \"127.0.0.1:0\" }\n", "listen.address"),
        ("\"token.lifetime\" = \"5m\"\n", "`token.lifetime`"),
    ] {
        let said = problems(Command::new([]).config(file));
        assert_has(&said, &["config.toml", nearest]);
    }
}

#[test]
fn unknown_variable_is_told_with_the_nearest_variable() {
    for (variable, nearest) in [
        ("KLING_PROXY_TOKEN__LIFETME", "KLING_PROXY_TOKEN__LIFETIME"),
        ("KLING_PROXY_LISTEN_ADDRESS", "KLING_PROXY_LISTEN__ADDRESS"),
        (
            "KLING_PROXY_LIMITS_REQUEST_BODY",
            "KLING_PROXY_LIMITS__REQUEST_BODY",
        ),
    ] {
        let said = problems(Command::new([]).env(variable, "5m"));
        assert_has(&said, &[variable, nearest]);
    }
}

#[test]
fn wrong_value_is_refused_with_its_key() {
    for (key, value) in [
        ("token.lifetime", "5s"),
        ("token.lifetime", "31m"),
        ("token.lifetime", "soon"),
        ("token.lifetime", "300"),
        ("token.refresh_before", "30m"),
        ("token.refresh_before", "31m"),
        ("upstream.url", "https://api.klingai.com/v1"),
        ("upstream.url", "https://api.klingai.com/?a=b"),
        ("upstream.url", "https://user:pass@api.klingai.com"),
        ("upstream.url", "http://api.klingai.com"),
        ("upstream.url", "http://10.0.0.1:80"),
        ("upstream.url", "ftp://127.0.0.1"),
        ("upstream.url", "api.klingai.com"),
        ("upstream.ca_file", "/nowhere/ca.pem"),
        ("upstream.response_timeout", "-1s"),
        ("listen.address", "5546"),
        ("limits.request_body", "many"),
        ("errors.status", "teapot"),
        ("errors.format", "xml"),
        ("log.format", "xml"),
        ("log.filter", "kling_proxy=loud"),
        ("log.filter", "warning"),
    ] {
        let finished = Command::new([]).keys().setting(key, value).run();
        assert_eq!(finished.code, Some(78), "{key} = {value}: {finished:?}");
        let variable = key.to_uppercase().replace('.', "__");
        let named = finished.stderr.contains(key) || finished.stderr.contains(&variable);
        assert!(named, "{key} = {value}: {finished:?}");
    }
}

#[test]
fn all_problems_are_told_in_one_run() {
    let command = Command::new([])
        .config("[token]\nlifetime = \"5s\"\nlifetme = \"5m\"\n\n[errors]\nformat = \"xml\"\n")
        .setting("upstream.url", "http://api.klingai.com/v1")
        .env("KLING_PROXY_LISTEN_ADDRESS", "127.0.0.1:0");
    let said = problems(command);
    assert_has(&said, &["token.lifetime", "lifetme", "errors.format"]);
    assert_has(&said, &["upstream.url", "KLING_PROXY_LISTEN_ADDRESS"]);
}

#[test]
fn wrong_settings_never_print_the_value_of_a_secret() {
    for (file, variable, value) in [
        ("[credentials]\nsecret_key = [\"canary\"]\n", "", ""),
        ("[credentials]\nsecret_key = { a = \"canary\" }\n", "", ""),
        ("[credentials]\nsecret_kay = \"canary\"\n", "", ""),
        ("[credentials]\nsecret_key = \"canary\n", "", ""),
        ("", "KLING_PROXY_CREDENTIALS__SECRET_KAY", "canary"),
        (
            "",
            "KLING_PROXY_UPSTREAM__URL",
            "https://user:canary@kling.test",
        ),
        (
            "",
            "KLING_PROXY_UPSTREAM__URL",
            "https://kling.test/?key=canary",
        ),
        (
            "",
            "KLING_PROXY_UPSTREAM__URL",
            r#"["https://user:canary@kling.test"]"#,
        ),
        ("", "KLING_PROXY_CREDENTIALS__SECRET_KEY", r#"["canary"]"#),
        ("", "KLING_PROXY_SECRET_KEY", "canary"),
        ("", "KLING_API_KEY", "canary\nof two lines"),
    ] {
        let command = Command::new([]).config(file);
        let finished = match variable {
            "" => command.run(),
            variable => command.env(variable, value).run(),
        };
        assert_eq!(finished.code, Some(78), "{file}{variable}: {finished:?}");
        assert!(!format!("{finished:?}").contains("canary"), "{finished:?}");
    }
}

#[test]
fn variables_that_kubernetes_makes_for_a_service_are_ignored() {
    let upstream = Upstream::ok();
    let proxy = Proxy::to(&upstream)
        .env("KLING_PROXY_PORT", "tcp://10.0.0.11:5546")
        .env("KLING_PROXY_PORT_5546_TCP", "tcp://10.0.0.11:5546")
        .env("KLING_PROXY_PORT_5546_TCP_ADDR", "10.0.0.11")
        .env("KLING_PROXY_SERVICE_HOST", "10.0.0.11")
        .env("KLING_PROXY_SERVICE_PORT_HTTP", "5546")
        .start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

#[test]
fn empty_variable_leaves_the_setting_alone() {
    let command = settings(&[]).empty_env("KLING_PROXY_TOKEN__LIFETIME");
    assert_has(&shown(command, "token.lifetime"), &["30m", "default"]);
}

#[test]
fn several_addresses_are_listened_on() {
    let upstream = Upstream::ok();
    let addresses = r#"["127.0.0.1:0","127.0.0.1:0"]"#;
    let proxy = Proxy::to(&upstream)
        .setting("listen.address", addresses)
        .start();
    proxy.signal(Signal::TERM);
    let output = proxy.stdout.to_end();
    assert_eq!(output.matches("proxy ").count(), 2, "{output}");
}

#[test]
fn documented_defaults_are_the_effective_ones() {
    for (key, value) in [
        ("listen.address", "127.0.0.1:5546"),
        ("admin.address", "127.0.0.1:5547"),
        ("upstream.url", "https://api-singapore.klingai.com"),
        ("upstream.connect_timeout", "5s"),
        ("upstream.response_timeout", "60s"),
        ("upstream.idle_timeout", "30s"),
        ("token.lifetime", "30m"),
        ("token.not_before_leeway", "5s"),
        ("token.refresh_before", "5m"),
        ("limits.request_body", "256MiB"),
        ("limits.connections", "10000"),
        ("limits.header_timeout", "60s"),
        ("limits.in_flight", "1024"),
        ("shutdown.drain", "25s"),
        ("errors.status", "documented"),
        ("errors.format", "kling"),
        ("log.filter", "info"),
    ] {
        let command = settings(&[])
            .setting("listen.address", "")
            .setting("admin.address", "");
        assert_has(&shown(command, key), &[value, "default"]);
    }
}

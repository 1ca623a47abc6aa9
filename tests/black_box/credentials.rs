//! Where keys come from, which source wins, and that no key is ever put out.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use crate::support::{
    ACCESS_KEY, Command, Credential, Proxy, SECRET_KEY, Signal, Upstream, assert_has,
};

const API_KEY: &str = "api-key-of-the-black-box-tests";

/// Variables, each with a value, or with `@` and the name of a file that holds the key.
type Sources<'a> = &'a [(&'a str, &'a str)];

/// A proxy that has its credential from these sources; one that upstream does not take fails.
fn start(upstream: &Upstream, sources: Sources) -> Proxy {
    let command = Command::new([]).upstream(upstream);
    let file = command.file("access", &format!("  {ACCESS_KEY}\n"));
    command.file("secret", &format!("{SECRET_KEY}\r\n\n"));
    command.file("api", &format!("{API_KEY}\n"));
    command.file("credentials/kling_access_key", ACCESS_KEY);
    command.file("credentials/kling_secret_key", SECRET_KEY);
    command.file("with_api_key/kling_access_key", "unused");
    command.file("with_api_key/kling_secret_key", "unused");
    command.file("with_api_key/kling_api_key", API_KEY);
    let path = |name: &str| file.with_file_name(name).to_str().unwrap().to_owned();
    let set = |command: Command, &(name, value): &(&str, &str)| {
        let value = value.strip_prefix('@').map_or(value.to_owned(), path);
        command.env(name, value)
    };
    let proxy = sources.iter().fold(command, set).start();
    assert_eq!(proxy.get("/v1/account").status(), 200, "{sources:?}");
    proxy
}

#[test]
fn pair_is_found_in_every_documented_place() {
    let [colon, bar] = [":", "|"].map(|separator| [ACCESS_KEY, SECRET_KEY].join(separator));
    #[rustfmt::skip]
    let places: [Sources; 10] = [
        &[("KLING_ACCESS_KEY", ACCESS_KEY), ("KLING_SECRET_KEY", SECRET_KEY)],
        &[("KLING_ACCESS_KEY_FILE", "@access"), ("KLING_SECRET_KEY_FILE", "@secret")],
        &[("KLING_ACCESS_KEY", ACCESS_KEY), ("KLING_SECRET_KEY_FILE", "@secret")],
        &[("KLINGAI_ACCESS_KEY", ACCESS_KEY), ("KLINGAI_SECRET_KEY", SECRET_KEY)],
        &[("KLINGAI_ACCESS_KEY_FILE", "@access"), ("KLINGAI_SECRET_KEY_FILE", "@secret")],
        &[("CREDENTIALS_DIRECTORY", "@credentials")],
        &[("KLING_PROXY_CREDENTIALS__ACCESS_KEY", ACCESS_KEY), ("KLING_PROXY_CREDENTIALS__SECRET_KEY", SECRET_KEY)],
        &[("KLING_PROXY_CREDENTIALS__ACCESS_KEY_FILE", "@access"), ("KLING_PROXY_CREDENTIALS__SECRET_KEY_FILE", "@secret")],
        &[("KLING_API_KEY", &colon)],
        &[("KLING_API_KEY", &bar)],
    ];
    for sources in places {
        start(&Upstream::ok(), sources);
    }
}

#[test]
fn api_key_is_found_in_every_documented_place_and_sent_as_it_is() {
    for source in [
        ("KLING_API_KEY", API_KEY),
        ("KLING_API_KEY_FILE", "@api"),
        ("CREDENTIALS_DIRECTORY", "@with_api_key"),
        ("KLING_PROXY_CREDENTIALS__API_KEY_FILE", "@api"),
    ] {
        start(&Upstream::expecting(Credential::ApiKey(API_KEY)), &[source]);
    }
}

#[test]
fn first_source_in_the_documented_order_wins() {
    #[rustfmt::skip]
    let order: [(Credential, Sources); 5] = [
        (Credential::ApiKey(API_KEY), &[("KLING_API_KEY", API_KEY)]),
        (Credential::Pair("first", "one"), &[("KLING_ACCESS_KEY", "first"), ("KLING_SECRET_KEY", "one")]),
        (Credential::Pair("second", "two"), &[("KLINGAI_ACCESS_KEY", "second"), ("KLINGAI_SECRET_KEY", "two")]),
        (Credential::Pair(ACCESS_KEY, SECRET_KEY), &[("CREDENTIALS_DIRECTORY", "@credentials")]),
        (Credential::Pair("last", "four"), &[("KLING_PROXY_CREDENTIALS__ACCESS_KEY", "last"), ("KLING_PROXY_CREDENTIALS__SECRET_KEY", "four")]),
    ];
    for (index, (winner, _)) in order.iter().enumerate() {
        let present = order[index..]
            .iter()
            .flat_map(|(_, sources)| *sources)
            .copied();
        start(&Upstream::expecting(*winner), &present.collect::<Vec<_>>());
    }
}

#[test]
fn empty_variable_counts_as_unset() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream).empty_env("KLING_API_KEY");
    let proxy = command.empty_env("KLING_SECRET_KEY_FILE").start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

#[test]
fn pair_in_the_variable_of_the_api_key_is_warned_of() {
    let pair = [ACCESS_KEY, SECRET_KEY].join(":");
    let proxy = start(&Upstream::ok(), &[("KLING_API_KEY", &pair)]);
    let warning = |line: &str| line.contains("WARN") && line.contains("KLING_API_KEY");
    assert!(
        proxy.stderr.find(warning).is_some(),
        "{}",
        proxy.stderr.to_end()
    );
}

/// R10.
#[test]
fn start_without_a_credential_says_what_to_set() {
    let finished = Command::new([]).run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    let ways_out = [
        "KLING_ACCESS_KEY",
        "KLING_SECRET_KEY",
        "KLING_API_KEY",
        "--sandbox",
    ];
    assert_has(&finished.stderr, &ways_out);
}

#[test]
fn half_a_pair_is_told_the_name_of_the_other_half() {
    for (half, other) in [
        ("KLING_ACCESS_KEY", "KLING_SECRET_KEY"),
        ("KLING_SECRET_KEY", "KLING_ACCESS_KEY"),
        ("KLINGAI_ACCESS_KEY", "KLINGAI_SECRET_KEY"),
        ("KLINGAI_SECRET_KEY", "KLINGAI_ACCESS_KEY"),
        (
            "KLING_PROXY_CREDENTIALS__ACCESS_KEY",
            "credentials.secret_key",
        ),
        (
            "KLING_PROXY_CREDENTIALS__SECRET_KEY",
            "credentials.access_key",
        ),
    ] {
        let finished = Command::new([]).env(half, "canary-0123456789").run();
        assert_eq!(finished.code, Some(78), "{half}: {finished:?}");
        assert_has(&finished.stderr, &[other]);
        assert!(!finished.stderr.contains("canary"), "{half}: {finished:?}");
    }
}

#[test]
fn missing_key_file_is_named_with_its_variable() {
    let finished = Command::new([])
        .env("KLING_API_KEY_FILE", "/nowhere/kling")
        .run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(&finished.stderr, &["KLING_API_KEY_FILE", "/nowhere/kling"]);
}

#[test]
fn credentials_folder_that_cannot_be_read_is_named_with_the_reason() {
    let start = |prepare: &dyn Fn(&Path)| {
        let command = Command::new([]);
        let key = command.file("credentials/kling_api_key", API_KEY);
        let folder = key.parent().unwrap();
        prepare(folder);
        let named = folder.to_str().unwrap().to_owned();
        let command = command.env("CREDENTIALS_DIRECTORY", &named);
        (command.unprivileged().run(), named)
    };
    let mode = |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o000)).unwrap();
    let gone = |path: &Path| fs::rename(path, path.with_file_name("elsewhere")).unwrap();
    for (prepare, place, name, reason) in [
        (
            &mode as &dyn Fn(&Path),
            "$CREDENTIALS_DIRECTORY",
            "",
            "Permission denied (os error 13)",
        ),
        (
            &gone,
            "$CREDENTIALS_DIRECTORY",
            "",
            "No such file or directory (os error 2)",
        ),
        (
            &|folder: &Path| mode(&folder.join("kling_api_key")),
            "$CREDENTIALS_DIRECTORY/kling_api_key",
            "/kling_api_key",
            "Permission denied (os error 13)",
        ),
    ] {
        let (finished, folder) = start(prepare);
        assert_eq!(finished.code, Some(78), "{finished:?}");
        let told = format!("kling-proxy: cannot read {place} ({folder}{name}): {reason}");
        assert_eq!(finished.stderr.lines().last(), Some(&*told));
    }
}

#[test]
fn nothing_that_is_put_out_holds_a_key_or_a_token() {
    let pair: Sources = &[
        ("KLING_ACCESS_KEY", ACCESS_KEY),
        ("KLING_SECRET_KEY", SECRET_KEY),
    ];
    for (upstream, sources) in [
        (Upstream::ok(), pair),
        (
            Upstream::expecting(Credential::ApiKey(API_KEY)),
            &[("KLING_API_KEY", API_KEY)],
        ),
    ] {
        let everything = [sources, &[("KLING_PROXY_LOG__FILTER", "trace")]].concat();
        let proxy = start(&upstream, &everything);
        let mut output = proxy.get("/v1/account").head;
        output += proxy
            .send("GET /v1/x HTTP/1.1\r\nhost: evil.test\r\n\r\n")
            .text();
        output += proxy.admin("/metrics").text();
        output += proxy.admin("/health/ready").text();
        proxy.signal(Signal::TERM);
        output += &proxy.stdout.to_end();
        output += &proxy.end().1;
        assert_has(&output, &["DEBUG"]);
        let last = upstream.last();
        let token = last
            .header("authorization")
            .unwrap()
            .trim_start_matches("Bearer ");
        for secret in [SECRET_KEY, API_KEY, token] {
            assert!(!output.contains(secret), "{secret} was put out");
        }
    }
}

//! Fuzzes the settings file and the variables: the loader returns settings that are safe to use, or
//! problems, and neither shows a secret.
//!
//! An input is the file, then the variables. Each variable begins with a line that begins with
//! `KLING_PROXY_`.

#![no_main]

use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use kling_proxy::internals::{Environment, Flags, SettingRow, Settings};
use libfuzzer_sys::fuzz_target;
use toml::{Table, Value};

/// Text that stands for a secret. It must not be shown if it is in the value of a secret key.
const CANARY: &str = "canary";
const PREFIX: &str = "KLING_PROXY_";
const SECRETS: [&str; 2] = ["credentials.access_key", "credentials.secret_key"];

static FILE: LazyLock<Mutex<File>> =
    LazyLock::new(|| Mutex::new(tempfile::tempfile().expect("a temporary file")));
static KEYS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let (_, rows) = Settings::load(&Flags::default(), &Environment::default())
        .expect("defaults are without problems");
    rows.into_iter().map(|row| row.key).collect()
});

fuzz_target!(|input: &[u8]| {
    let (file, variables) = split(input);
    let values = parse(file);
    let shown = match load(file, &variables) {
        Ok((settings, rows)) => {
            is_safe(&settings);
            every_key_took_effect(values.as_ref(), &rows);
            format!("{settings:?} {rows:?}")
        }
        Err(problems) => {
            assert_ne!(problems, []);
            let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
            texts.join("\n")
        }
    };
    if !values.is_some_and(|values| says_openly(&values))
        && !variables.iter().any(says_variable_openly)
    {
        assert!(!shown.contains(CANARY), "{shown}");
    }
});

type Variable = (OsString, OsString);

fn split(input: &[u8]) -> (&[u8], Vec<Variable>) {
    let starts = (0..input.len())
        .filter(|at| *at == 0 || input[at - 1] == b'\n')
        .filter(|at| input[*at..].starts_with(PREFIX.as_bytes()));
    let mut starts: Vec<_> = starts.collect();
    let end = starts.first().copied().unwrap_or(input.len());
    starts.push(input.len());
    let variable = |text: &[u8]| {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let middle = text.iter().position(|b| *b == b'=').unwrap_or(text.len());
        let value = text.get(middle + 1..).unwrap_or_default();
        [&text[..middle], value]
            .map(|text| OsString::from_vec(text.to_vec()))
            .into()
    };
    let variables = starts
        .windows(2)
        .map(|ends| variable(&input[ends[0]..ends[1]]));
    (&input[..end], variables.collect())
}

fn load(
    text: &[u8],
    variables: &[Variable],
) -> Result<(Settings, Vec<SettingRow>), Vec<kling_proxy::internals::SettingProblem>> {
    let mut file = FILE.lock().expect("one thread");
    let written = file
        .rewind()
        .and_then(|()| file.set_len(0))
        .and_then(|()| file.write_all(text));
    written
        .and_then(|()| file.rewind())
        .expect("room for the file");
    let flags = Flags {
        config: Some(PathBuf::from(format!("/dev/fd/{}", file.as_raw_fd()))),
        values: Vec::new(),
    };
    Settings::load(&flags, &variables.iter().cloned().collect())
}

/// Checks the guarantees that the program relies on, above all on the clients that can connect and on the
/// target.
fn is_safe(settings: &Settings) {
    let Settings {
        listen,
        upstream,
        token,
        access,
        limits,
        ..
    } = settings;
    let protected = listen.unsafe_allow_remote || access.client_tokens_file.is_some();
    assert!(!listen.addresses.is_empty());
    assert!(
        protected
            || listen
                .addresses
                .iter()
                .all(|address| address.ip().is_loopback())
    );
    let origin = &upstream.origin;
    assert!(origin.to_string().starts_with("https://") || origin.loopback_port().is_some());
    assert!(!access.allowed_hosts.is_empty());
    assert!(
        access
            .allowed_origins
            .iter()
            .all(|origin| origin.as_bytes() != b"null")
    );
    assert!(
        access
            .allowed_paths
            .iter()
            .all(|path| path.starts_with('/'))
    );
    let minutes = Duration::from_mins;
    assert!((minutes(1)..=minutes(30)).contains(&token.lifetime));
    assert!(token.refresh_before < token.lifetime);
    let waits = [
        upstream.timeouts.connect,
        upstream.timeouts.response,
        upstream.timeouts.idle,
    ];
    for wait in waits.into_iter().chain([limits.header_timeout]) {
        assert!(Duration::ZERO < wait && wait <= Duration::from_hours(24));
    }
    assert!(limits.connections > 0 && limits.in_flight > 0);
}

/// Checks that no key of the file is ignored. Only a variable may override it.
fn every_key_took_effect(values: Option<&Table>, rows: &[SettingRow]) {
    for (key, _) in values.map(leaves).unwrap_or_default() {
        let row = rows
            .iter()
            .find(|row| row.key == key.join(".") && key.len() > 1);
        let source = row.map(|row| row.source.as_str()).unwrap_or_default();
        assert!(
            source.starts_with("/dev/fd/") || source.starts_with(PREFIX),
            "{key:?}: {source}"
        );
    }
}

fn parse(file: &[u8]) -> Option<Table> {
    std::str::from_utf8(file).ok()?.parse().ok()
}

/// Returns all values with the names that lead to them.
fn leaves(table: &Table) -> Vec<(Vec<String>, &Value)> {
    let mut leaves = Vec::new();
    for (name, value) in table {
        let inner = match value {
            Value::Table(inner) => self::leaves(inner),
            value => vec![(Vec::new(), value)],
        };
        leaves.extend(inner.into_iter().map(|(mut key, value)| {
            key.insert(0, name.clone());
            (key, value)
        }));
    }
    leaves
}

/// Returns true if the canary may be shown: if it is in a name, or in the value of a key that is known and
/// not secret.
fn says_openly(values: &Table) -> bool {
    leaves(values).into_iter().any(|(key, value)| {
        let key = key.join(".");
        key.contains(CANARY) || is_open(&key, &value.to_string())
    })
}

fn says_variable_openly((name, value): &Variable) -> bool {
    let [name, value] = [name, value].map(|text| text.to_string_lossy());
    let key = name
        .trim_start_matches(PREFIX)
        .to_ascii_lowercase()
        .replace("__", ".");
    name.contains(CANARY) || is_open(&key, &value)
}

fn is_open(key: &str, value: &str) -> bool {
    let password = key == "upstream.url" && value.contains(['@', '?']);
    let known = KEYS.iter().any(|known| known == key);
    value.contains(CANARY) && known && !password && !SECRETS.contains(&key)
}

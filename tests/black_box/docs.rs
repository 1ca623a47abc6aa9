//! The references below `docs/` say what the program says. They are made of it: with `UPDATE_DOCS` in
//! the environment these tests write them anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, mem,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::support::{Command, Proxy, Upstream, eventually, kling, request};

/// Settings whose value the harness sets for all commands.
const OF_THE_HARNESS: [&str; 6] = [
    "admin.address",
    "listen.address",
    "log.format",
    "upstream.keep_warm",
    "state.watch",
    "upstream.warm_up",
];

#[test]
fn every_setting_is_in_the_reference_with_its_default() {
    let reference = fs::read_to_string(root().join("config/default.toml")).unwrap();
    let (mut section, mut meaning, mut keys) = ("", String::new(), Vec::new());
    let (mut defaults, mut rows) = (BTreeMap::new(), Vec::new());
    for line in reference.lines().chain([""]) {
        if let Some((key, default)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            let key = format!("{section}.{key}");
            defaults.insert(key.clone(), default.to_owned());
            keys.push((format!("`{key}`"), format!("`{default}`")));
            continue;
        }
        // What a comment says holds for all keys up to the next.
        if !keys.is_empty() {
            let (keys, defaults): (Vec<_>, Vec<_>) = keys.drain(..).unzip();
            rows.push([
                keys.join("<br>"),
                defaults.join("<br>"),
                mem::take(&mut meaning),
            ]);
        }
        if let Some(words) = line.strip_prefix("# ") {
            meaning = [&meaning, words].join(" ").trim().to_owned();
        } else {
            meaning.clear();
            section = line.trim_matches(['[', ']']);
        }
    }
    let text = table(["key", "default", "meaning"], rows);
    assert_section("docs/configuration.md", "settings", &text);

    let unset = |command: Command, key: &&str| command.setting(key, "");
    let command = OF_THE_HARNESS
        .iter()
        .fold(Command::new(["settings"]), unset);
    let shown = command.run().stdout;
    let shown = shown.lines().filter_map(|line| {
        let (assignment, _) = line.split_once(" # ")?;
        let (key, default) = assignment.split_once(" = ")?;
        Some((key.to_owned(), default.trim().replace("\",\"", "\", \"")))
    });
    assert_eq!(shown.collect::<BTreeMap<_, _>>(), defaults);
}

#[test]
fn every_code_is_in_the_reference() {
    let codes = codes();
    let names = [
        "code",
        "status",
        "type",
        "retryable",
        "explanation",
        "solution",
    ];
    let errors = codes.iter().filter(|row| row["code"] != 0);
    let rows = errors.map(|row| {
        names.map(|name| match (&row[name], name) {
            (Value::String(kind), "type") => format!("`{kind}`"),
            (Value::String(text), _) => text.clone(),
            (number, _) => number.to_string(),
        })
    });
    let text = table(names, rows);
    assert_section("docs/errors.md", "codes", &text);
}

#[test]
fn what_follows_from_every_code_is_in_the_reference() {
    let codes = codes();
    let names = [
        "code",
        "class",
        "resent",
        "retry_after",
        "actionable_status",
        "hint",
    ];
    let errors = codes.iter().filter(|row| row["code"] != 0);
    let rows = errors.map(|row| {
        names.map(|name| match (&row[name], name) {
            (Value::Null, _) => String::new(),
            (status, "actionable_status") if *status == row["status"] => String::new(),
            (Value::String(class), "class") => format!("`{class}`"),
            (Value::String(text), _) => text.clone(),
            (number, _) => number.to_string(),
        })
    });
    let head = [
        "code",
        "class",
        "resent",
        "retry-after",
        "actionable",
        "hint",
    ];
    assert_section("docs/errors.md", "treatment", &table(head, rows));
}

#[test]
fn every_metric_is_in_the_reference() {
    let metrics = exposition();
    let mut labels: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once(['{', ' ']).unwrap();
        let pairs = rest
            .split_once('}')
            .map_or("", |(pairs, _)| pairs)
            .split(',');
        let names = pairs.filter_map(|pair| Some(pair.split_once('=')?.0));
        labels.entry(name).or_default().extend(names);
    }
    let helped = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# HELP "));
    let typed = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "));
    let rows = helped.zip(typed).map(|(help, kind)| {
        let (name, help) = help.split_once(' ').unwrap();
        let kind = kind.split_once(' ').unwrap().1.to_owned();
        let labels = labels.get(name).into_iter().flatten();
        let labels: Vec<_> = labels.map(|label| format!("`{label}`")).collect();
        [
            format!("`{name}`"),
            kind,
            labels.join(", "),
            help.to_owned(),
        ]
    });
    let text = table(["metric", "type", "labels", "meaning"], rows);
    assert_section("docs/operations.md", "metrics", &text);
}

#[test]
fn alerts_ask_for_metrics_and_labels_that_there_are() {
    let metrics = exposition();
    let read = |name| fs::read_to_string(root().join(name)).unwrap();
    let (rules, told) = (
        read("config/prometheus-rules.yaml"),
        read("docs/operations.md"),
    );
    let alerts = rules
        .lines()
        .filter_map(|line| line.split_once("- alert: "));
    let alerts: Vec<_> = alerts.map(|(_, name)| name).collect();
    assert!(!alerts.is_empty());
    for alert in alerts {
        assert!(
            told.contains(&format!("| `{alert}` |")),
            "{alert} is not told of"
        );
    }
    for (at, _) in rules.match_indices("kling_proxy_") {
        let (name, rest) = rules[at..].split_at(rules[at..].find(['{', '[', ')', ' ']).unwrap());
        assert!(metrics.contains(&format!("# TYPE {name} ")), "{name}");
        let Some(selector) = rest.strip_prefix('{') else {
            continue;
        };
        let (label, values) = selector.split_once('=').unwrap();
        let values = values.split('"').nth(1).unwrap();
        // Of regular expressions the rules use alternatives and open ends.
        for value in values.split('|') {
            let series = match value.strip_suffix(".+") {
                Some(start) => format!("\n{name}{{{label}=\"{start}"),
                None => format!("\n{name}{{{label}=\"{value}\"}}"),
            };
            assert!(metrics.contains(&series), "{name}: {label} {value}");
        }
    }
}

/// Every row of the table of codes, as JSON.
fn codes() -> Vec<BTreeMap<String, Value>> {
    let codes = Command::new(["explain", "--output", "json"]).run().stdout;
    serde_json::from_str(&codes).unwrap()
}

/// What `/metrics` shows once each kind of event has happened that is not counted from the start.
fn exposition() -> String {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = command.file(
        "client_tokens",
        "someone:a-token-of-32-characters-or-more\n",
    );
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .setting("state.watch", "true")
        .start();
    let token = "kling-proxy-token: a-token-of-32-characters-or-more";
    assert_eq!(proxy.send(request("GET /v1/x", token, "")).status(), 200);
    // The metrics of packs come with the answer to the watcher's question.
    let pack = json!({
        "resource_pack_name": "Trial-Video-100Units-5Con-1Months", "status": "online",
        "total_quantity": 100.0, "remaining_quantity": 50.0, "invalid_time": 4_000_000_000_000_u64,
    });
    let data = json!({
        "task_id": "8", "task_status": "submitted", "resource_pack_subscribe_infos": [pack],
    });
    upstream.answer(kling(200, json!({ "code": 0, "data": data }).to_string()));
    proxy.send(request("POST /v1/videos/text2video", token, "{}"));
    let mut metrics = String::new();
    eventually("the packs are known", || {
        proxy.admin("/metrics").text().clone_into(&mut metrics);
        metrics.contains("kling_proxy_pack_units_left{")
    });
    metrics
}

/// A table in Markdown.
fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let head = [head.map(str::to_owned), [(); N].map(|()| "---".to_owned())];
    let rows = head.into_iter().chain(rows);
    let lines = rows.map(|cells| format!("| {} |", cells.join(" | ")));
    lines.collect::<Vec<_>>().join("\n")
}

/// Fails unless the section of this name has this text; writes it where that is asked for.
#[track_caller]
fn assert_section(page: &str, name: &str, text: &str) {
    let path = root().join(page);
    let old = fs::read_to_string(&path).unwrap();
    let start = format!("<!-- generated: {name} -->\n");
    let (before, rest) = old.split_once(&start).expect("the start of the section");
    let (_, after) = rest
        .split_once("<!-- end -->")
        .expect("the end of the section");
    let new = format!("{before}{start}\n{text}\n\n<!-- end -->{after}");
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(path, new).unwrap();
    } else {
        assert!(
            old == new,
            "{page} is out of date: `just docs` writes it anew"
        );
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

//! The command `tasks`: it shows what the store remembers, and changes nothing.

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    Command, Finished, Proxy, Signal, Upstream, assert_has, closed, eventually, kling, request,
    started_with,
};

const VIDEOS: &str = "/v1/videos/text2video";

/// A store in a file, and what asks for it.
struct Store {
    folder: TempDir,
    upstream: Upstream,
}

// === impl Store ===

impl Store {
    fn new() -> Self {
        Self {
            folder: TempDir::new().unwrap(),
            upstream: Upstream::ok(),
        }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("tasks.db")
    }

    fn url(&self) -> String {
        format!("sqlite:{}", self.file().display())
    }

    /// Starts a proxy that writes to the store.
    fn proxy(&self) -> Proxy {
        self.proxy_with(&[])
    }

    fn proxy_with(&self, settings: &[(&str, &str)]) -> Proxy {
        let command = Proxy::to(&self.upstream).setting("state.url", self.url());
        let set = |command: Command, (key, value): &(&str, &str)| command.setting(key, value);
        settings.iter().fold(command, set).start()
    }

    /// Returns the command, with this store.
    fn tasks<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let command = Command::new(["tasks"]).setting("state.url", self.url());
        arguments.into_iter().fold(command, Command::argument)
    }

    /// Makes a task that succeeds with this model and external id.
    fn succeeds(&self, proxy: &Proxy, id: &str, external_id: &str) {
        self.upstream.answer(answer(
            200,
            &json!({ "task_id": id, "task_status": "submitted" }),
        ));
        let body = json!({ "model_name": "kling-v2-6", "prompt": "a cat", "external_task_id": external_id });
        assert_eq!(proxy.post(VIDEOS, body.to_string()).status(), 200);
        self.polls(
            proxy,
            id,
            "succeed",
            json!({
                "final_unit_deduction": "2.5",
                "task_result": { "videos": [{ "url": "https://a/v.mp4?Expires=1900000000" }] },
            }),
        );
    }

    /// Lets a client poll a task that has this state.
    fn polls(&self, proxy: &Proxy, id: &str, status: &str, mut data: Value) {
        data["task_id"] = id.into();
        data["task_status"] = status.into();
        self.upstream.answer(answer(200, &data));
        assert_eq!(proxy.get(&format!("{VIDEOS}/{id}")).status(), 200);
        let status = status.replace("succeed", "succeeded");
        eventually("the poll is recorded", || {
            proxy.get(&format!("/_proxy/tasks/{id}")).json()["status"] == *status
        });
    }

    /// Lets Kling refuse a create.
    fn is_refused(&self, proxy: &Proxy) {
        self.upstream.answer(kling(
            429,
            r#"{"code":1102,"message":"Account balance not enough"}"#,
        ));
        let answer = proxy.post("/v1/videos/lip-sync", "{}");
        let reference = answer.header("kling-proxy-task").unwrap().to_owned();
        eventually("the outcome is recorded", || {
            proxy.get(&format!("/_proxy/tasks/{reference}")).json()["status"] == "rejected"
        });
    }
}

fn answer(status: u16, data: &Value) -> Vec<u8> {
    let body = json!({ "code": 0, "message": "SUCCEED", "request_id": "u", "data": data });
    kling(status, body.to_string())
}

/// Writes a file of client tokens, and returns its path.
fn client_tokens(folder: &Path, line: &str) -> String {
    let file = folder.join("tokens");
    fs::write(&file, line).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Returns the names of the files in a folder and below.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.append(&mut self::files(&path));
        }
        files.insert(path);
    }
    files
}

fn stdout(finished: &Finished) -> &str {
    assert_eq!(finished.code, Some(0), "{finished:?}");
    &finished.stdout
}

fn lines(finished: &Finished) -> Vec<Value> {
    let lines = stdout(finished).lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Replaces what differs from run to run: numbers before a unit of time, and the proxy's own ids.
fn anonymous(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let mut words: Vec<_> = line.split(' ').collect();
        for index in 1..words.len() {
            if words[index] == "s" {
                words[index - 1] = "N";
            }
        }
        let words = words.into_iter().map(|word| match word {
            word if word.starts_with("t_") => "REF",
            word => word,
        });
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn table_shows_each_task_while_the_proxy_runs_and_after_its_end() {
    let store = Store::new();
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "cat-1");
    store
        .upstream
        .answer(answer(200, &json!({ "task_id": "831" })));
    proxy.post(VIDEOS, "{}");
    store.polls(
        &proxy,
        "831",
        "failed",
        json!({ "task_status_msg": "risk control" }),
    );
    store.is_refused(&proxy);
    let expected = "\
age     status      model       units  took  id                      error
N s     rejected    lip-sync    -      N s   REF  1102 resource_pack_depleted
N s     failed      text2video  -      N s   831                     risk control
N s     succeeded   kling-v2-6  2.5    N s   830                     -";
    let running = store.tasks([]).run();
    assert_eq!(anonymous(stdout(&running)), expected);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
    let stopped = store.tasks([]).run();
    assert_eq!(anonymous(stdout(&stopped)), expected);
}

#[test]
fn one_task_is_shown_by_each_of_its_ids() {
    let store = Store::new();
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "a cat/1");
    let shown = proxy.get("/_proxy/tasks/830");
    let reference = shown.json()["ref"].as_str().unwrap().to_owned();
    for id in ["830", "a cat/1", &reference] {
        let finished = store.tasks([id]).run();
        let text = stdout(&finished);
        assert_has(text, &["status       succeeded", "id           830"]);
        assert_has(text, &["external id  a cat/1", "units        2.5"]);
        assert_has(text, &["video        https://a/v.mp4?Expires=1900000000"]);
        let finished = store.tasks([id, "--output", "json"]).run();
        let pretty = stdout(&finished);
        assert!(pretty.starts_with("{\n  \"ref\": \"t_"), "{pretty}");
        let same: Value = serde_json::from_str(pretty).unwrap();
        assert_eq!(same, shown.json(), "{id}");
    }
    let finished = store.tasks(["832"]).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(&finished.stderr, &["knows no task 832"]);
}

#[test]
fn filters_choose_tasks_and_json_has_one_a_line() {
    let store = Store::new();
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "cat-1");
    store.is_refused(&proxy);
    let listed = proxy.get("/_proxy/tasks").json();
    for (arguments, indices) in [
        (&[][..], &[0, 1][..]),
        (&["--status", "succeeded"], &[1]),
        (&["--status", "queued"], &[]),
        (&["--since", "1h"], &[0, 1]),
        (
            &["--since", "2020-01-01T00:00:00Z", "--status", "rejected"],
            &[0],
        ),
        (&["--since", "2100-01-01T00:00:00Z"], &[]),
        (&["--client", "app"], &[]),
    ] {
        let command = store.tasks(["--output", "json"]);
        let finished = arguments.iter().fold(command, Command::argument).run();
        let expected: Vec<_> = indices
            .iter()
            .map(|index| listed["tasks"][index].clone())
            .collect();
        assert_eq!(lines(&finished), expected, "{arguments:?}");
    }
    for arguments in [
        ["--status", "done"],
        ["--since", "yesterday"],
        ["830", "--follow=1"],
        ["--output", "text"],
    ] {
        let finished = store.tasks(arguments).run();
        assert_eq!(finished.code, Some(2), "{finished:?}");
    }
    let finished = store.tasks(["830", "--status", "queued"]).run();
    assert_eq!(finished.code, Some(2), "{finished:?}");
}

#[test]
fn column_of_clients_is_there_if_they_have_names() {
    let store = Store::new();
    let token = "0123456789abcdef0123456789abcdef";
    let tokens = client_tokens(store.folder.path(), &format!("app:{token}"));
    let proxy = store.proxy_with(&[("access.client_tokens_file", &tokens)]);
    let token = format!("kling-proxy-token: {token}");
    proxy.send(request(&format!("POST {VIDEOS}"), &token, "{}"));
    let finished = store.tasks(["--client", "app"]).run();
    let heading = "age     status      model       units  took  client  id ";
    assert_has(stdout(&finished), &[heading, "app"]);
}

#[test]
fn reading_changes_no_file() {
    let store = Store::new();
    let reads = || {
        let kept = |files: BTreeSet<PathBuf>| {
            let log = files
                .into_iter()
                .filter(|file| !file.ends_with("tasks.db-shm"));
            log.map(|file| (fs::read(&file).unwrap(), file))
                .collect::<Vec<_>>()
        };
        let before = files(store.folder.path());
        let content = kept(before.clone());
        assert_has(stdout(&store.tasks([]).run()), &["830"]);
        let after = files(store.folder.path());
        assert_eq!(after, before);
        assert_eq!(kept(after), content);
        before.len()
    };
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "cat-1");
    assert_eq!(reads(), 3, "the file, its log and its index");
    // The process dies, so the log stays.
    proxy.signal(Signal::KILL);
    proxy.end();
    assert_eq!(reads(), 3);
    // The last process that writes takes the log away.
    let last = rusqlite::Connection::open(store.file()).unwrap();
    last.execute_batch("DELETE FROM task WHERE false").unwrap();
    last.close().unwrap();
    assert_eq!(reads(), 1);
}

#[test]
fn command_without_a_store_and_without_a_proxy_says_what_to_do() {
    let (_socket, nobody) = closed();
    let home = TempDir::new().unwrap();
    let home = home.path().to_str().unwrap();
    let missing = format!("sqlite:{home}/x/tasks.db");
    for (url, admin, reasons) in [
        ("auto", &*nobody, ["no proxy answers on", "Start a proxy"]),
        ("memory", &nobody, ["no proxy answers on", "state.url"]),
        ("memory", "off", ["admin.address is off", "state.url"]),
        (&missing, &nobody, ["/x/tasks.db", "a proxy makes it"]),
    ] {
        let command = Command::new(["tasks"]).env("HOME", home);
        let command = command.setting("admin.address", admin);
        let finished = command.setting("state.url", url).run();
        assert_eq!(finished.code, Some(1), "{finished:?}");
        assert_eq!(finished.stdout, "", "{finished:?}");
        assert_has(&finished.stderr, &reasons);
        assert_eq!(files(Path::new(home)), BTreeSet::new(), "{url}");
    }
}

#[test]
fn file_that_is_no_store_is_named() {
    let text = "this is a text and no SQLite file, as the first bytes show";
    let (_socket, nobody) = closed();
    let command = Command::new(["tasks"]);
    let file = command.file("x/tasks.db", text);
    let finished = command
        .setting("state.url", format!("sqlite:{}", file.display()))
        .run();
    assert_eq!(
        (finished.code, &*finished.stdout),
        (Some(1), ""),
        "{finished:?}"
    );
    assert_has(
        &finished.stderr,
        &["x/tasks.db is damaged, or is no SQLite file"],
    );
    // A proxy with `auto` goes on in memory, so it is asked.
    let command = Command::new(["tasks"]).setting("admin.address", nobody);
    command.file(".local/state/kling-proxy/tasks.db", text);
    let finished = command.run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(&finished.stderr, &["is damaged", "no proxy answers"]);
}

/// Returns the command for tasks in the memory of a proxy.
fn ask(admin: SocketAddr) -> Command {
    Command::new(["tasks"]).setting("admin.address", admin.to_string())
}

#[test]
fn running_proxy_is_asked_for_tasks_in_memory() {
    let store = Store::new();
    let proxy = Proxy::to(&store.upstream)
        .setting("state.url", "memory")
        .start();
    store.succeeds(&proxy, "830", "a cat/1");
    store.is_refused(&proxy);
    let admin = proxy.listener("admin");
    let listed = proxy.get("/_proxy/tasks").json();
    let json = ask(admin).argument("--output").argument("json").run();
    assert_eq!(Value::from(lines(&json)), listed["tasks"]);
    let table = ask(admin).argument("--status").argument("rejected").run();
    assert_has(stdout(&table), &["1102 resource_pack_depleted"]);
    assert_eq!(stdout(&table).lines().count(), 2);
    for id in ["830", "a cat/1"] {
        let one = ask(admin).argument(id).run();
        assert_has(stdout(&one), &["id           830", "external id  a cat/1"]);
    }
    let none = ask(admin).argument("832").run();
    assert_eq!(none.code, Some(1), "{none:?}");
    assert_has(&none.stderr, &["knows no task 832"]);
}

/// A page of the list has at most 500 tasks.
#[test]
fn all_pages_are_shown() {
    let store = Store::new();
    let proxy = store.proxy();
    store
        .upstream
        .answer(answer(200, &json!({ "task_id": "8" })));
    let mut client = proxy.connect();
    for _ in 0..501 {
        client
            .send(request(&format!("POST {VIDEOS}"), "", "{}"))
            .answer();
    }
    let admin = proxy.listener("admin");
    for command in [store.tasks([]), ask(admin)] {
        let json = command.argument("--output").argument("json").run();
        assert_eq!(lines(&json).len(), 501);
    }
}

#[test]
fn proxy_that_does_not_show_its_tasks_is_named_with_the_reason() {
    let folder = TempDir::new().unwrap();
    let tokens = client_tokens(folder.path(), "0123456789abcdef0123456789abcdef");
    for setting in [
        ("access.client_tokens_file", &*tokens),
        ("admin.address", "0.0.0.0:0"),
    ] {
        let (_upstream, proxy) = started_with(&[("state.url", "memory"), setting]);
        let admin = proxy.listener("admin");
        for command in [ask(admin), ask(admin).argument("8")] {
            let finished = command.run();
            assert_eq!(finished.code, Some(1), "{finished:?}");
            assert_has(
                &finished.stderr,
                &["does not show its tasks", "client tokens"],
            );
        }
    }
}

#[test]
fn proxy_is_asked_by_a_host_name_that_it_allows() {
    let (_upstream, proxy) = started_with(&[
        ("state.url", "memory"),
        ("access.allowed_hosts", r#"["kling-proxy"]"#),
    ]);
    let command = ask(proxy.listener("admin"));
    let finished = command
        .setting("access.allowed_hosts", r#"["kling-proxy"]"#)
        .run();
    assert_has(stdout(&finished), &["age"]);
}

#[test]
fn following_shows_each_change() {
    let store = Store::new();
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "cat-1");
    let memory = Store::new();
    let other = Proxy::to(&memory.upstream)
        .setting("state.url", "memory")
        .start();
    memory.succeeds(&other, "830", "cat-1");
    let admin = other.listener("admin");
    for (store, proxy, command) in [
        (
            &store,
            &proxy,
            store.tasks(["--follow", "--output", "json"]),
        ),
        (
            &memory,
            &other,
            ask(admin)
                .argument("--follow")
                .argument("--output")
                .argument("json"),
        ),
    ] {
        let following = command.begin();
        let shows = |id: &str, status: &str| {
            let found = following.stdout.find(|line| {
                let task: Value = serde_json::from_str(line).unwrap();
                task["id"] == id && task["status"] == status
            });
            assert!(found.is_some(), "{id} {status}");
        };
        shows("830", "succeeded");
        store
            .upstream
            .answer(answer(200, &json!({ "task_id": "831" })));
        proxy.post(VIDEOS, "{}");
        shows("831", "submitted");
        store.polls(proxy, "831", "processing", json!({}));
        shows("831", "processing");
        store
            .upstream
            .answer(answer(200, &json!({ "task_id": "832" })));
        proxy.post(VIDEOS, "{}");
        shows("832", "submitted");
        following.signal(Signal::INT);
        // Each change once.
        let lines = following.stdout.to_end();
        let different: BTreeSet<_> = lines.lines().collect();
        assert_eq!(lines.lines().count(), different.len(), "{lines}");
        let (_, log) = following.end();
        assert_eq!(log, "");
    }
}

#[test]
fn following_one_task_ends_with_it() {
    let store = Store::new();
    let proxy = store.proxy();
    store
        .upstream
        .answer(answer(200, &json!({ "task_id": "831" })));
    proxy.post(VIDEOS, "{}");
    let following = store.tasks(["831", "--follow"]).begin();
    assert!(
        following
            .stdout
            .find(|line| line.contains("submitted"))
            .is_some()
    );
    store.polls(&proxy, "831", "succeed", json!({}));
    assert!(
        following
            .stdout
            .find(|line| line.contains("succeeded"))
            .is_some()
    );
    assert_eq!(following.end(), (Some(0), String::new()));
}

/// The file is opened anew for each look.
#[test]
fn following_goes_on_when_a_proxy_starts() {
    let store = Store::new();
    let proxy = store.proxy();
    proxy.signal(Signal::TERM);
    proxy.end();
    let following = store.tasks(["--follow"]).begin();
    assert!(
        following
            .stdout
            .find(|line| line.starts_with("age"))
            .is_some()
    );
    let proxy = store.proxy();
    store.succeeds(&proxy, "830", "cat-1");
    assert!(following.stdout.find(|line| line.contains("830")).is_some());
    following.signal(Signal::INT);
    following.end();
}

//! The proxy remembers each create and its task, and shows them to the client that made them.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use serde_json::{Value, json};

use crate::support::{
    Command, Connection, Gate, Message, Proxy, Signal, Step, Upstream, eventually, get, kling,
    post, reply, request, send, started, started_with,
};

const VIDEOS: &str = "/v1/videos/text2video";

fn sandboxed() -> Command {
    Command::new(["serve", "--sandbox"]).setting("sandbox.task_time", "200ms")
}

/// Returns the one task that this id names.
fn task(proxy: &Proxy, id: &str) -> Value {
    let answer = proxy.get(&format!("/_proxy/tasks/{id}"));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()
}

fn tasks(proxy: &Proxy, query: &str) -> Vec<Value> {
    let answer = proxy.get(&format!("/_proxy/tasks?{query}"));
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["tasks"].as_array().unwrap().clone()
}

fn reference(answer: &Message) -> String {
    answer.header("kling-proxy-task").unwrap().to_owned()
}

fn created(id: &str) -> Vec<u8> {
    let body = json!({
        "code": 0, "message": "SUCCEED", "request_id": "u-1",
        "data": { "task_id": id, "task_status": "submitted" },
    });
    kling(200, body.to_string())
}

fn polled(data: &Value) -> Vec<u8> {
    let body = json!({ "code": 0, "message": "SUCCEED", "request_id": "u-2", "data": data });
    kling(200, body.to_string())
}

/// Starts a proxy whose tasks are in a file of this folder.
fn started_in(folder: &Path, upstream: &Upstream) -> Proxy {
    let file = folder.join("tasks.db");
    let command = Proxy::to(upstream).setting("state.url", format!("sqlite:{}", file.display()));
    command.start()
}

#[test]
fn task_is_shown_from_its_create_to_its_end() {
    let proxy = sandboxed().start();
    let body = json!({
        "model_name": "kling-v2-6", "prompt": "a cat", "mode": "pro", "external_task_id": "cat-1",
    });
    let answer = proxy.send(request(
        &format!("POST {VIDEOS}"),
        "x-request-id: mine",
        body.to_string(),
    ));
    let id = answer.json()["data"]["task_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let reference = reference(&answer);
    for name in [&*id, &*reference, "cat-1"] {
        let shown = task(&proxy, name);
        assert_eq!(shown["ref"], reference, "{name}");
        assert_eq!(shown["id"], id);
        assert_eq!(shown["external_id"], "cat-1");
        assert_eq!(shown["request_id"], "mine");
        assert_eq!(shown["path"], VIDEOS);
        assert_eq!(shown["model"], "kling-v2-6");
        assert!(shown["upstream_request_id"].is_string(), "{shown}");
        assert!(shown["sent_at"].is_string(), "{shown}");
    }
    eventually("the task ends", || {
        proxy.get(&format!("{VIDEOS}/{id}")).json()["data"]["task_status"] == "succeed"
    });
    eventually("the end is recorded", || {
        task(&proxy, &id)["status"] == "succeeded"
    });
    let ended = task(&proxy, &id);
    assert!(ended["ended_at"].is_string(), "{ended}");
    assert_eq!(ended["units"], "1");
    let result = &ended["results"][0];
    assert_eq!(result["kind"], "video");
    assert!(
        result["url"].as_str().unwrap().contains("/results/"),
        "{ended}"
    );
    assert!(result["expires_at"].is_string(), "{ended}");
    // Neither the prompt nor anything else of the body.
    assert!(!ended.to_string().contains("a cat"), "{ended}");
}

#[test]
fn list_brings_news_as_a_poll_does() {
    for list in [VIDEOS, "/v1/videos/text2video?pageNum=1&pageSize=30"] {
        let proxy = sandboxed().start();
        let answer = proxy.post(VIDEOS, r#"{"prompt":"a cat"}"#);
        let id = answer.json()["data"]["task_id"]
            .as_str()
            .unwrap()
            .to_owned();
        eventually("the task ends", || {
            proxy.get(list).json()["data"][0]["task_status"] == "succeed"
        });
        eventually("the end is recorded", || {
            task(&proxy, &id)["status"] == "succeeded"
        });
    }
}

#[test]
fn outcome_of_each_create_is_recorded() {
    let (upstream, proxy) = started();
    for (answer, status, code) in [
        (created("8"), "submitted", None),
        (
            kling(400, r#"{"code":1201,"message":"no"}"#),
            "rejected",
            Some(1201),
        ),
        (
            kling(429, r#"{"code":1102,"message":"no"}"#),
            "rejected",
            Some(1102),
        ),
        (reply(404, "", "nothing"), "rejected", Some(9103)),
        // Kling may have made a task before these.
        (
            kling(500, r#"{"code":5000,"message":"no"}"#),
            "unknown",
            None,
        ),
        (reply(502, "", "bad gateway"), "unknown", None),
        (
            kling(200, r#"{"code":7777,"message":"new"}"#),
            "unknown",
            None,
        ),
        (kling(200, r#"{"code":0,"data":{}}"#), "unknown", None),
        (reply(302, "location: /x", ""), "unknown", None),
        (
            reply(
                200,
                "content-type: application/json\ncontent-encoding: br",
                "??",
            ),
            "unknown",
            None,
        ),
    ] {
        let shown = String::from_utf8_lossy(&answer).into_owned();
        upstream.answer(answer);
        let answer = proxy.post(VIDEOS, r#"{"prompt":"a cat"}"#);
        let reference = reference(&answer);
        eventually("the outcome is recorded", || {
            task(&proxy, &reference)["status"] != "sending"
        });
        let task = task(&proxy, &reference);
        assert_eq!(task["status"], status, "{shown}");
        assert_eq!(task["error"]["code"].as_i64(), code, "{shown}");
        if let Some(code) = code {
            assert_eq!(
                task["error"]["type"],
                answer.json()["error"]["type"],
                "{code}"
            );
        }
    }
    assert_eq!(tasks(&proxy, "status=rejected").len(), 3);
    assert_eq!(tasks(&proxy, "status=unknown").len(), 6);
}

#[test]
fn create_is_stored_before_its_first_byte_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::ok();
    let gate = upstream.hold();
    let proxy = started_in(folder.path(), &upstream);
    let mut client = proxy.connect();
    client.send(request(
        &format!("POST {VIDEOS}"),
        "x-request-id: mine",
        "{}",
    ));
    upstream.wait(|seen| seen.requests.len() == 1);
    let sending = tasks(&proxy, "request_id=mine");
    assert_eq!(sending[0]["status"], "sending", "{sending:?}");
    // The process dies while the create is with Kling.
    proxy.signal(Signal::KILL);
    proxy.end();
    gate.open();
    let proxy = started_in(folder.path(), &upstream);
    assert_eq!(tasks(&proxy, "request_id=mine")[0]["status"], "sending");
    // The lease of a dead process ends after 15 s.
    eventually("the create is unknown", || {
        tasks(&proxy, "request_id=mine")[0]["status"] == "unknown"
    });
}

#[test]
fn create_that_was_never_sent_is_canceled_or_rejected() {
    // Nothing listens there.
    let proxy = Command::new(["serve"])
        .keys()
        .setting("upstream.url", "http://127.0.0.1:9");
    let proxy = proxy.setting("retry.attempts", "1").start();
    let answer = proxy.post(VIDEOS, "{}");
    assert_eq!(answer.refusal(), (502, 9101));
    let shown = task(&proxy, &reference(&answer));
    assert_eq!(
        (&shown["status"], &shown["error"]["code"]),
        (&json!("rejected"), &json!(9101))
    );

    let (upstream, proxy) = started_with(&[("retry.total_time", "30s")]);
    upstream.answer(kling(429, r#"{"code":1303,"message":"full"}"#));
    let mut client = proxy.connect();
    client.send(request(
        &format!("POST {VIDEOS}"),
        "x-request-id: left",
        "{}",
    ));
    upstream.wait(|seen| seen.requests.len() == 1);
    drop(client);
    eventually("the create is canceled", || {
        tasks(&proxy, "request_id=left")[0]["status"] == "canceled"
    });
}

#[test]
fn late_answer_gives_its_task_to_the_create() {
    let (upstream, proxy) = started_with(&[("upstream.response_timeout", "300ms")]);
    let gate = Gate::default();
    let held = gate.clone();
    upstream.script(move |_| vec![Step::Wait(held.clone()), send(created("8"))]);
    let answer = proxy.post(VIDEOS, "{}");
    assert_eq!(answer.refusal(), (504, 9102));
    let reference = reference(&answer);
    eventually("the outcome is recorded", || {
        task(&proxy, &reference)["status"] == "unknown"
    });
    gate.open();
    eventually("the task is recorded", || {
        task(&proxy, &reference)["status"] == "submitted"
    });
    assert_eq!(task(&proxy, "8")["ref"], reference);
}

#[test]
fn task_of_an_unknown_path_is_recorded_by_its_answer() {
    let (upstream, proxy) = started();
    upstream.answer(created("8"));
    let answer = proxy.post("/v1/videos/new-kind", "{}");
    assert_eq!(answer.header("kling-proxy-task"), None);
    eventually("the task is recorded", || tasks(&proxy, "").len() == 1);
    assert_eq!(task(&proxy, "8")["path"], "/v1/videos/new-kind");
    // A create of a voice that is refused, or a call that answers at once, is no task.
    upstream.answer(kling(200, r#"{"code":0,"data":{"sessions":[]}}"#));
    proxy.post("/v1/videos/identify-face", "{}");
    upstream.answer(kling(400, r#"{"code":1201,"message":"no"}"#));
    proxy.post("/v1/videos/new-kind", "{}");
    assert_eq!(tasks(&proxy, "").len(), 1);
}

#[test]
fn news_out_of_order_never_leads_back() {
    let (upstream, proxy) = started();
    upstream.answer(created("8"));
    proxy.post(VIDEOS, "{}");
    for (data, status) in [
        (
            json!({ "task_id": "8", "task_status": "processing" }),
            "processing",
        ),
        (
            json!({ "task_id": "8", "task_status": "submitted" }),
            "processing",
        ),
        (
            json!({ "task_id": "8", "task_status": "failed", "task_status_msg": "risk" }),
            "failed",
        ),
        (
            json!({ "task_id": "8", "task_status": "succeed" }),
            "failed",
        ),
    ] {
        upstream.answer(polled(&data));
        proxy.get(&format!("{VIDEOS}/8"));
        eventually("the news is recorded", || {
            task(&proxy, "8")["status"] == status
        });
    }
    assert_eq!(task(&proxy, "8")["error"], json!({ "message": "risk" }));
}

#[test]
fn answer_to_a_poll_passes_byte_for_byte() {
    let (upstream, proxy) = started();
    upstream.answer(created("8"));
    proxy.post(VIDEOS, "{}");
    let body = r#" {"code" : 0, "data":{"task_id":"8", "task_status":"processing","x":1.50}}  "#;
    upstream.answer(kling(200, body));
    assert_eq!(proxy.get(&format!("{VIDEOS}/8")).text(), body);
}

#[test]
fn client_sees_its_own_tasks_only() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = "ann:ann-0123456789abcdef\nbob:bob-0123456789abcdef\n";
    let file = command.file("tokens", tokens);
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    upstream.answer(created("8"));
    let ask = |client: &str, line: &str| {
        let token = format!("kling-proxy-token: {client}-0123456789abcdef");
        proxy.send(request(line, &token, ""))
    };
    let made = ask("ann", &format!("POST {VIDEOS}"));
    let reference = reference(&made);
    for id in ["8", &reference] {
        assert_eq!(
            ask("ann", &format!("GET /_proxy/tasks/{id}")).json()["client"],
            "ann"
        );
        for method in ["GET", "DELETE"] {
            let hidden = ask("bob", &format!("{method} /_proxy/tasks/{id}"));
            assert_eq!(hidden.refusal(), (404, 9007), "{method} {id}");
        }
    }
    for (client, query, count) in [
        ("ann", "", 1),
        ("ann", "client=ann", 1),
        ("ann", "client=bob", 0),
        ("bob", "", 0),
        ("bob", "client=ann", 0),
        ("bob", "status=submitted", 0),
    ] {
        let list = ask(client, &format!("GET /_proxy/tasks?{query}")).json();
        assert_eq!(
            list["tasks"].as_array().unwrap().len(),
            count,
            "{client} {query}"
        );
    }
    let stranger = proxy.get("/_proxy/tasks");
    assert_eq!(stranger.refusal(), (401, 9003));
}

#[test]
fn list_is_asked_for_in_the_right_way() {
    let (upstream, proxy) = started();
    upstream.answer(created("8"));
    for _ in 0..5 {
        proxy.post(VIDEOS, "{}");
    }
    let first = proxy.get("/_proxy/tasks?limit=2").json();
    let cursor = first["next_cursor"].as_str().unwrap();
    let second = proxy
        .get(&format!("/_proxy/tasks?limit=3&cursor={cursor}"))
        .json();
    assert_eq!(second["next_cursor"], Value::Null);
    let both = [&first, &second].map(|page| page["tasks"].as_array().unwrap().clone());
    let refs: Vec<_> = both
        .concat()
        .iter()
        .map(|task| task["ref"].clone())
        .collect();
    assert_eq!(refs.len(), 5);
    assert!(
        (1..5).all(|index| !refs[..index].contains(&refs[index])),
        "{refs:?}"
    );
    for (line, refusal) in [
        ("GET /_proxy/tasks?status=done", (400, 9000)),
        ("GET /_proxy/tasks?since=x", (400, 9000)),
        ("GET /_proxy/tasks/nobody", (404, 9007)),
        ("GET /_proxy/taskss", (404, 9007)),
        ("POST /_proxy/tasks", (405, 9005)),
        ("DELETE /_proxy/tasks/8", (409, 9404)),
    ] {
        let answer = proxy.send(request(line, "", ""));
        assert_eq!(answer.refusal(), refusal, "{line}");
    }
    let refused = proxy.send(request(
        "GET /_proxy/tasks",
        "origin: https://evil.test",
        "",
    ));
    assert_eq!(refused.refusal(), (403, 9002));
    let refused = proxy.send("GET /_proxy/tasks HTTP/1.1\r\nhost: evil.test\r\n\r\n");
    assert_eq!(refused.refusal(), (421, 9001));
}

#[test]
fn file_is_closed_to_others_and_holds_nothing_secret() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::ok();
    let proxy = started_in(folder.path(), &upstream);
    let body = json!({
        "model_name": "canary in a model", "prompt": "canary", "image": "canary", "mode": ["canary"],
        "callback_url": "https://canary.test/", "n": { "canary": 1 },
    });
    let headers = "idempotency-key: canary\nauthorization: Bearer canary\ncookie: canary";
    let made = proxy.send(request(
        &format!("POST {VIDEOS}?canary=1"),
        headers,
        body.to_string(),
    ));
    task(&proxy, &reference(&made));
    let mut files = 0;
    for entry in fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        files += 1;
        let bits = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(bits, 0o600, "{entry:?}");
        let content = fs::read(entry.path()).unwrap();
        let text = String::from_utf8_lossy(&content);
        assert!(!text.contains("canary"), "{entry:?}");
        assert!(!text.contains(crate::support::SECRET_KEY), "{entry:?}");
    }
    assert_eq!(files, 3, "the file, its log and its index");
}

#[test]
fn named_file_that_cannot_be_opened_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.db");
    fs::write(
        &broken,
        "this is a text and no SQLite file, as the first bytes show",
    )
    .unwrap();
    for (file, reason) in [
        (broken, "is damaged, or is no SQLite file"),
        (Path::new("/proc/tasks.db").to_owned(), "cannot be opened"),
    ] {
        let url = format!("sqlite:{}", file.display());
        let finished = Command::new(["serve"])
            .keys()
            .setting("state.url", &url)
            .run();
        assert_eq!(finished.code, Some(78), "{}", finished.stderr);
        assert!(finished.stderr.contains("state.url"), "{}", finished.stderr);
        assert!(finished.stderr.contains(reason), "{}", finished.stderr);
    }
}

#[test]
fn store_in_memory_takes_the_place_of_a_state_folder_that_cannot_be_used() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let home = command.home();
    fs::create_dir_all(home.join(".local")).unwrap();
    fs::write(home.join(".local/state"), "a file, and no folder").unwrap();
    let proxy = command.start();
    let warning = proxy.stderr.find(|line| line.contains("state.url"));
    assert!(warning.unwrap().contains("in memory only"));
    proxy.post(VIDEOS, "{}");
    assert_eq!(tasks(&proxy, "").len(), 1);
}

#[test]
fn store_that_fails_stops_no_request_and_is_written_later() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::ok();
    let proxy = started_in(folder.path(), &upstream);
    proxy.post(VIDEOS, "{}");
    assert_eq!(state_up(&proxy), "1");
    // Another process holds the lock of the file.
    let other = locked(&folder.path().join("tasks.db"));
    upstream.answer(created("8"));
    let mut client = proxy.connect();
    for _ in 0..3 {
        let answer = client.send(post(VIDEOS, "{}")).answer();
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(
        client.send(get(&format!("{VIDEOS}/8"))).answer().status(),
        200
    );
    let warning = proxy
        .stderr
        .find(|line| line.contains("the store of tasks fails"));
    assert!(warning.is_some());
    assert_eq!(state_up(&proxy), "0");
    drop(other);
    eventually("the store is written", || state_up(&proxy) == "1");
    eventually("all creates are recorded", || tasks(&proxy, "").len() == 4);
}

fn state_up(proxy: &Proxy) -> String {
    proxy.metric("kling_proxy_state_up").to_string()
}

/// Locks a store as a process that writes to it does, until it is dropped.
fn locked(file: &Path) -> rusqlite::Connection {
    let connection = rusqlite::Connection::open(file).unwrap();
    connection.execute_batch("BEGIN IMMEDIATE").unwrap();
    connection
}

#[test]
fn processes_on_one_file_see_each_others_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::ok();
    let [first, second] = [(); 2].map(|()| started_in(folder.path(), &upstream));
    upstream.answer(created("8"));
    let made = first.post(VIDEOS, "{}");
    let reference = reference(&made);
    eventually("the other process knows the task", || {
        second.get(&format!("/_proxy/tasks/{reference}")).status() == 200
    });
    // A poll through one process is news for both.
    upstream.answer(polled(
        &json!({ "task_id": "8", "task_status": "processing" }),
    ));
    eventually("the poll is recorded", || {
        second.get(&format!("{VIDEOS}/8"));
        task(&first, "8")["status"] == "processing"
    });
}

#[test]
fn end_of_the_process_writes_what_waits() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = Upstream::ok();
    let proxy = started_in(folder.path(), &upstream);
    upstream.answer(created("8"));
    let mut clients: Vec<Connection> = (0..20).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(post(VIDEOS, "{}"));
    }
    for client in &mut clients {
        assert_eq!(client.answer().status(), 200);
    }
    drop(clients);
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
    let files = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 1, "only the store itself is left");
    let proxy = started_in(folder.path(), &upstream);
    assert_eq!(tasks(&proxy, "status=submitted").len(), 20);
}

/// The milliseconds since 1970, as Kling writes times.
fn milliseconds() -> u64 {
    crate::support::now() * 1000
}

/// An upstream that loses the answers to creates, and answers look-ups with `data`.
fn loses_answers(upstream: &Upstream, failure: Vec<u8>, data: Value) {
    upstream.script(move |message| {
        vec![match message.method() {
            // Without an answer, the connection breaks.
            "POST" if failure.is_empty() => Step::Close,
            "POST" => send(&failure),
            _ => send(polled(&data)),
        }]
    });
}

fn named(id: &str, created_at: u64) -> Value {
    json!({
        "task_id": "8", "task_status": "processing", "task_info": { "external_task_id": id },
        "created_at": created_at, "updated_at": created_at,
    })
}

#[test]
fn create_whose_answer_was_lost_is_answered_with_its_task() {
    for failure in [
        reply(502, "", "bad gateway"),
        kling(500, r#"{"code":5000,"message":"no"}"#),
        kling(504, r#"{"code":5002,"message":"no"}"#),
        // The connection breaks.
        Vec::new(),
    ] {
        let (upstream, proxy) = started();
        loses_answers(&upstream, failure, named("mine", milliseconds()));
        let made = proxy.post(VIDEOS, r#"{"prompt":"a cat","external_task_id":"mine"}"#);
        assert_eq!(made.status(), 200, "{}", made.text());
        let answer = made.json();
        assert_eq!(answer["code"], 0);
        assert_eq!(answer["data"]["task_id"], "8");
        assert_eq!(answer["data"]["task_info"]["external_task_id"], "mine");
        let lines = upstream.first_lines();
        assert_eq!(
            lines.iter().filter(|line| line.starts_with("POST")).count(),
            1
        );
        assert!(
            lines.contains(&format!("GET {VIDEOS}/mine HTTP/1.1")),
            "{lines:?}"
        );
        assert_eq!(task(&proxy, "8")["ref"], reference(&made));
        assert_eq!(task(&proxy, "8")["status"], "processing");
    }
}

#[test]
fn create_that_cannot_be_found_gets_the_first_failure() {
    let hour = 3_600_000;
    for (body, data, looks) in [
        (r#"{"external_task_id":"mine"}"#, json!(null), true),
        (
            r#"{"external_task_id":"mine"}"#,
            named("other", milliseconds()),
            true,
        ),
        // The id was taken before: this is the task of another create.
        (
            r#"{"external_task_id":"mine"}"#,
            named("mine", milliseconds() - hour),
            true,
        ),
        ("{}", named("mine", milliseconds()), false),
        (
            r#"{"external_task_id":"../../account/costs"}"#,
            json!(null),
            false,
        ),
    ] {
        let (upstream, proxy) = started();
        loses_answers(&upstream, reply(502, "", "bad gateway"), data);
        let made = proxy.post(VIDEOS, body);
        assert_eq!(made.refusal(), (502, 9103), "{body}");
        let reads = upstream.first_lines();
        let reads = reads.iter().filter(|line| line.starts_with("GET")).count();
        assert_eq!(reads > 0, looks, "{body}");
        assert_eq!(task(&proxy, &reference(&made))["status"], "unknown");
    }
}

#[test]
fn task_of_another_create_is_not_taken_over() {
    let (upstream, proxy) = started();
    upstream.answer(created("8"));
    let first = proxy.post(VIDEOS, r#"{"external_task_id":"mine"}"#);
    loses_answers(
        &upstream,
        reply(502, "", "bad gateway"),
        named("mine", milliseconds()),
    );
    let second = proxy.post(VIDEOS, r#"{"external_task_id":"mine"}"#);
    assert_eq!(second.refusal(), (502, 9103));
    assert_eq!(task(&proxy, "8")["ref"], reference(&first));
    assert_eq!(task(&proxy, &reference(&second))["status"], "unknown");
}

#[test]
fn sandbox_that_loses_an_answer_is_asked_for_the_task() {
    let proxy = sandboxed().start();
    let body = r#"{"prompt":"sandbox:lost","external_task_id":"mine"}"#;
    let made = proxy.post(VIDEOS, body);
    assert_eq!(made.status(), 200, "{}", made.text());
    let id = made.json()["data"]["task_id"].as_str().unwrap().to_owned();
    assert_eq!(task(&proxy, &id)["external_id"], "mine");
}

#[test]
fn task_that_was_made_without_the_proxy_is_searched_upstream() {
    let (upstream, proxy) = started();
    upstream.script(|message| {
        let found = message.target() == "/v1/images/generations/8";
        let data = json!({
            "task_id": "8", "task_status": "succeed", "created_at": 1_800_000_000_000_u64,
            "task_result": { "images": [{ "index": 0, "url": "https://a.test/i.png" }] },
        });
        vec![send(if found {
            polled(&data)
        } else {
            kling(400, r#"{"code":1201,"message":"Task not found"}"#)
        })]
    });
    let found = task(&proxy, "8");
    assert_eq!(found["status"], "succeeded");
    assert_eq!(found["path"], "/v1/images/generations");
    assert_eq!(found["created_at"], "2027-01-15T08:00:00Z");
    assert_eq!(found["results"][0]["url"], "https://a.test/i.png");
    let asked = upstream.first_lines().len();
    assert_eq!(task(&proxy, "8"), found);
    assert_eq!(
        upstream.first_lines().len(),
        asked,
        "the store knows it now"
    );
    for _ in 0..3 {
        assert_eq!(proxy.get("/_proxy/tasks/9").refusal(), (404, 9007));
    }
    assert!(
        upstream.first_lines().len() <= asked + 8,
        "a miss is remembered"
    );
}

#[test]
fn client_with_a_token_cannot_search_upstream() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let file = command.file("tokens", "ann:ann-0123456789abcdef\n");
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    let token = "kling-proxy-token: ann-0123456789abcdef";
    let hidden = proxy.send(request("GET /_proxy/tasks/829836802793406551", token, ""));
    assert_eq!(hidden.refusal(), (404, 9007));
    assert_eq!(upstream.first_lines().len(), 0);
}

#[test]
fn poll_or_list_that_shows_the_task_settles_an_unknown_create() {
    for read in [format!("{VIDEOS}/mine"), VIDEOS.to_owned()] {
        let (upstream, proxy) = started();
        loses_answers(&upstream, reply(502, "", "bad gateway"), json!(null));
        let made = proxy.post(VIDEOS, r#"{"external_task_id":"mine"}"#);
        let reference = reference(&made);
        assert_eq!(task(&proxy, &reference)["status"], "unknown");
        // The task of somebody else, who took the external id an hour before.
        let data = |created_at| {
            let data = named("mine", created_at);
            if read == VIDEOS { json!([data]) } else { data }
        };
        upstream.answer(polled(&data(milliseconds() - 3_600_000)));
        proxy.get(&read);
        assert_eq!(task(&proxy, &reference)["status"], "unknown", "{read}");
        upstream.answer(polled(&data(milliseconds())));
        proxy.get(&read);
        assert_eq!(task(&proxy, &reference)["status"], "processing", "{read}");
        assert_eq!(task(&proxy, "8")["ref"], reference);
    }
}

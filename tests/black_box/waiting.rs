//! Requests that wait for the end of a task, and streams of events about tasks.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Command, Connection, Gate, Message, Proxy, Signal, Step, Upstream, eventually, get, kling,
    post, request, send, started, started_with,
};

const VIDEOS: &str = "/v1/videos/text2video";

fn sandboxed(task_time: &str) -> Proxy {
    let command = Command::new(["serve", "--sandbox"]);
    command.setting("sandbox.task_time", task_time).start()
}

fn answer(data: &Value) -> Vec<u8> {
    let body = json!({ "code": 0, "message": "SUCCEED", "request_id": "u", "data": data });
    kling(200, body.to_string())
}

/// An upstream that makes task 8, and answers polls with `poll`.
fn makes_a_task(upstream: &Upstream, poll: impl Fn(usize) -> Vec<u8> + Send + Sync + 'static) {
    let polls = std::sync::atomic::AtomicUsize::new(0);
    upstream.script(move |message| {
        vec![send(if message.method() == "POST" {
            answer(&json!({ "task_id": "8", "task_status": "submitted" }))
        } else {
            poll(polls.fetch_add(1, std::sync::atomic::Ordering::SeqCst))
        })]
    });
}

fn state(word: &str) -> Vec<u8> {
    answer(&json!({ "task_id": "8", "task_status": word }))
}

fn create(wait: u32) -> Vec<u8> {
    let prefer = format!("prefer: wait={wait}");
    request(&format!("POST {VIDEOS}"), &prefer, r#"{"prompt":"a cat"}"#)
}

fn polls(upstream: &Upstream) -> usize {
    let lines = upstream.first_lines();
    lines.iter().filter(|line| line.starts_with("GET")).count()
}

/// Returns the number of requests that wait.
fn waiting(proxy: &Proxy) -> String {
    proxy.metric("kling_proxy_requests_waiting").to_string()
}

#[test]
fn create_that_waits_is_answered_with_its_result() {
    let proxy = sandboxed("500ms");
    for (prompt, status) in [("a cat", "succeed"), ("sandbox:failed", "failed")] {
        let body = json!({ "prompt": prompt }).to_string();
        let made = proxy.send(request(&format!("POST {VIDEOS}"), "prefer: wait=30", body));
        assert_eq!(made.status(), 200, "{}", made.text());
        assert_eq!(made.json()["data"]["task_status"], status);
        assert_eq!(made.header("preference-applied"), Some("wait=30"));
        assert!(made.values("vary").contains(&"Prefer"), "{made:?}");
        assert!(made.header("kling-proxy-task").is_some());
    }
}

#[test]
fn create_of_the_new_standard_is_answered_as_its_query_is() {
    let (upstream, proxy) = started();
    upstream.script(|message| {
        vec![send(if message.method() == "POST" {
            answer(&json!({ "id": "8", "status": "submitted" }))
        } else {
            assert_eq!(message.target(), "/tasks?task_ids=8");
            answer(&json!([{ "id": "8", "status": "succeeded" }]))
        })]
    });
    let made = proxy.send(request(
        "POST /text-to-video/kling-3.0",
        "prefer: wait=30",
        "{}",
    ));
    assert_eq!(
        made.json()["data"][0]["status"],
        "succeeded",
        "{}",
        made.text()
    );
}

#[test]
fn create_is_never_an_error_once_its_task_exists() {
    for poll in [
        state("processing"),
        kling(
            400,
            r#"{"code":1201,"message":"Task not found by id/external id: 8"}"#,
        ),
        kling(500, r#"{"code":5000,"message":"no"}"#),
        b"no HTTP at all\r\n\r\n".to_vec(),
    ] {
        let (upstream, proxy) = started();
        makes_a_task(&upstream, move |_| poll.clone());
        let made = proxy.send(create(3));
        assert_eq!(made.status(), 200, "{}", made.text());
        assert_eq!(
            made.json()["data"]["task_status"],
            "submitted",
            "{}",
            made.text()
        );
        assert_eq!(made.header("preference-applied"), Some("wait=3"));
    }
}

#[test]
fn refused_create_does_not_wait() {
    let (upstream, proxy) = started();
    upstream.answer(kling(429, r#"{"code":1102,"message":"no"}"#));
    assert_eq!(proxy.send(create(3600)).refusal(), (429, 1102));
    upstream.answer(answer(&json!({})));
    let made = proxy.send(create(3600));
    assert_eq!(
        (made.status(), made.header("preference-applied")),
        (200, Some("wait=3600"))
    );
    assert_eq!(polls(&upstream), 0);
}

#[test]
fn drain_answers_those_who_wait() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |_| state("processing"));
    let mut clients = [create(3600), wait_for_8(3600)].map(|bytes| {
        let mut client = proxy.connect();
        client.send(bytes);
        client
    });
    eventually("both wait", || waiting(&proxy) == "2");
    upstream.wait(|seen| seen.requests.len() >= 2);
    proxy.signal(Signal::TERM);
    let [made, read] = clients.each_mut().map(Connection::answer);
    assert_eq!(
        made.json()["data"]["task_status"],
        "submitted",
        "{}",
        made.text()
    );
    assert_eq!(
        read.json()["data"]["task_status"],
        "processing",
        "{}",
        read.text()
    );
    assert_eq!(proxy.end().0, Some(0));
}

fn wait_for_8(wait: u32) -> Vec<u8> {
    let prefer = format!("prefer: wait={wait}\ncookie: canary");
    request(&format!("GET {VIDEOS}/8"), &prefer, "")
}

#[test]
fn read_is_answered_with_upstreams_latest_byte_for_byte() {
    let (upstream, proxy) = started();
    let body = r#" {"code":0, "data":{"task_id":"8" , "task_status":"processing", "x":1.50} } "#;
    makes_a_task(&upstream, move |_| kling(200, body));
    let read = proxy.send(wait_for_8(1));
    assert_eq!((read.status(), read.text()), (200, body));
    assert_eq!(read.header("preference-applied"), Some("wait=1"));
    // The poll is the proxy's own request.
    let poll = upstream.last();
    assert_eq!((poll.header("cookie"), poll.header("prefer")), (None, None));
    assert!(
        poll.header("user-agent")
            .unwrap()
            .starts_with("kling-proxy/")
    );

    makes_a_task(&upstream, |poll| {
        state(if poll == 0 { "processing" } else { "succeed" })
    });
    let read = proxy.send(wait_for_8(30));
    assert_eq!(read.json()["data"]["task_status"], "succeed");
    upstream.answer(kling(400, r#"{"code":1201,"message":"Task not found"}"#));
    assert_eq!(proxy.send(wait_for_8(30)).refusal(), (400, 1201));
}

#[test]
fn task_is_waited_for_by_its_reference() {
    let proxy = sandboxed("1s");
    let made = proxy.post(VIDEOS, r#"{"prompt":"a cat"}"#);
    let reference = made.header("kling-proxy-task").unwrap();
    let line = format!("GET /_proxy/tasks/{reference}");
    let ended = proxy.send(request(&line, "prefer: wait=30", ""));
    assert_eq!(ended.json()["status"], "succeeded", "{}", ended.text());
    assert_eq!(ended.header("preference-applied"), Some("wait=30"));
    let again = proxy.send(request(&line, "prefer: wait=3600", ""));
    assert_eq!(again.json()["status"], "succeeded");
}

#[test]
fn upstream_is_asked_once_for_all_who_wait() {
    let (upstream, proxy) = started();
    let gate = Gate::default();
    let held = gate.clone();
    upstream.script(move |message| {
        let word = if message.method() == "POST" {
            "submitted"
        } else {
            "succeed"
        };
        vec![Step::Wait(held.clone()), send(state(word))]
    });
    let mut clients: Vec<_> = (0..50).map(|_| proxy.connect()).collect();
    for client in &mut clients {
        client.send(wait_for_8(60));
    }
    eventually("all wait", || waiting(&proxy) == "50");
    gate.open();
    for client in &mut clients {
        assert_eq!(client.answer().json()["data"]["task_status"], "succeed");
    }
    assert_eq!(polls(&upstream), 1);
    assert_eq!(waiting(&proxy), "0");
}

#[test]
fn poll_ends_when_the_last_client_has_left() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |_| state("processing"));
    let mut client = proxy.connect();
    client.send(wait_for_8(3600));
    eventually("the client waits", || waiting(&proxy) == "1");
    upstream.wait(|seen| !seen.requests.is_empty());
    drop(client);
    eventually("the client has left", || waiting(&proxy) == "0");
    let before = polls(&upstream);
    // Longer than the time between two polls. One may have been under way.
    std::thread::sleep(Duration::from_secs(5));
    assert!(polls(&upstream) <= before + 1);
}

#[test]
fn those_who_wait_leave_room_for_others() {
    let settings = [("limits.in_flight", "4"), ("state.waiting", "6")];
    let (upstream, proxy) = started_with(&settings);
    makes_a_task(&upstream, |_| state("processing"));
    let mut clients: Vec<_> = (0..6).map(|_| proxy.connect()).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        client.send(wait_for_8(3600));
        eventually("one more waits", || {
            waiting(&proxy) == (index + 1).to_string()
        });
    }
    // There is no further place: this one is answered at once.
    let read = proxy.send(wait_for_8(3600));
    assert_eq!(read.json()["data"]["task_status"], "processing");
    let made = proxy.send(create(3600));
    assert_eq!(made.json()["data"]["task_status"], "submitted");
    assert_eq!(proxy.get("/_proxy/events").refusal(), (503, 9301));
}

#[test]
fn preference_that_is_not_understood_is_ignored() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |_| state("processing"));
    for prefer in ["wait=0", "wait=x", "wait=3601", "respond-async"] {
        let line = format!("GET {VIDEOS}/8");
        let read = proxy.send(request(&line, &format!("prefer: {prefer}"), ""));
        assert_eq!(read.status(), 200);
        assert_eq!(read.header("preference-applied"), None, "{prefer}");
    }
    // A list has no end to wait for.
    let read = proxy.send(request(&format!("GET {VIDEOS}"), "prefer: wait=3600", ""));
    assert_eq!(
        (read.status(), read.header("preference-applied")),
        (200, None)
    );
}

/// A stream of events.
struct Events {
    connection: Connection,
    text: String,
}

#[derive(Debug, PartialEq)]
struct Event {
    name: String,
    id: Option<String>,
    data: Value,
}

impl Events {
    fn of(proxy: &Proxy, query: &str, headers: &str) -> Self {
        let mut connection = proxy.connect();
        connection.send(request(&format!("GET /_proxy/events{query}"), headers, ""));
        let head = connection.head();
        assert_eq!(head.status(), 200);
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        Self {
            connection,
            text: String::new(),
        }
    }

    fn resumed(proxy: &Proxy, id: &str) -> Self {
        Self::of(proxy, "", &format!("last-event-id: {id}"))
    }

    /// Returns the next event; `None` at the end of the stream.
    fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field = |name: &str| {
                    let prefix = format!("{name}:");
                    let line = event.lines().find_map(|line| line.strip_prefix(&prefix));
                    line.map(|value| value.trim_start().to_owned())
                };
                let event = field("event").map(|name| Event {
                    name,
                    id: field("id"),
                    data: field("data")
                        .and_then(|data| serde_json::from_str(&data).ok())
                        .unwrap_or_default(),
                });
                self.text = rest.to_owned();
                if event.is_some() {
                    return event;
                }
                continue;
            }
            let chunk = self.connection.chunk()?;
            self.text.push_str(str::from_utf8(&chunk).unwrap());
        }
    }
}

#[test]
fn events_tell_each_change_of_a_task() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |poll| {
        state(["processing", "succeed"][poll.min(1)])
    });
    let mut events = Events::of(&proxy, "", "");
    proxy.post(VIDEOS, "{}");
    let mut states = Vec::new();
    let mut ids = Vec::new();
    while states.last() != Some(&json!("succeeded")) {
        let event = events.next().unwrap();
        assert_eq!(event.name, "task");
        ids.push(event.id.unwrap().parse::<u64>().unwrap());
        states.push(event.data["status"].clone());
        if ["submitted", "processing"]
            .map(Value::from)
            .contains(&event.data["status"])
        {
            proxy.get(&format!("{VIDEOS}/8"));
        }
    }
    // Two changes at the same moment may be one event.
    let all = ["sending", "submitted", "processing", "succeeded"].map(Value::from);
    states.retain(|state| *state != all[0]);
    assert_eq!(states, all[1..]);
    assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{ids:?}");
    // The stream ends with the proxy, and does not delay its end.
    proxy.signal(Signal::TERM);
    assert_eq!(events.next(), None);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn events_of_one_task_begin_with_it_and_end_with_its_end() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |_| state("succeed"));
    proxy.post(VIDEOS, "{}");
    proxy.post("/v1/videos/effects", "{}");
    let mut events = Events::of(&proxy, "?task=8", "");
    let first = events.next().unwrap();
    assert_eq!(first.data["status"], "submitted");
    proxy.get(&format!("{VIDEOS}/8"));
    let last = events.next().unwrap();
    assert_eq!(
        (&last.data["ref"], &last.data["status"]),
        (&first.data["ref"], &json!("succeeded"))
    );
    assert_eq!(events.next(), None);
    let mut ended = Events::of(&proxy, "?task=8", "");
    assert_eq!(ended.next().unwrap(), last);
    assert_eq!(ended.next(), None);
    assert_eq!(
        proxy.get("/_proxy/events?task=nobody").refusal(),
        (404, 9007)
    );
}

#[test]
fn client_that_reconnects_misses_no_change() {
    let proxy = sandboxed("100ms");
    let mut events = Events::of(&proxy, "", "");
    let address = proxy.address;
    let load = std::thread::spawn(move || {
        let mut client = Connection::to(address);
        for _ in 0..60 {
            let made = client.send(post(VIDEOS, r#"{"prompt":"a cat"}"#)).answer();
            if made.status() == 200 {
                let id = made.json()["data"]["task_id"].as_str().unwrap().to_owned();
                let path = format!("{VIDEOS}/{id}");
                eventually("the task ends", || {
                    client.send(get(&path)).answer().json()["data"]["task_status"] == "succeed"
                });
            }
        }
    });
    let mut seen = std::collections::BTreeMap::new();
    let mut last = String::new();
    let ended = |seen: &std::collections::BTreeMap<String, String>| {
        seen.values()
            .filter(|status| *status == "succeeded")
            .count()
    };
    while ended(&seen) < 60 {
        let event = events.next().unwrap();
        let field = |name: &str| event.data[name].as_str().unwrap().to_owned();
        seen.insert(field("ref"), field("status"));
        last = event.id.unwrap();
        // It hangs up after each event.
        events = Events::resumed(&proxy, &last);
    }
    load.join().unwrap();
    assert!(!last.is_empty());
}

#[test]
fn number_of_another_store_resets_the_stream() {
    let (upstream, proxy) = started();
    makes_a_task(&upstream, |_| state("processing"));
    for id in ["999999", "x", "-1"] {
        let mut events = Events::resumed(&proxy, id);
        assert_eq!(events.next().unwrap().name, "reset", "{id}");
        proxy.post(VIDEOS, "{}");
        assert_eq!(events.next().unwrap().name, "task", "{id}");
    }
}

#[test]
fn client_gets_events_of_its_own_tasks_only() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = "ann:ann-0123456789abcdef\nbob:bob-0123456789abcdef\n";
    let file = command.file("tokens", tokens);
    let proxy = command
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .start();
    makes_a_task(&upstream, |_| state("processing"));
    let token = |client: &str| format!("kling-proxy-token: {client}-0123456789abcdef");
    let make = |client: &str| -> Message {
        proxy.send(request(&format!("POST {VIDEOS}"), &token(client), "{}"))
    };
    let mut events = Events::of(&proxy, "", &token("ann"));
    let bobs = make("bob").header("kling-proxy-task").unwrap().to_owned();
    let anns = make("ann").header("kling-proxy-task").unwrap().to_owned();
    assert_eq!(events.next().unwrap().data["ref"], anns);
    let line = format!("GET /_proxy/events?task={bobs}");
    assert_eq!(
        proxy.send(request(&line, &token("ann"), "")).refusal(),
        (404, 9007)
    );
    let line = format!("GET /_proxy/tasks/{bobs}");
    let headers = format!("{}\nprefer: wait=3600", token("ann"));
    assert_eq!(
        proxy.send(request(&line, &headers, "")).refusal(),
        (404, 9007)
    );
}

/// A proxy whose watcher asks for what no client asks for.
fn watched(upstream: &Upstream) -> Proxy {
    Proxy::to(upstream).setting("state.watch", "true").start()
}

#[test]
fn task_that_no_client_asks_for_is_watched() {
    let upstream = Upstream::ok();
    makes_a_task(&upstream, |_| state("succeed"));
    let proxy = watched(&upstream);
    let made = proxy.post(VIDEOS, r#"{"prompt":"a cat"}"#);
    let path = format!("/_proxy/tasks/{}", made.header("kling-proxy-task").unwrap());
    eventually("the watcher learns the end", || {
        proxy.get(&path).json()["status"] == "succeeded"
    });
    assert!(
        upstream
            .first_lines()
            .contains(&format!("GET {VIDEOS}/8 HTTP/1.1"))
    );
}

#[test]
fn packs_of_the_account_become_metrics_after_the_first_create() {
    let upstream = Upstream::ok();
    upstream.script(|message| {
        vec![send(if message.target().starts_with("/account/costs?") {
            answer(&json!({ "code": 0, "resource_pack_subscribe_infos": [{
                "resource_pack_name": "Trial-Video-100Units-5Con-1Months", "status": "online",
                "total_quantity": 100.0, "remaining_quantity": 5.0, "invalid_time": 1_900_000_000_000_u64,
            }] }))
        } else {
            state("processing")
        })]
    });
    let proxy = watched(&upstream);
    proxy.get(&format!("{VIDEOS}/8"));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(
        polls(&upstream),
        1,
        "nothing is asked before the first create"
    );
    proxy.post(VIDEOS, "{}");
    let warning = proxy.stderr.find(|line| line.contains("less than a tenth"));
    assert!(
        warning
            .unwrap()
            .contains("Trial-Video-100Units-5Con-1Months")
    );
    let metrics = proxy.admin("/metrics");
    let labels = r#"{account="default",pack="Trial-Video-100Units-5Con-1Months"}"#;
    for line in [
        format!("kling_proxy_pack_units_left{labels} 5"),
        format!("kling_proxy_pack_end_timestamp_seconds{labels} 1900000000"),
    ] {
        assert!(metrics.text().contains(&line), "{line}: {}", metrics.text());
    }
}

#[test]
fn unknown_create_is_looked_up_later() {
    let upstream = Upstream::ok();
    let found = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_there = std::sync::Arc::clone(&found);
    upstream.script(move |message| {
        vec![send(if message.method() == "POST" {
            crate::support::reply(502, "", "bad gateway")
        } else if is_there.load(std::sync::atomic::Ordering::SeqCst) {
            answer(&json!({
                "task_id": "8", "task_status": "processing",
                "task_info": { "external_task_id": "mine" },
            }))
        } else {
            kling(
                400,
                r#"{"code":1201,"message":"Task not found by id/external id: mine"}"#,
            )
        })]
    });
    let proxy = watched(&upstream);
    let made = proxy.post(VIDEOS, r#"{"external_task_id":"mine"}"#);
    assert_eq!(made.refusal(), (502, 9103));
    found.store(true, std::sync::atomic::Ordering::SeqCst);
    eventually("the task is found", || {
        proxy.get("/_proxy/tasks/8").json()["status"] == "processing"
    });
    let reference = made.header("kling-proxy-task").unwrap();
    assert_eq!(proxy.get("/_proxy/tasks/8").json()["ref"], reference);
}

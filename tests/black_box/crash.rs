//! The process is killed at random moments. After a restart, each task that the sandbox has made is in the
//! store, or is named as unknown, and none is there twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use fastrand::Rng;
use serde_json::{Value, json};

use crate::support::{Command, Connection, Proxy, Signal, eventually, given, request};

/// `CRASH_SEED` asks for another.
const SEED: u64 = 20_261_201;
/// Number of kills. `CRASH_COUNT` asks for more.
const COUNT: u64 = 8;
/// Clients that send at once.
const CLIENTS: usize = 8;
const API_KEY: &str = "api-sandboxKeyForTestsOnly000000";
const VIDEOS: &str = "/v1/videos/text2video";

fn started(sandbox: &Proxy, file: &Path) -> Proxy {
    Command::new(["serve"])
        .env("KLING_API_KEY", API_KEY)
        .setting(
            "upstream.url",
            format!("http://{}", sandbox.listener("sandbox")),
        )
        .setting("state.url", format!("sqlite:{}", file.display()))
        .setting("state.watch", "true")
        .start()
}

/// Creates, polls and waits, until there is nobody to talk to.
fn use_up(address: SocketAddr, seed: u64, numbers: &AtomicUsize, is_over: &AtomicBool) {
    let mut rng = Rng::with_seed(seed);
    let Ok(mut client) = Connection::try_to(address) else {
        return;
    };
    let mut task = String::new();
    while !is_over.load(Relaxed) {
        let number = numbers.fetch_add(1, Relaxed);
        let poll = format!("GET {VIDEOS}/{task}");
        let bytes = match rng.u8(..4) {
            0 if !task.is_empty() => request(&poll, "", ""),
            1 if !task.is_empty() => request(&poll, "prefer: wait=1", ""),
            _ => {
                let mut body = json!({ "prompt": "a cat" });
                if rng.bool() {
                    body["external_task_id"] = json!(format!("mine-{number}"));
                }
                let id = format!("x-request-id: r-{number}");
                request(&format!("POST {VIDEOS}"), &id, body.to_string())
            }
        };
        let Ok(answer) = client.send(bytes).try_answer() else {
            return;
        };
        if let Some(id) = answer.json()["data"]["task_id"].as_str() {
            id.clone_into(&mut task);
        }
    }
}

/// Returns all tasks of a list with cursors.
fn all(mut page: impl FnMut(&str) -> (Vec<Value>, Option<String>)) -> Vec<Value> {
    let (mut tasks, mut cursor) = (Vec::new(), String::new());
    loop {
        let (more, next) = page(&cursor);
        tasks.extend(more);
        match next {
            Some(next) => cursor = next,
            None => return tasks,
        }
    }
}

/// Returns all tasks of the account, as Kling's own list shows them.
fn made(address: SocketAddr) -> Vec<Value> {
    let headers = format!("content-type: application/json\nauthorization: Bearer {API_KEY}");
    all(|cursor| {
        let mut body = json!({ "limit": 500 });
        if !cursor.is_empty() {
            body["cursor"] = json!(cursor);
        }
        let mut client = Connection::to(address);
        let answer = client
            .send(request("POST /tasks", &headers, body.to_string()))
            .answer();
        let data = &answer.json()["data"];
        let next = data["next_cursor"]
            .as_str()
            .filter(|_| data["has_more"] == true);
        (
            data["result"].as_array().unwrap().clone(),
            next.map(str::to_owned),
        )
    })
}

fn stored(proxy: &Proxy) -> Vec<Value> {
    all(|cursor| {
        let page = proxy
            .get(&format!("/_proxy/tasks?limit=500&cursor={cursor}"))
            .json();
        let next = page["next_cursor"].as_str().map(str::to_owned);
        (page["tasks"].as_array().unwrap().clone(), next)
    })
}

#[test]
#[expect(clippy::print_stdout, reason = "the seed, for a run again")]
fn no_task_is_lost_when_the_process_is_killed() {
    let seed = given("CRASH_SEED").unwrap_or(SEED);
    let count = given("CRASH_COUNT").unwrap_or(COUNT);
    println!("CRASH_SEED={seed} CRASH_COUNT={count}");
    let mut rng = Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tasks.db");
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .setting("sandbox.concurrency", "100000")
        .setting("sandbox.task_time", "1s")
        .listening("sandbox");
    let numbers = AtomicUsize::new(0);
    for _ in 0..count {
        let proxy = started(&sandbox, &file);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                let (seed, address) = (rng.u64(..), proxy.address);
                let (numbers, is_over) = (&numbers, &is_over);
                scope.spawn(move || use_up(address, seed, numbers, is_over));
            }
            // Any moment will do, so nothing is waited for.
            thread::sleep(Duration::from_millis(rng.u64(50..600)));
            proxy.signal(Signal::KILL);
            is_over.store(true, Relaxed);
        });
        proxy.end();
    }
    let proxy = started(&sandbox, &file);
    let open = |status: &str| {
        let list = proxy
            .get(&format!("/_proxy/tasks?status={status}&limit=1"))
            .json();
        !list["tasks"].as_array().unwrap().is_empty()
    };
    // The leases of the dead processes end. A list of a client then tells the store what became of the tasks.
    eventually("no create is being sent", || !open("sending"));
    eventually("all tasks have ended", || {
        made(proxy.address);
        !open("submitted") && !open("processing")
    });
    let made = made(sandbox.listener("sandbox"));
    let stored = stored(&proxy);
    println!(
        "{} tasks were made, {} creates are stored",
        made.len(),
        stored.len()
    );
    assert!(made.len() > 20, "the load is too small");
    let mut by_id: BTreeMap<&str, &Value> = BTreeMap::new();
    for task in &stored {
        if let Some(id) = task["id"].as_str() {
            assert!(
                by_id.insert(id, task).is_none(),
                "task {id} is stored twice"
            );
        }
    }
    let references: BTreeSet<_> = stored.iter().map(|task| task["ref"].as_str()).collect();
    assert_eq!(references.len(), stored.len());
    let unknown = stored.iter().filter(|task| task["status"] == "unknown");
    let unknown_ids: BTreeSet<_> = unknown
        .clone()
        .filter_map(|task| task["external_id"].as_str())
        .collect();
    let mut nameless = unknown.filter(|task| task["external_id"].is_null()).count();
    for task in &made {
        let id = task["id"].as_str().unwrap();
        let external_id = task["external_id"].as_str().unwrap_or_default();
        match by_id.get(id) {
            Some(stored) => assert_eq!(stored["status"], task["status"], "{stored}"),
            None if unknown_ids.contains(external_id) => {}
            // It is one of those that no id names.
            None if external_id.is_empty() && nameless > 0 => nameless -= 1,
            None => panic!("task {id} of create {external_id} is lost"),
        }
    }
    // And the store has no task that the sandbox has not made.
    let ids: BTreeSet<_> = made
        .iter()
        .map(|task| task["id"].as_str().unwrap())
        .collect();
    for id in by_id.keys() {
        assert!(ids.contains(id), "task {id} was never made");
    }
}

//! The embedded Kling: a newcomer creates, polls and downloads without an account, and learns
//! what the real one would refuse.

use serde_json::{Value, json};
use tokio::time::{Duration, Instant};

use crate::support::{
    Command, Connection, Message, Proxy, Signal, Upstream, assert_has, eventually, get, mint, now,
    request,
};

const VIDEOS: &str = "/v1/videos/text2video";
const IMAGES: &str = "/v1/images/generations";
const IMAGE_TO_VIDEO: &str = "/v1/videos/image2video";
/// The largest create that the tests send, in bytes.
const LARGE: usize = 90 << 20;
const API_KEY: &str = "api-sandboxKeyForTestsOnly000000";

fn sandboxed() -> Command {
    Command::new(["serve", "--sandbox"]).setting("sandbox.task_time", "200ms")
}

fn create(proxy: &Proxy, prompt: &str) -> Message {
    proxy.post(
        VIDEOS,
        json!({ "model_name": "kling-v2-6", "prompt": prompt }).to_string(),
    )
}

/// Polls a task until it has ended.
fn ended(proxy: &Proxy, family: &str, created: &Message) -> Value {
    let id = created.json()["data"]["task_id"].take();
    let path = format!("{family}/{}", id.as_str().expect("a task id"));
    let mut connection = proxy.connect();
    let mut data = Value::Null;
    eventually("the task ends", || {
        data = connection.send(get(&path)).answer().json()["data"].take();
        !["submitted", "processing"]
            .map(Value::from)
            .contains(&data["task_status"])
    });
    data
}

/// Fetches a file by its URL, as `curl` does, without a client token.
fn download(url: &Value) -> Message {
    let url = url
        .as_str()
        .expect("a url")
        .strip_prefix("http://")
        .expect("plain http");
    let (authority, path) = url.split_once('/').expect("a path");
    let head = format!("GET /{path} HTTP/1.1\r\nhost: {authority}\r\n\r\n");
    Connection::to(authority.parse().unwrap())
        .send(head)
        .answer()
}

#[test]
fn task_is_created_polled_and_its_file_downloaded() {
    let proxy = sandboxed().start();
    assert!(proxy.listener("sandbox").ip().is_loopback());
    for (family, file, magic) in [
        (VIDEOS, "/task_result/videos/0/url", &b"ftyp"[..]),
        (
            "/v1/videos/image2video",
            "/task_result/videos/0/url",
            b"ftyp",
        ),
        (
            "/v1/images/generations",
            "/task_result/images/0/url",
            b"PNG",
        ),
    ] {
        let body = json!({ "model_name": "kling-v2-6", "prompt": "a cat", "image": "https://a.test/c.png" });
        let created = proxy.post(family, body.to_string());
        assert_eq!(
            created.json()["data"]["task_status"],
            "submitted",
            "{family}"
        );
        let task = ended(&proxy, family, &created);
        assert_eq!(task["task_status"], "succeed", "{family}: {task}");
        let url = task.pointer(file).expect("a result");
        let at_proxy = format!("http://{}/results/", proxy.address);
        assert_has(url.as_str().unwrap(), &[&at_proxy]);
        let answer = download(url);
        assert_eq!(answer.status(), 200, "{family}");
        let start = &answer.body[..16];
        assert!(
            start.windows(magic.len()).any(|part| part == magic),
            "{start:?}"
        );
    }
}

/// Returns the URL of a video.
fn video_url(proxy: &Proxy) -> String {
    let task = ended(proxy, VIDEOS, &create(proxy, "a cat"));
    let url = task.pointer("/task_result/videos/0/url");
    url.and_then(Value::as_str).expect("a result").to_owned()
}

#[test]
fn results_are_at_an_address_that_clients_of_the_proxy_can_use() {
    for (settings, host) in [
        (&[][..], "127.0.0.1"),
        (&[("listen.address", "[::1]:0")], "[::1]"),
        (
            &[
                ("listen.address", "0.0.0.0:0"),
                ("listen.unsafe_allow_remote", "true"),
            ],
            "127.0.0.1",
        ),
        (
            &[("access.allowed_hosts", r#"["localhost", "kling.test"]"#)],
            "localhost",
        ),
    ] {
        let set = |command: Command, (key, value): &(&str, &str)| command.setting(key, value);
        let proxy = settings.iter().fold(sandboxed(), set).start();
        let (id, port) = ("a-task", proxy.address.port());
        let body = json!({ "prompt": "a cat", "external_task_id": id }).to_string();
        let created = proxy.post(VIDEOS, body);
        assert_eq!(created.refusal(), (200, 0), "{settings:?}");
        let task = ended(&proxy, VIDEOS, &created);
        let url = task.pointer("/task_result/videos/0/url").expect("a result");
        let start = format!("http://{host}:{port}/results/");
        assert!(url.as_str().unwrap().starts_with(&start), "{url}");
        let (_, path) = url.as_str().unwrap().split_once("/results/").unwrap();
        let head = format!("GET /results/{path} HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n");
        assert_eq!(proxy.send(head).status(), 200, "{url}");
    }
}

#[test]
fn public_url_of_the_settings_goes_before_the_address_of_the_proxy() {
    let proxy = sandboxed()
        .setting("sandbox.public_url", "http://kling.test:1/")
        .start();
    let url = video_url(&proxy);
    assert!(url.starts_with("http://kling.test:1/results/"), "{url}");
}

/// Like the links of Kling's results, the URL alone suffices: the files are the same for everybody.
#[test]
fn result_is_for_everybody_who_reaches_the_proxy_and_nothing_else_is() {
    let command = sandboxed();
    let tokens = command.file("tokens", "first-token-01234\n");
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .setting("access.allowed_origins", r#"["http://app.test"]"#)
        .setting("access.allowed_paths", r#"["/v1"]"#)
        .start();
    let token = "kling-proxy-token: first-token-01234";
    let file = "GET /results/1.mp4?Expires=99999999999";
    for (headers, origin) in [
        ("x-a: b", None),
        ("kling-proxy-token: a-wrong-token-01234", None),
        // `<video src>` and `<img src>` of any page.
        ("sec-fetch-site: cross-site\nsec-fetch-mode: no-cors", None),
        ("origin: http://app.test", Some("http://app.test")),
        ("origin: http://evil.test", None),
    ] {
        let answer = proxy.send(request(file, headers, ""));
        assert_eq!(answer.status(), 200, "{headers}");
        assert_eq!(
            answer.told(["content-type", "access-control-allow-origin"]),
            [Some("video/mp4"), origin],
            "{headers}"
        );
    }
    let foreign = format!("{file} HTTP/1.1\r\nhost: evil.test\r\n\r\n");
    assert_eq!(proxy.send(foreign).refusal(), (421, 9001));
    for (line, headers, refusal) in [
        (&*format!("GET {VIDEOS}"), "x-a: b", (401, 9003)),
        (&format!("GET {VIDEOS}"), token, (200, 0)),
        (
            "POST /results/1.mp4?Expires=99999999999",
            "x-a: b",
            (403, 9004),
        ),
        (
            "GET /results/../v1/videos/text2video",
            "x-a: b",
            (403, 9004),
        ),
        ("GET /results/..", "x-a: b", (403, 9004)),
        (
            "GET //results/1.mp4?Expires=99999999999",
            "x-a: b",
            (403, 9004),
        ),
    ] {
        let answer = proxy.send(request(line, headers, ""));
        assert_eq!(answer.refusal(), refusal, "{line} with {headers}");
    }
    let preflight = "origin: http://evil.test\naccess-control-request-method: GET";
    let answer = proxy.send(request(&file.replace("GET", "OPTIONS"), preflight, ""));
    assert_eq!(answer.refusal(), (403, 9002));
}

/// R38.
#[test]
fn path_of_a_result_is_guarded_like_any_other_if_upstream_is_not_the_sandbox() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = command.file("tokens", "first-token-01234\n");
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .start();
    let answer = proxy.get("/results/1.mp4?Expires=99999999999");
    assert_eq!(answer.refusal(), (401, 9003));
    let page = "kling-proxy-token: first-token-01234\nsec-fetch-site: cross-site";
    let answer = proxy.send(request("GET /results/1.mp4?Expires=99999999999", page, ""));
    assert_eq!(answer.refusal(), (403, 9002));
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn sandbox_says_once_that_it_ignores_real_keys() {
    let command = sandboxed().keys();
    let folder = command.home().join("credentials");
    command.file("credentials/kling_api_key", "api-key");
    let words = json!(["/bin/sh", "-c", "touch ran"]).to_string();
    let (home, keys) = (command.home(), "credentials.command");
    let proxy = command
        .env("CREDENTIALS_DIRECTORY", folder.to_str().unwrap())
        .env("KLING_API_KEY_FILE", "/nowhere")
        .setting(keys, words)
        .start();
    assert_eq!(create(&proxy, "a cat").refusal(), (200, 0));
    proxy.signal(Signal::TERM);
    let log = proxy.end().1;
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("ignores"))
        .collect();
    let [line] = lines[..] else {
        panic!("not one line: {log}")
    };
    let places = "KLING_API_KEY_FILE, KLING_ACCESS_KEY, KLING_SECRET_KEY, \
                  $CREDENTIALS_DIRECTORY/kling_api_key, credentials.command";
    assert_has(line, &["INFO", "the sandbox", places]);
    assert!(!home.join("ran").exists(), "no command is run");
    assert!(!log.contains("/nowhere"), "{log}");

    let proxy = sandboxed().start();
    proxy.signal(Signal::TERM);
    let log = proxy.end().1;
    assert!(!log.contains("ignores"), "{log}");
}

#[test]
fn tasks_are_listed_by_family_and_page() {
    let proxy = sandboxed().start();
    let ids = ["one", "two"].map(|prompt| create(&proxy, prompt).json()["data"]["task_id"].take());
    let list = |path: String| {
        let list = proxy.get(&path).json()["data"].take();
        let tasks = list.as_array().expect("a list").iter();
        tasks
            .map(|task| task["task_id"].clone())
            .collect::<Vec<_>>()
    };
    let all = list(VIDEOS.to_owned());
    assert!(
        all.len() == 2 && ids.iter().all(|id| all.contains(id)),
        "{all:?}"
    );
    let pages = [1, 2].map(|page| list(format!("{VIDEOS}?pageNum={page}&pageSize=1")));
    assert_eq!(pages.concat(), all);
    assert_eq!(list("/v1/images/generations".to_owned()), [""; 0]);
}

#[test]
fn prompt_triggers_what_a_client_must_cope_with() {
    let command = sandboxed().setting("upstream.response_timeout", "2s");
    let proxy = command.start();
    for (prompt, refusals) in [
        ("a cat sandbox:1303", &[(429, 1303)][..]),
        ("sandbox:1102", &[(429, 1102)]),
        ("sandbox:1301", &[(400, 1301)]),
        ("sandbox:5000", &[(500, 5000)]),
        (
            "sandbox:html",
            &[(500, 9103), (502, 9103), (503, 9103), (504, 9103)],
        ),
        ("sandbox:slow=60s", &[(504, 9102)]),
    ] {
        let refusal = create(&proxy, prompt).refusal();
        assert!(refusals.contains(&refusal), "{prompt}: {refusal:?}");
    }
}

#[test]
fn connection_is_reset_after_the_task_was_made() {
    let proxy = sandboxed().start();
    assert_eq!(create(&proxy, "sandbox:reset").refusal(), (502, 9104));
    assert_eq!(
        proxy.get(VIDEOS).json()["data"].as_array().map(Vec::len),
        Some(1)
    );
}

#[test]
fn failed_task_is_a_success_of_its_request() {
    let proxy = sandboxed().start();
    let task = ended(&proxy, VIDEOS, &create(&proxy, "sandbox:failed"));
    assert_eq!(task["task_status"], "failed", "{task}");
    assert!(task["task_status_msg"].is_string(), "{task}");
}

#[test]
fn tasks_over_the_concurrency_are_refused() {
    let proxy = sandboxed().setting("sandbox.task_time", "10m").start();
    let answers = [(); 4].map(|()| create(&proxy, "a cat").refusal());
    assert_eq!(answers, [(200, 0), (200, 0), (200, 0), (429, 1303)]);
    let images = |n: u32| {
        let body = json!({ "prompt": "a cat", "n": n }).to_string();
        proxy.post(IMAGES, body).refusal()
    };
    assert_eq!([3, 1].map(images), [(200, 0), (429, 1303)]);
}

/// Tasks that clients of the proxy did not create can take the slots.
#[test]
fn foreign_tasks_hold_slots() {
    let proxy = sandboxed().setting("sandbox.foreign", "2").start();
    let answers = [(); 2].map(|()| create(&proxy, "sandbox:duration=10m").refusal());
    assert_eq!(answers, [(200, 0), (429, 1303)]);
}

#[test]
fn task_exists_although_its_answer_was_lost() {
    let proxy = sandboxed().start();
    assert_eq!(create(&proxy, "sandbox:lost").refusal(), (502, 9103));
    let list = proxy.get(VIDEOS).json()["data"].take();
    assert_eq!(list.as_array().map(Vec::len), Some(1));
}

/// 20 minutes at a speed of 6000 are 200 ms.
#[test]
fn task_lasts_as_long_as_its_prompt_says_at_the_speed_of_the_sandbox() {
    let at_speed = |speed: &str| {
        let command = sandboxed().setting("sandbox.speed", speed);
        let proxy = command.setting("sandbox.task_time", "10m").start();
        let created = create(&proxy, "sandbox:duration=20m");
        (proxy, created)
    };
    let (fast, created) = at_speed("6000");
    let task = ended(&fast, VIDEOS, &created);
    let [from, to] = ["created_at", "updated_at"].map(|name| task[name].as_u64().unwrap());
    assert_eq!(to - from, 200, "{task}");
    let (slow, created) = at_speed("1");
    let id = created.json()["data"]["task_id"].take();
    let task = slow
        .get(&format!("{VIDEOS}/{}", id.as_str().unwrap()))
        .json();
    assert_eq!(task["data"]["task_status"], "submitted", "{task}");
}

#[test]
fn create_takes_the_latency_to_answer() {
    let proxy = sandboxed().setting("sandbox.latency", "300ms").start();
    let begin = Instant::now();
    assert_eq!(create(&proxy, "a cat").status(), 200);
    assert!(begin.elapsed() >= Duration::from_millis(300));
}

/// Kling's own names: a client reads the number of slots from them.
#[test]
fn names_of_the_packs_have_their_slots_and_their_units_go_down() {
    let proxy = sandboxed().setting("sandbox.concurrency", "5").start();
    let packs = || {
        let answer = proxy.get("/account/costs?start_time=1&end_time=2").json();
        let packs = answer["data"]["resource_pack_subscribe_infos"].clone();
        [0, 1].map(|index| {
            let pack = &packs[index];
            let left = pack["remaining_quantity"].as_f64();
            (
                pack["resource_pack_name"].as_str().unwrap().to_owned(),
                left,
            )
        })
    };
    let expected = |units: [f64; 2]| {
        let [video, image] =
            ["Video", "Image"].map(|title| format!("Trial-{title}-1000000Units-5Con-12Months"));
        [(video, Some(units[0])), (image, Some(units[1]))]
    };
    assert_eq!(packs(), expected([1e6, 1e6]));
    for (prompt, deduction) in [("a cat", "1"), ("sandbox:failed", "0")] {
        let task = ended(&proxy, VIDEOS, &create(&proxy, prompt));
        assert_eq!(task["final_unit_deduction"], deduction, "{task}");
    }
    assert_eq!(packs(), expected([999_999.0, 1e6]));
}

#[test]
fn results_are_data_urls_if_the_settings_say_so() {
    let proxy = sandboxed().setting("sandbox.results", "data").start();
    let task = ended(&proxy, VIDEOS, &create(&proxy, "a cat"));
    let url = task.pointer("/task_result/videos/0/url").expect("a result");
    let url = url.as_str().unwrap();
    assert!(url.starts_with("data:video/mp4;base64,AAAA"), "{url}");
}

#[test]
fn wrong_settings_of_the_sandbox_are_named() {
    let finished = sandboxed()
        .setting("sandbox.speed", "0")
        .setting("sandbox.latency", "25h")
        .setting("sandbox.foreign", "1001")
        .setting("sandbox.results", "files")
        .run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    let keys = ["speed", "latency", "foreign", "results"].map(|key| format!("`sandbox.{key}`"));
    assert_has(&finished.stderr, &keys.each_ref().map(String::as_str));
}

/// The new standard, past the proxy: an API key is needed.
#[test]
fn external_id_of_one_generation_is_taken_in_the_other() {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .setting("sandbox.task_time", "100ms")
        .listening("sandbox");
    let headers = format!("content-type: application/json\nauthorization: Bearer {API_KEY}");
    let send = |line: &str, body: &str| sandbox.send(request(line, &headers, body)).json();
    let legacy = r#"{"prompt":"a","external_task_id":"one"}"#;
    let standard = r#"{"prompt":"a","options":{"external_task_id":"one"}}"#;
    let [first, second] = ["/text-to-video/kling-3.0", VIDEOS].map(|path| format!("POST {path}"));
    let created = send(&first, standard);
    assert_eq!(created["data"]["external_id"], "one", "{created}");
    let again = send(&second, legacy);
    assert_eq!(again["code"], 1201, "{again}");
    assert_eq!(again["message"], "External_task_id one already exists");
    let created = send(&second, &legacy.replace("one", "two"));
    let info = &created["data"]["task_info"];
    assert_eq!(info["external_task_id"], "two", "{created}");
    let mut found = Value::Null;
    eventually("both tasks end", || {
        found = send("GET /tasks?external_task_ids=two,one", "")["data"].take();
        [0, 1].map(|index| &found[index]["status"]) == ["succeeded"; 2]
    });
    for (index, id) in ["two", "one"].into_iter().enumerate() {
        let task = &found[index];
        assert_eq!(task["external_id"], id, "{found}");
        assert_eq!(
            task["billing"],
            json!([{ "charge_type": "unit", "amount": "1", "package_type": "video" }])
        );
        let url = task["outputs"][0]["url"].as_str().expect("a result");
        let (_, expires) = url.split_once("?Expires=").expect(url);
        let updated = task["update_time"].as_u64().unwrap();
        assert_eq!(expires.parse(), Ok(updated / 1000 + 30 * 24 * 3600));
    }
}

/// Each page goes on where the last one ended.
#[test]
fn tasks_are_listed_by_filter_and_cursor() {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .setting("sandbox.task_time", "0s")
        .listening("sandbox");
    let headers = format!("content-type: application/json\nauthorization: Bearer {API_KEY}");
    let post = |path: &str, body: &Value| {
        let line = format!("POST {path}");
        sandbox
            .send(request(&line, &headers, body.to_string()))
            .json()
    };
    let id = |created: Value| created["data"]["task_id"].as_str().unwrap().to_owned();
    let ended = [(); 3].map(|()| id(post(VIDEOS, &json!({ "prompt": "a cat" }))));
    let long = json!({ "prompt": "sandbox:duration=10m" });
    let [video, _image] = [VIDEOS, IMAGES].map(|path| id(post(path, &long)));
    let list = |status: &[&str], limit: u32| {
        let mut pages = Vec::new();
        let mut body = json!({ "limit": limit, "filters": [
            { "key": "product_type", "values": ["video"] },
            { "key": "status", "values": status },
        ] });
        loop {
            let page = post("/tasks", &body)["data"].take();
            let tasks = page["result"].as_array().expect("a page").iter();
            let ids = tasks.map(|task| task["id"].as_str().unwrap().to_owned());
            pages.push(ids.collect::<Vec<_>>());
            if page["has_more"] == false {
                return pages;
            }
            body["cursor"] = page["next_cursor"].clone();
        }
    };
    assert_eq!(list(&["submitted", "processing"], 500), [[video]]);
    let [first, second, third] = ended;
    assert_eq!(list(&["succeeded"], 2), [vec![third, second], vec![first]]);
    assert_eq!(post("/tasks", &json!({ "limit": 501 }))["code"], 1201);
}

#[test]
fn external_task_id_is_unique_and_finds_its_task() {
    let proxy = sandboxed().start();
    let body = json!({ "prompt": "a cat", "external_task_id": "mine-1" }).to_string();
    let id = proxy.post(VIDEOS, &body).json()["data"]["task_id"].take();
    let found = proxy.get(&format!("{VIDEOS}/mine-1")).json();
    assert_eq!(found["data"]["task_id"], id);
    assert_eq!(proxy.post(VIDEOS, &body).refusal(), (400, 1201));
    assert_eq!(
        proxy.get(&format!("{VIDEOS}/nobodys")).refusal(),
        (400, 1201)
    );
}

/// A create with a picture, as large as that.
fn large_create(key: &str) -> Vec<u8> {
    let picture = "iVBORw0KGgo/".repeat(LARGE / 12);
    let headers = format!("content-type: application/json\nauthorization: Bearer {key}");
    let body = json!({ "image": picture, "prompt": "a cat" }).to_string();
    request(&format!("POST {IMAGE_TO_VIDEO}"), &headers, body)
}

/// R33.
#[test]
fn work_of_the_sandbox_does_not_delay_the_admin_listener() {
    let proxy = sandboxed().start();
    let [admin_before, all_before] = proxy.cpu_times();
    let mut client = Connection::to(proxy.listener("sandbox"));
    let answer = client.send(large_create(API_KEY)).answer();
    assert_eq!(answer.refusal(), (200, 0));
    let [admin, all] = proxy.cpu_times();
    let [admin, all] = [admin - admin_before, all - all_before];
    assert!(
        admin * 4 < all,
        "{admin} of {all} ticks by the admin's thread"
    );
    assert_eq!(proxy.admin("/health/live").status(), 200);
}

/// R51: nothing is kept of a create but what its task is made of.
#[test]
fn large_create_takes_at_most_twice_its_size_in_memory() {
    let picture = "iVBORw0KGgo/".repeat(LARGE / 12);
    let create = |picture: &str| format!(r#"{{"image":"{picture}","prompt":"a cat"}}"#);
    for (name, body, code) in [
        ("plain", create(&picture), 0),
        ("escaped", create(&picture.replace('/', "\\/")), 0),
        (
            "a list",
            format!(r#"{{"image_list":[{}0]}}"#, "0,".repeat(LARGE / 20)),
            1200,
        ),
        ("no JSON", picture.clone(), 1200),
    ] {
        let (alone, [.., key]) = alone();
        for (way, proxy) in [("alone", alone), ("embedded", sandboxed().start())] {
            let before = proxy.memory("VmHWM");
            let headers = format!("content-type: application/json\nauthorization: Bearer {key}");
            let answer = proxy.send(request(&format!("POST {IMAGE_TO_VIDEO}"), &headers, &body));
            assert_eq!(answer.json()["code"], code, "{name}, {way}");
            let growth = proxy.memory("VmHWM") - before;
            assert!(
                growth <= 2 * body.len(),
                "{name}, {way}: grew by {growth} bytes"
            );
        }
    }
}

/// R1, R3, R51: a page whose name was pointed at the sandbox gets nothing from it, and no other page does.
#[test]
fn sandbox_alone_refuses_foreign_hosts_and_pages() {
    let (sandbox, [.., key]) = alone();
    let port = sandbox.address.port();
    for (headers, refusal) in [
        ("host: localhost".to_owned(), (200, 0)),
        (format!("host: 127.0.0.1:{port}"), (200, 0)),
        ("host: [::1]".to_owned(), (200, 0)),
        (
            "host: localhost\nsec-fetch-site: same-origin".to_owned(),
            (200, 0),
        ),
        ("host: evil.test".to_owned(), (421, 9001)),
        (format!("host: localhost.evil.test:{port}"), (421, 9001)),
        ("host: 127.0.0.1.nip.io".to_owned(), (421, 9001)),
        ("host: 0.0.0.0".to_owned(), (421, 9001)),
        ("host:".to_owned(), (421, 9001)),
        (String::new(), (421, 9001)),
        ("host: localhost\nhost: evil.test".to_owned(), (421, 9001)),
        (
            "host: localhost\norigin: http://evil.test".to_owned(),
            (403, 9002),
        ),
        ("host: localhost\norigin: null".to_owned(), (403, 9002)),
        (
            "host: localhost\nsec-fetch-site: cross-site".to_owned(),
            (403, 9002),
        ),
        (
            "host: localhost\nsec-fetch-site: same-site".to_owned(),
            (403, 9002),
        ),
    ] {
        let lines = format!("{headers}\nauthorization: Bearer {key}");
        let answer = sandbox.send(bare(&format!("GET {VIDEOS}"), &lines, ""));
        assert_eq!(answer.refusal(), refusal, "{headers}");
        assert!(!answer.head.contains("access-control-"), "{}", answer.head);
        // The body never comes.
        let lines = format!("{lines}\ncontent-length: 1000000");
        let mut create = sandbox.connect();
        create.send(bare(&format!("POST {VIDEOS}"), &lines, ""));
        if refusal.0 != 200 {
            assert_eq!(create.answer().refusal(), refusal, "{headers}");
        }
    }
    let preflight =
        "host: localhost\norigin: http://evil.test\naccess-control-request-method: POST";
    let answer = sandbox.send(bare(&format!("OPTIONS {VIDEOS}"), preflight, ""));
    assert_eq!(answer.refusal(), (403, 9002));
    let list = request(
        &format!("GET {VIDEOS}"),
        &format!("authorization: Bearer {key}"),
        "",
    );
    assert_eq!(
        sandbox.send(list).json()["data"],
        json!([]),
        "no task was made"
    );
}

/// R3, R51.
#[test]
fn sandbox_alone_answers_hosts_and_pages_that_the_settings_allow() {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .setting("access.allowed_hosts", r#"["kling.test"]"#)
        .setting("access.allowed_origins", r#"["http://app.test"]"#)
        .listening("sandbox");
    let lines =
        format!("host: kling.test\norigin: http://app.test\nauthorization: Bearer {API_KEY}");
    let answer = sandbox.send(bare(&format!("GET {VIDEOS}"), &lines, ""));
    assert_eq!(answer.refusal(), (200, 0));
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some("http://app.test")
    );
    let preflight =
        "host: kling.test\norigin: http://app.test\naccess-control-request-method: POST";
    assert_eq!(
        sandbox
            .send(bare(&format!("OPTIONS {VIDEOS}"), preflight, ""))
            .status(),
        204
    );
    assert_eq!(
        sandbox.get(VIDEOS).refusal(),
        (421, 9001),
        "localhost is not listed"
    );
}

/// Behind its guard too.
#[test]
fn sandbox_alone_drops_a_connection_if_it_is_asked_to() {
    let (sandbox, [.., key]) = alone();
    let headers = format!("content-type: application/json\nauthorization: Bearer {key}");
    let create = request(
        &format!("POST {VIDEOS}"),
        &headers,
        r#"{"prompt":"sandbox:reset"}"#,
    );
    assert_eq!(sandbox.connect().send(create).rest(), b"");
}

/// R33, R51.
#[test]
fn sandbox_alone_takes_as_many_connections_as_it_has_descriptors_for() {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .after("ulimit -S -n 64; ulimit -H -n 256;")
        .listening("sandbox");
    let warning = sandbox
        .stderr
        .find(|line| line.contains("limits.connections"));
    assert_has(&warning.expect("a warning"), &["WARN", "256", "128"]);
    let mut clients: Vec<_> = (0..200).map(|_| sandbox.connect()).collect();
    for client in &mut clients[..128] {
        assert_eq!(client.send(get("/")).answer().status(), 200);
    }
    clients.drain(..128);
    for client in &mut clients {
        assert_eq!(client.send(get("/")).answer().status(), 200);
    }
    sandbox.signal(Signal::TERM);
    let (_, log) = sandbox.end();
    assert!(!log.contains("Too many open files"), "{log}");
}

/// As Kling's, the files are for the pages that show them.
#[test]
fn page_shows_results_of_a_sandbox_alone() {
    let (sandbox, [.., key]) = alone();
    let authorization = format!("content-type: application/json\nauthorization: Bearer {key}");
    let body = json!({ "image": "AA", "video_id": "1" }).to_string();
    let created = sandbox.send(request(
        "POST /v1/videos/image-recognize",
        &authorization,
        body,
    ));
    let url = created.json();
    let url = url.pointer("/data/task_result/images/0/url");
    let (_, path) = url
        .and_then(Value::as_str)
        .unwrap_or_default()
        .split_once("/results/")
        .expect("a result");
    let from_page = "host: localhost\nsec-fetch-site: cross-site\nsec-fetch-mode: no-cors";
    let answer = sandbox.send(bare(&format!("GET /results/{path}"), from_page, ""));
    assert_eq!(answer.status(), 200);
    let answer = sandbox.send(bare(&format!("POST /results/{path}"), from_page, ""));
    assert_eq!(answer.refusal(), (403, 9002));
}

/// R5, R51.
#[test]
fn sandbox_alone_listens_beyond_loopback_only_if_it_is_told_to() {
    let everywhere = || Command::new(["sandbox", "--address", "0.0.0.0:0"]);
    let finished = everywhere().run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(
        &finished.stderr,
        &["--address", "listen.unsafe_allow_remote"],
    );
    // No client token is asked for, so none protects it.
    let tokens = Command::new(["sandbox", "--address", "0.0.0.0:0"]);
    let file = tokens.file("tokens", "a-client-token-of-some-length");
    let finished = tokens
        .setting("access.client_tokens_file", file.to_str().unwrap())
        .run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    let sandbox = everywhere()
        .setting("listen.unsafe_allow_remote", "true")
        .listening("sandbox");
    let port = sandbox.address.port();
    let address = ([127, 0, 0, 1], port).into();
    let list = request(
        &format!("GET {VIDEOS}"),
        &format!("authorization: Bearer {API_KEY}"),
        "",
    );
    assert_eq!(Connection::to(address).send(list).answer().status(), 200);
}

/// A request with these lines of headers, and no others.
fn bare(line: &str, headers: &str, body: &str) -> String {
    let lines = headers.lines().filter(|line| !line.is_empty());
    let headers: String = lines.flat_map(|line| [line, "\r\n"]).collect();
    format!("{line} HTTP/1.1\r\n{headers}\r\n{body}")
}

/// A day of the sandbox's clock takes no day.
#[test]
fn result_is_deleted_after_30_days() {
    let proxy = sandboxed().start();
    let task = ended(&proxy, VIDEOS, &create(&proxy, "a cat"));
    let url = task.pointer("/task_result/videos/0/url").expect("a result");
    let (_, path) = url.as_str().unwrap().split_once("/results/").unwrap();
    for (offset, status) in [("29d", 200), ("31d", 404)] {
        let later = sandboxed().setting("sandbox.clock_offset", offset).start();
        let url = format!("http://{}/results/{path}", later.listener("sandbox"));
        assert_eq!(download(&json!(url)).status(), status, "{offset}");
    }
}

#[test]
fn seed_decides_every_id() {
    let ids = |seed: &str| {
        let proxy = sandboxed().setting("sandbox.seed", seed).start();
        let created = create(&proxy, "a cat").json();
        let body = json!({ "video_id": "1" }).to_string();
        let faces = proxy.post("/v1/videos/identify-face", body).json();
        let video = ended(&proxy, VIDEOS, &create(&proxy, "another"));
        [
            &created["request_id"],
            &created["data"]["task_id"],
            &faces["data"]["session_id"],
            &video["task_id"],
            &video["task_result"]["videos"][0]["id"],
        ]
        .map(|id| id.as_str().expect("an id").to_owned())
    };
    let expected = ids("7");
    assert_eq!(ids("7"), expected);
    let others = ids("8");
    assert!(
        expected
            .iter()
            .zip(&others)
            .all(|(one, other)| one != other),
        "{others:?}"
    );
}

/// A sandbox alone, with its access key, secret key and API key.
fn alone() -> (Proxy, [String; 3]) {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"]).listening("sandbox");
    let keys = ["access key: ", "secret key: ", "api key: "].map(|label| {
        let line = sandbox
            .stdout
            .find(|line| line.contains(label))
            .expect(label);
        line.split_once(label).unwrap().1.trim().to_owned()
    });
    (sandbox, keys)
}

#[test]
fn keys_of_the_sandbox_are_the_same_at_every_start() {
    let [first, second] = [(); 2].map(|()| alone().1);
    assert_eq!(first, second);
    assert_eq!(first.map(|key| key.len()), [32, 32, 32]);
}

/// R24.
#[test]
fn wrong_tokens_are_refused_with_their_codes() {
    let (sandbox, [access_key, secret_key, _]) = alone();
    let header = json!({ "alg": "HS256", "typ": "JWT" });
    let time = |offset| now().checked_add_signed(offset).unwrap();
    let claims = json!({ "iss": access_key, "exp": time(1800), "nbf": time(-5) });
    let bearer = |header: &Value, claims: &Value| {
        format!(
            "authorization: Bearer {}",
            mint(header, claims, &secret_key)
        )
    };
    let good = bearer(&header, &claims);
    let algorithm = |name: &str| bearer(&json!({ "alg": name, "typ": "JWT" }), &claims);
    let with = |key: &str, value: Value| {
        let mut claims = claims.clone();
        claims[key] = value;
        bearer(&header, &claims)
    };
    let without = |key: &str| {
        let mut claims = claims.clone();
        claims.as_object_mut().unwrap().remove(key);
        bearer(&header, &claims)
    };
    let forged = mint(&header, &claims, "another secret");
    for (lines, refusal) in [
        (good.clone(), (200, 0)),
        ("accept: */*".to_owned(), (401, 1001)),
        ("authorization:".to_owned(), (401, 1001)),
        ("authorization: Bearer not-a-token".to_owned(), (401, 1002)),
        (good.replace("Bearer ", ""), (401, 1002)),
        (good.replace("Bearer", "bearer"), (401, 1002)),
        (good.replace("Bearer ", "Bearer  "), (401, 1002)),
        (format!("{good}\n{good}"), (401, 1002)),
        (algorithm("none"), (401, 1002)),
        (algorithm("HS384"), (401, 1002)),
        (algorithm("RS256"), (401, 1002)),
        (without("iss"), (401, 1002)),
        (without("exp"), (401, 1002)),
        (without("nbf"), (401, 1002)),
        (with("exp", json!(time(1800).to_string())), (401, 1002)),
        (with("nbf", json!(time(-5).to_string())), (401, 1002)),
        (with("exp", json!(1.9e9)), (401, 1002)),
        (with("iss", json!(7)), (401, 1002)),
        (with("exp", json!(time(7200))), (401, 1002)),
        (with("iss", json!("somebody else")), (401, 1000)),
        (format!("authorization: Bearer {forged}"), (401, 1000)),
        (with("nbf", json!(time(600))), (401, 1003)),
        (with("exp", json!(time(-60))), (401, 1004)),
    ] {
        let answer = sandbox.send(request(
            "GET /account/costs?start_time=1&end_time=2",
            &lines,
            "",
        ));
        assert_eq!(answer.refusal(), refusal, "{lines}");
    }
}

#[test]
fn answer_of_the_sandbox_ends_with_a_newline() {
    let proxy = sandboxed().start();
    for (prompt, status) in [("a cat", 200), ("sandbox:1301", 400)] {
        let answer = create(&proxy, prompt);
        assert_eq!(answer.status(), status);
        assert!(answer.text().ends_with("}\n"), "{:?}", answer.text());
    }
}

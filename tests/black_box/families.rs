//! Every path of the API through the proxy, with a client that knows no family: what is asked and what has to come
//! stands in `table`, written from the documentation and not from the sandbox.

mod legacy;
mod new_standard;
mod table;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::{Command, Message, Proxy};
use table::{Row, ended_shape, head_shape, joined};

/// What was asked for, as method and path.
type Asked = BTreeSet<(&'static str, String)>;

/// A value with types for values, and of a list the first item.
fn shape(value: &Value) -> Value {
    match value {
        Value::Null => json!("null"),
        Value::Bool(_) => json!("boolean"),
        Value::Number(_) => json!("number"),
        Value::String(_) => json!("string"),
        Value::Array(items) => items.iter().take(1).map(shape).collect(),
        Value::Object(fields) => {
            let shapes = fields
                .iter()
                .map(|(name, value)| (name.clone(), shape(value)));
            Value::Object(shapes.collect())
        }
    }
}

/// The data of an answer that has to be a success in Kling's envelope.
#[track_caller]
fn data(answer: &Message) -> Value {
    let mut body = answer.json();
    assert_eq!(answer.status(), 200, "{body}");
    let data = body["data"].take();
    let expected =
        json!({ "code": 0, "message": "SUCCEED", "request_id": body["request_id"], "data": null });
    assert_eq!(body, expected);
    assert!(body["request_id"].is_string(), "{body}");
    data
}

/// A request that is refused, as status and code.
#[track_caller]
fn assert_refused(answer: &Message, refusal: (u16, u64), what: &str) {
    assert_eq!(answer.refusal(), refusal, "{what}: {}", answer.text());
}

fn sandboxed() -> Proxy {
    let command = Command::new(["serve", "--sandbox"]);
    command.setting("sandbox.task_time", "0s").start()
}

/// A sandbox alone, and a proxy before it that shows its API key.
fn sandboxed_with_api_key() -> (Proxy, Proxy) {
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"])
        .setting("sandbox.task_time", "0s")
        .setting("sandbox.concurrency", "100")
        .listening("sandbox");
    let line = sandbox.stdout.find(|line| line.starts_with("api key: "));
    let proxy = Command::new([])
        .env("KLING_API_KEY", &line.unwrap()["api key: ".len()..])
        .setting("upstream.url", format!("http://{}", sandbox.address))
        .start();
    (sandbox, proxy)
}

/// Create, query by either id, list: 1b's "CQL". Returns what it found last.
fn create_query_list(proxy: &Proxy, asked: &mut Asked, (path, body, result): &Row) -> Value {
    let name = format!("mine{path}");
    let body = joined(body, &json!({ "external_task_id": name }));
    // A video made of another one names it.
    let has_parent = ["video-extend", "lip-sync", "video-to-audio"]
        .iter()
        .any(|end| path.ends_with(end));
    let head = head_shape(has_parent);

    let created = data(&proxy.post(path, body.to_string()));
    asked.insert(("POST", (*path).to_owned()));
    assert_eq!(shape(&created), head, "{path}");
    assert_eq!(created["task_status"], "submitted", "{path}");
    let id = created["task_id"].as_str().unwrap();
    assert!(
        id.len() == 18 && id.bytes().all(|b| b.is_ascii_digit()),
        "{path}: {id}"
    );

    let found = data(&proxy.get(&format!("{path}/{id}")));
    asked.insert(("GET", format!("{path}/{{id}}")));
    assert_eq!(shape(&found), ended_shape(&head, result), "{path}");
    assert_eq!(
        (&found["task_id"], &found["task_status"]),
        (&created["task_id"], &json!("succeed")),
        "{path}"
    );

    let by_name = proxy.get(&format!("{path}/{}", name.replace('/', "%2F")));
    // The pages of these two name the task id only.
    if ["/v1/videos/advanced-lip-sync", "/v1/general/ai-multi-shot"].contains(path) {
        assert_refused(&by_name, (400, 1201), path);
    } else {
        assert_eq!(data(&by_name), found, "{path}");
    }

    let list = data(&proxy.get(&format!("{path}?pageNum=1&pageSize=1")));
    asked.insert(("GET", (*path).to_owned()));
    assert_eq!(list, json!([found]), "{path}");
    found
}

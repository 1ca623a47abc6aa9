//! The legacy API, with a key pair.

use serde_json::{Value, json};

use super::table::{answers, element_shape, families, joined, old_element_shape, voice_shape};
use super::{Asked, assert_refused, create_query_list, data, sandboxed, shape};
use crate::support::{Command, Proxy, request};

/// What every create and every list refuses.
fn assert_strict(proxy: &Proxy, path: &str, largest_page: u32) {
    for (answer, refusal) in [
        (proxy.post(path, "{}"), (400, 1201)),
        (proxy.post(path, "[]"), (400, 1200)),
        (
            proxy.get(&format!("{path}/123456789012345678")),
            (400, 1201),
        ),
        (proxy.get(&format!("{path}?pageNum=1001")), (400, 1201)),
        (
            proxy.get(&format!("{path}?pageSize={}", largest_page + 1)),
            (400, 1201),
        ),
        (
            proxy.send(request(&format!("DELETE {path}"), "", "")),
            (404, 1202),
        ),
    ] {
        assert_refused(&answer, refusal, path);
    }
    data(&proxy.get(&format!("{path}?pageSize={largest_page}")));
}

#[test]
fn every_legacy_family_is_served_as_documented() {
    let proxy = sandboxed();
    let mut asked = Asked::new();
    for family in families() {
        let (path, body, _) = &family;
        create_query_list(&proxy, &mut asked, &family);
        let largest_page = if path.ends_with("custom-voices") {
            1000
        } else {
            500
        };
        assert_strict(&proxy, path, largest_page);
        let twice = joined(body, &json!({ "external_task_id": format!("mine{path}") }));
        assert_refused(&proxy.post(path, twice.to_string()), (400, 1201), path);
    }
    for (path, body, expected) in answers() {
        assert_eq!(
            shape(&data(&proxy.post(path, body.to_string()))),
            expected,
            "{path}"
        );
        assert_refused(&proxy.post(path, "{}"), (400, 1201), path);
        assert_refused(&proxy.get(path), (404, 1202), path);
        asked.insert(("POST", path.to_owned()));
    }
    presets_are_listed(&proxy, &mut asked);
    old_elements_are_kept(&proxy, &mut asked);
    what_was_made_is_deleted(&proxy, &mut asked);
    assert_eq!(asked.len(), 80, "{asked:#?}");
}

fn presets_are_listed(proxy: &Proxy, asked: &mut Asked) {
    let of_task = |results: &str, shape: Value| {
        json!({
            "task_id": "string", "task_status": "string", "task_status_msg": "string",
            "created_at": "number", "updated_at": "number", "task_result": { results: [shape] },
        })
    };
    for (path, item) in [
        (
            "/v1/general/presets-voices",
            of_task("voices", voice_shape()),
        ),
        (
            "/v1/general/advanced-presets-elements",
            of_task("elements", element_shape()),
        ),
        ("/v1/general/presets-elements", old_element_shape()),
    ] {
        let list = data(&proxy.get(&format!("{path}?pageNum=1&pageSize=30")));
        assert_eq!(shape(&list), json!([item]), "{path}");
        assert!(list.to_string().contains(r#""owned_by":"kling""#), "{list}");
        assert_refused(&proxy.post(path, "{}"), (404, 1202), path);
        asked.insert(("GET", path.to_owned()));
    }
}

/// The older service of elements has no tasks.
fn old_elements_are_kept(proxy: &Proxy, asked: &mut Asked) {
    let path = "/v1/general/custom-elements";
    let body = json!({
        "element_name": "cat", "element_description": "a cat", "element_frontal_image": "AA",
        "element_refer_list": [{ "image_url": "AA" }],
    });
    let created = data(&proxy.post(path, body.to_string()));
    assert_eq!(shape(&created), old_element_shape());
    assert_eq!(
        data(&proxy.get(&format!("{path}/{}", created["element_id"]))),
        created
    );
    assert_eq!(data(&proxy.get(path)), json!([created]));
    let failing = joined(
        &body,
        &json!({ "tag_list": [{ "tag_id": "sandbox:failed" }] }),
    );
    assert_refused(&proxy.post(path, failing.to_string()), (400, 1301), path);
    assert_strict(proxy, path, 500);
    let paths = [
        ("POST", path.to_owned()),
        ("GET", path.to_owned()),
        ("GET", format!("{path}/{{id}}")),
    ];
    asked.extend(paths);
}

fn what_was_made_is_deleted(proxy: &Proxy, asked: &mut Asked) {
    let made = |path: &str, at: &str| {
        let list = data(&proxy.get(path));
        list.pointer(at).expect("what was made").clone()
    };
    let elements = "/v1/general/advanced-custom-elements";
    let status = "/0/task_result/elements/0/status";
    assert_eq!(made(elements, status), "succeed");
    for (path, name, id, message) in [
        (
            "/v1/general/delete-voices",
            "voice_id",
            made(
                "/v1/general/custom-voices",
                "/0/task_result/voices/0/voice_id",
            ),
            "Voice id not found",
        ),
        (
            "/v1/general/delete-advanced-elements",
            "element_id",
            made(elements, "/0/task_result/elements/0/element_id"),
            "Element id not found",
        ),
        (
            "/v1/general/delete-elements",
            "element_id",
            made("/v1/general/custom-elements", "/0/element_id"),
            "Element id not found",
        ),
    ] {
        let id = id.as_str().map_or_else(|| id.to_string(), str::to_owned);
        let body = json!({ name: id }).to_string();
        let deleted = data(&proxy.post(path, &body));
        assert_eq!(
            shape(&deleted),
            json!({ "task_id": "string", "task_status": "string" }),
            "{path}"
        );
        let again = proxy.post(path, &body);
        assert_refused(&again, (400, 1201), path);
        assert_eq!(again.json()["message"], message, "{path}");
        assert_refused(&proxy.post(path, "{}"), (400, 1201), path);
        asked.insert(("POST", path.to_owned()));
    }
    // An element stays and says so, voices and elements of the older service go.
    assert_eq!(made(elements, status), "deleted");
    for path in ["/v1/general/custom-voices", "/v1/general/custom-elements"] {
        assert_eq!(data(&proxy.get(path)), json!([]), "{path}");
    }
}

/// Whatever a family calls its texts, faults can be asked for in them.
#[test]
fn every_trigger_is_obeyed_by_every_family() {
    let command = Command::new(["serve", "--sandbox"]).setting("sandbox.task_time", "0s");
    let proxy = command.setting("retry.attempts", "1").start();
    let all = families().into_iter().chain(answers());
    for (path, body, _) in all {
        let ask = |trigger: &str| {
            let wish = json!({ "callback_url": format!("https://hooks.test/sandbox:{trigger}") });
            proxy.post(path, joined(&body, &wish).to_string())
        };
        for (trigger, refusal) in [
            ("1303", (429, 1303)),
            ("5000", (500, 5000)),
            ("html", (502, 9103)),
            ("reset", (502, 9104)),
            ("mistyped", (400, 1201)),
        ] {
            assert_refused(&ask(trigger), refusal, &format!("{path} {trigger}"));
        }
        data(&ask("slow=1ms"));
        let created = data(&ask("failed"));
        if let Some(id) = created["task_id"]
            .as_str()
            .filter(|_| !path.ends_with("tts"))
        {
            let task = data(&proxy.get(&format!("{path}/{id}")));
            assert_eq!(task["task_status"], "failed", "{path}");
        }
    }
}

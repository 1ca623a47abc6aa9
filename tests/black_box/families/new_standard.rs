//! The new standard, with an API key.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::table::{families, joined, new_families};
use super::{
    Asked, assert_refused, create_query_list, data, sandboxed, sandboxed_with_api_key, shape,
};
use crate::support::{Proxy, now};

const NO_PAIRS: &str = "Authentication error. The current API does not support AK/SK; please go to the console \
    (https://kling.ai/dev/api-key) to create API key.";

#[test]
fn every_path_of_the_new_standard_is_served_to_an_api_key() {
    let (_sandbox, proxy) = sandboxed_with_api_key();
    let mut asked = Asked::new();
    for (path, body, output) in new_families() {
        let is_solution = path.starts_with("/solutions");
        let created = create_new(&proxy, path, &body);
        let (query, product) = if is_solution {
            ("/solutions", None)
        } else {
            ("/tasks", Some(output))
        };
        let task = queried(&proxy, query, &created, path);
        assert_eq!(task["outputs"][0]["type"], output, "{path}");
        let page = listed(&proxy, query, product);
        assert_eq!(page["result"][0], task, "{path}");
        // Neither lists what belongs to the other.
        let other = if is_solution { "/tasks" } else { "/solutions" };
        let id = task["id"].as_str().unwrap();
        assert_eq!(
            data(&proxy.get(&format!("{other}?task_ids={id}"))),
            json!([]),
            "{path}"
        );
        asked.extend([
            ("POST", path.to_owned()),
            ("GET", query.to_owned()),
            ("POST", query.to_owned()),
        ]);
    }
    assert_refused(
        &proxy.post("/text-to-video/kling-o1", r#"{"prompt":"a"}"#),
        (404, 1203),
        "an unknown model",
    );
    ids_are_bounded(&proxy);
    account_is_told(&proxy, &mut asked);
    assert_eq!(asked.len(), 16, "{asked:#?}");
}

/// Creates a task; returns its id.
fn create_new(proxy: &Proxy, path: &str, body: &Value) -> String {
    let body = joined(body, &json!({ "options": { "external_task_id": path } }));
    let created = data(&proxy.post(path, body.to_string()));
    // The try-on calls it so, alone of the new ones.
    let id = if path.ends_with("virtual_try_on") {
        "task_id"
    } else {
        "id"
    };
    let expected = json!({
        id: "string", "status": "string", "create_time": "number", "update_time": "number", "external_id": "string",
    });
    assert_eq!(shape(&created), expected, "{path}");
    assert_eq!(
        (&created["status"], &created["external_id"]),
        (&json!("submitted"), &json!(path)),
        "{path}"
    );
    assert_refused(&proxy.post(path, body.to_string()), (400, 1201), path);
    assert_refused(&proxy.post(path, "{}"), (400, 1201), path);
    assert_refused(&proxy.get(path), (404, 1202), path);
    created[id].as_str().unwrap().to_owned()
}

/// The task as both sorts of ids find it.
fn queried(proxy: &Proxy, query: &str, id: &str, name: &str) -> Value {
    let found = data(&proxy.get(&format!("{query}?task_ids=1,{id}")));
    assert_eq!(
        data(&proxy.get(&format!("{query}?external_task_ids={name}"))),
        found,
        "{name}"
    );
    let [task] = found.as_array().unwrap().as_slice() else {
        panic!("want one task, got {found}");
    };
    let success = if name.ends_with("virtual_try_on") {
        "succeed"
    } else {
        "succeeded"
    };
    assert_eq!(
        (&task["id"], &task["status"]),
        (&json!(id), &json!(success)),
        "{name}"
    );
    let output = match task["outputs"][0]["type"].as_str() {
        Some("image") => json!({ "type": "string", "url": "string" }),
        _ => json!({ "type": "string", "id": "string", "url": "string", "duration": "string" }),
    };
    let expected = json!({
        "id": "string", "status": "string", "message": "string", "create_time": "number", "update_time": "number",
        "external_id": "string", "outputs": [output],
        "billing": [{ "charge_type": "string", "amount": "string", "package_type": "string" }],
    });
    assert_eq!(shape(task), expected, "{name}");
    task.clone()
}

/// The newest task of a cursor list that has more pages.
fn listed(proxy: &Proxy, query: &str, product: Option<&str>) -> Value {
    let mut filters = vec![json!({ "key": "status", "values": ["succeeded"] })];
    filters.extend(product.map(|product| json!({ "key": "product_type", "values": [product] })));
    let time = 1000 * now();
    let body = json!({
        "start_time": time - 60_000, "end_time": (time + 60_000).to_string(), "limit": 1, "filters": filters,
    });
    let page = data(&proxy.post(query, body.to_string()));
    assert_eq!(page["count"], 1, "{page}");
    let cursor = if page["has_more"] == true {
        page["result"][0]["id"].clone()
    } else {
        json!("")
    };
    assert_eq!(page["next_cursor"], cursor, "{page}");
    page
}

fn ids_are_bounded(proxy: &Proxy) {
    for query in ["/tasks", "/solutions"] {
        let ids = |count| vec!["1"; count].join(",");
        assert_eq!(
            data(&proxy.get(&format!("{query}?task_ids={}", ids(20)))),
            json!([])
        );
        let too_many = proxy.get(&format!("{query}?task_ids={}", ids(21)));
        assert_refused(&too_many, (400, 1201), query);
        assert_eq!(
            too_many.json()["message"],
            "task_ids and external_task_ids cannot exceed 20 in total"
        );
        for path in [
            query.to_owned(),
            format!("{query}?task_ids=1&external_task_ids=1"),
        ] {
            assert_refused(&proxy.get(&path), (400, 1201), &path);
        }
        assert_refused(&proxy.post(query, r#"{"limit":501}"#), (400, 1201), query);
    }
}

/// Each of the nine tasks cost one unit: the try-on one for images, the others one for videos.
fn account_is_told(proxy: &Proxy, asked: &mut Asked) {
    let costs = data(&proxy.get("/account/costs?start_time=1&end_time=2"));
    assert_eq!(
        (&costs["code"], &costs["msg"]),
        (&json!(0), &json!("success"))
    );
    for (index, spent) in [8.0, 1.0].into_iter().enumerate() {
        let pack = &costs["resource_pack_subscribe_infos"][index];
        let [total, remaining] =
            ["total_quantity", "remaining_quantity"].map(|name| pack[name].as_f64());
        assert_eq!(total.map(|total| total - spent), remaining, "{pack}");
    }
    asked.insert(("GET", "/account/costs".to_owned()));
    let times = json!({ "start_time": 0, "end_time": 1000 * (now() + 60), "limit": 5 }).to_string();
    for (path, count, has_more) in [
        ("/account/billing/package", 5, true),
        ("/account/billing/balance", 0, false),
    ] {
        let page = data(&proxy.post(path, &times));
        assert_eq!(page["result"]["count"], count, "{path}");
        assert_eq!(
            page["result"]["detail"].as_array().map(Vec::len),
            Some(count),
            "{path}"
        );
        assert_eq!(page["has_more"], has_more, "{path}");
        assert_refused(&proxy.post(path, "{}"), (400, 1201), path);
        asked.insert(("POST", path.to_owned()));
    }
}

#[test]
fn a_key_pair_is_refused_where_the_new_standard_wants_an_api_key() {
    let proxy = sandboxed();
    let creates = new_families()
        .into_iter()
        .map(|(path, body, _)| proxy.post(path, body.to_string()));
    let lists = ["/tasks", "/solutions"];
    let queries = lists
        .iter()
        .map(|path| proxy.get(&format!("{path}?task_ids=1")));
    let cursors = lists.iter().map(|path| proxy.post(path, "{}"));
    let answers: Vec<_> = creates.chain(queries).chain(cursors).collect();
    assert_eq!(answers.len(), 13);
    for answer in answers {
        assert_refused(&answer, (401, 1002), "a key pair");
        assert_eq!(answer.json()["message"], NO_PAIRS);
    }
    // The account takes both.
    let times = json!({ "start_time": 1, "end_time": 2 }).to_string();
    data(&proxy.get("/account/costs?start_time=1&end_time=2"));
    data(&proxy.post("/account/billing/package", &times));
    data(&proxy.post("/account/billing/balance", &times));
}

#[test]
fn an_api_key_is_good_for_legacy_families_whose_tasks_the_new_standard_shows_too() {
    let (_sandbox, proxy) = sandboxed_with_api_key();
    for family in families() {
        let task = create_query_list(&proxy, &mut Asked::new(), &family);
        let id = task["task_id"].as_str().unwrap();
        let found = data(&proxy.get(&format!("/tasks?task_ids={id}")));
        let told =
            ["id", "status", "create_time", "external_id"].map(|name| found[0][name].clone());
        let expected = [
            task["task_id"].clone(),
            json!("succeeded"),
            task["created_at"].clone(),
            task["task_info"]["external_task_id"].clone(),
        ];
        assert_eq!(told, expected, "{}", family.0);
        // The first thing that was made, whatever it is called, is the first of the outputs.
        let results = task["task_result"].as_object().unwrap();
        let (_, made) = results
            .iter()
            .find(|(name, _)| *name == "videos" || results.len() == 1 || *name == "images")
            .unwrap();
        let urls = |value: &Value| {
            let text = value.to_string();
            text.split('"')
                .filter(|part| part.starts_with("http"))
                .map(str::to_owned)
                .collect::<BTreeSet<_>>()
        };
        assert!(
            !urls(made).is_empty() && urls(made).is_subset(&urls(&found[0]["outputs"])),
            "{made} {found}"
        );
    }
}

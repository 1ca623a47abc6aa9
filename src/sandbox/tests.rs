//! Tests of the sandbox as a service, from request to response.

use axum::body::{Bytes, to_bytes};
use axum::http::{Method, StatusCode, header};
use serde_json::{Value, json};
use tokio::time::sleep;

use super::*;
use crate::sandbox::authorization::tests::{NOW, good};

const TEXT: &str = "/v1/videos/text2video";
const IMAGES: &str = "/v1/images/generations";

struct Fixed;

impl Clock for Fixed {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }
}

pub(super) fn options() -> Options {
    Options {
        task_time: Duration::ZERO,
        speed: 1,
        latency: Duration::ZERO,
        concurrency: 3,
        foreign: 0,
        results: Results::Link,
        clock_offset: 0,
        seed: 0,
        public_url: None,
    }
}

fn sandbox(options: Options) -> Sandbox {
    Sandbox::new(
        options,
        SocketAddr::from(([127, 0, 0, 1], 5548)),
        Arc::new(Fixed),
    )
}

async fn send(
    sandbox: &Sandbox,
    method: Method,
    path: &str,
    body: String,
) -> Result<Response<Body>, Reset> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {}", good()))
        .body(Body::from(body));
    sandbox.clone().oneshot(request.unwrap()).await
}

async fn bytes(response: Response<Body>) -> Bytes {
    to_bytes(response.into_body(), usize::MAX).await.unwrap()
}

async fn json_of(answer: Result<Response<Body>, Reset>) -> (u16, Value) {
    let response = answer.unwrap();
    let status = response.status().as_u16();
    (
        status,
        serde_json::from_slice(&bytes(response).await).unwrap(),
    )
}

async fn get(sandbox: &Sandbox, path: &str) -> (u16, Value) {
    json_of(send(sandbox, Method::GET, path, String::new()).await).await
}

async fn post(sandbox: &Sandbox, path: &str, body: Value) -> (u16, Value) {
    json_of(send(sandbox, Method::POST, path, body.to_string()).await).await
}

#[tokio::test]
async fn a_task_goes_from_its_creation_to_a_result_that_can_be_fetched_without_a_token() {
    for (path, folder, content_type) in [
        (TEXT, "videos", "video/mp4"),
        (IMAGES, "images", "image/png"),
    ] {
        let sandbox = sandbox(options());
        let (status, created) = post(&sandbox, path, json!({ "prompt": "a cat" })).await;
        assert_eq!(
            (status, &created["data"]["task_status"]),
            (200, &json!("submitted"))
        );
        let id = created["data"]["task_id"].as_str().unwrap();
        let (_, found) = get(&sandbox, &format!("{path}/{id}")).await;
        let url = found["data"]["task_result"][folder][0]["url"]
            .as_str()
            .unwrap();
        let target = url.strip_prefix("http://127.0.0.1:5548").unwrap();
        let request = Request::get(target).body(Body::empty()).unwrap();
        let file = sandbox.clone().oneshot(request).await.unwrap();
        assert_eq!(file.headers()[header::CONTENT_TYPE], content_type);
        assert!(bytes(file).await.len() > 1000, "{path}");
    }
}

#[tokio::test]
async fn empty_segments_of_a_path_do_not_count() {
    let sandbox = sandbox(options());
    let body = json!({ "prompt": "a", "external_task_id": "mine" });
    let (status, _) = post(&sandbox, "/v1/videos//text2video/", body).await;
    assert_eq!(status, 200);
    let (status, found) = get(&sandbox, "/v1/videos/text2video//mine").await;
    assert_eq!((status, &found["code"]), (200, &json!(0)), "{found}");
    let (_, list) = get(&sandbox, "/v1/videos/text2video/?pageNum=1&pageSize=500").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
}

#[tokio::test]
async fn a_refusal_has_the_status_and_code_of_its_reason() {
    let sandbox = sandbox(options());
    let times = "start_time=1&end_time=2";
    for (path, status, code) in [
        (format!("/account/costs?{times}"), 200, 0),
        ("/account/costs".to_owned(), 400, 1201),
        ("/account/costs?start_time=1".to_owned(), 400, 1201),
        (
            "/account/costs?start_time=2&end_time=1".to_owned(),
            400,
            1201,
        ),
        (
            "/account/costs?start_time=1.5&end_time=2".to_owned(),
            400,
            1201,
        ),
        (format!("{TEXT}?pageNum=0"), 400, 1201),
        (format!("{TEXT}?pageNum=1001"), 400, 1201),
        (format!("{TEXT}?pageSize=501"), 400, 1201),
        (format!("{TEXT}/123456789012345678"), 400, 1201),
        ("/v1/videos/unknown".to_owned(), 404, 1203),
        ("/tasks?task_ids=1".to_owned(), 401, 1002),
    ] {
        let (got, answer) = get(&sandbox, &path).await;
        assert_eq!(
            (got, &answer["code"]),
            (status, &json!(code)),
            "{path}: {answer}"
        );
    }
    let wrong_method = send(&sandbox, Method::DELETE, TEXT, String::new()).await;
    let (status, answer) = json_of(wrong_method).await;
    assert_eq!((status, &answer["code"]), (404, &json!(1202)));
    let unauthorized = Request::get(TEXT).body(Body::empty()).unwrap();
    let (status, answer) = json_of(sandbox.clone().oneshot(unauthorized).await).await;
    assert_eq!((status, &answer["code"]), (401, &json!(1001)));
}

#[tokio::test]
async fn a_trigger_is_obeyed_after_the_parameters_are_checked() {
    let sandbox = sandbox(options());
    for (prompt, status, code) in [("sandbox:5001", 503, 5001), ("sandbox:1303@200", 200, 1303)] {
        let (got, answer) = post(&sandbox, TEXT, json!({ "prompt": prompt })).await;
        assert_eq!((got, &answer["code"]), (status, &json!(code)), "{prompt}");
        let (_, answer) = post(&sandbox, IMAGES, json!({ "prompt": prompt, "n": 0 })).await;
        assert_eq!(answer["code"], 1201, "{prompt}");
    }
    let body = json!({ "prompt": "sandbox:html" }).to_string();
    let page = send(&sandbox, Method::POST, TEXT, body).await.unwrap();
    assert_eq!(page.status(), StatusCode::BAD_GATEWAY);
    assert_eq!(
        page.headers()[header::CONTENT_TYPE],
        "text/html; charset=utf-8"
    );
    let (_, list) = get(&sandbox, TEXT).await;
    assert_eq!(list["data"], json!([]), "none of them creates a task");
}

#[tokio::test]
async fn a_reset_comes_after_the_task_was_created() {
    let sandbox = sandbox(options());
    let body = json!({ "prompt": "sandbox:slow=10ms sandbox:reset", "external_task_id": "mine" });
    let begin = Instant::now();
    let answer = send(&sandbox, Method::POST, TEXT, body.to_string()).await;
    assert_eq!(answer.unwrap_err(), Reset);
    assert!(begin.elapsed() >= Duration::from_millis(10));
    let (status, _) = get(&sandbox, &format!("{TEXT}/mine")).await;
    assert_eq!(status, 200);
    let (_, again) = post(&sandbox, TEXT, body).await;
    assert_eq!(again["message"], "External_task_id mine already exists");
}

#[tokio::test]
async fn the_clock_offset_is_seen_in_the_date_and_in_the_verdict_on_a_token() {
    for (clock_offset, date, status) in [
        (0, "Fri, 15 Jan 2027 08:00:00 GMT", 200),
        (-60, "Fri, 15 Jan 2027 07:59:00 GMT", 401),
        (3600, "Fri, 15 Jan 2027 09:00:00 GMT", 401),
        (i64::MIN, "Thu, 01 Jan 1970 00:00:00 GMT", 401),
        (i64::MAX, "Fri, 31 Dec 9999 23:59:59 GMT", 401),
    ] {
        let sandbox = sandbox(Options {
            clock_offset,
            ..options()
        });
        let answer = send(&sandbox, Method::GET, TEXT, String::new())
            .await
            .unwrap();
        assert_eq!(answer.headers()[DATE], date, "{clock_offset}");
        assert_eq!(answer.status().as_u16(), status, "{clock_offset}");
    }
}

#[tokio::test]
async fn the_root_answers_without_a_token() {
    let request = Request::head("/").body(Body::empty()).unwrap();
    let answer = sandbox(options()).oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
}

#[test]
fn the_keys_are_as_long_as_real_ones() {
    assert_eq!((ACCESS_KEY.len(), SECRET_KEY.len()), (32, 32));
}

/// Time range of a ledger that includes every deduction of a test.
fn all_times() -> Value {
    json!({ "start_time": 0, "end_time": 1000 * NOW + 1_000_000 })
}

#[tokio::test]
async fn the_account_has_a_pack_of_each_type_whose_name_has_its_slots() {
    let sandbox = sandbox(Options {
        concurrency: 5,
        ..options()
    });
    let names = async |query: &str| {
        let path = format!("/account/costs?start_time=1&end_time=2{query}");
        let (_, answer) = get(&sandbox, &path).await;
        let packs = answer["data"]["resource_pack_subscribe_infos"].as_array();
        let name = |pack: &Value| pack["resource_pack_name"].as_str().unwrap().to_owned();
        packs.unwrap().iter().map(name).collect::<Vec<_>>()
    };
    let [video, image] =
        ["Video", "Image"].map(|title| format!("Trial-{title}-1000000Units-5Con-12Months"));
    assert_eq!(names("").await, [video, image.clone()]);
    let filter = format!("&resource_pack_name={image}");
    assert_eq!(names(&filter).await, [image]);
    assert_eq!(names("&resource_pack_name=Other").await, [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_remains_of_a_pack_goes_down_when_a_task_has_ended() {
    let sandbox = sandbox(Options {
        task_time: Duration::from_secs(3),
        ..options()
    });
    let remaining = async || {
        let (_, answer) = get(&sandbox, "/account/costs?start_time=1&end_time=2").await;
        let packs = &answer["data"]["resource_pack_subscribe_infos"];
        [0, 1].map(|index| packs[index]["remaining_quantity"].as_f64())
    };
    let (_, created) = post(&sandbox, IMAGES, json!({ "prompt": "a", "n": 3 })).await;
    post(&sandbox, TEXT, json!({ "prompt": "sandbox:1301" })).await;
    post(&sandbox, TEXT, json!({ "prompt": "sandbox:failed" })).await;
    let ledger = async || {
        let (_, answer) = post(&sandbox, "/account/billing/package", all_times()).await;
        answer["data"]["result"]["detail"].clone()
    };
    sleep(Duration::from_millis(2999)).await;
    assert_eq!(remaining().await, [Some(1e6); 2]);
    assert_eq!(ledger().await, json!([]));
    sleep(Duration::from_millis(1)).await;
    assert_eq!(remaining().await, [Some(1e6), Some(999_997.0)]);
    let expected = json!([{
        "task_id": created["data"]["task_id"],
        "api_key_name": "sandbox",
        "product_function": "generations",
        "model_name": null,
        "package_id": "00000000000000000000000000000002",
        "product_type": "image",
        "deduction_time": (1000 * NOW + 3000).to_string(),
        "unit_before_deduction": 1e6,
        "deduction_amount": 3.0,
        "unit_after_deduction": 999_997.0,
    }]);
    assert_eq!(ledger().await, expected);
}

#[tokio::test]
async fn tasks_of_somebody_else_are_in_the_lists_and_hold_slots() {
    let sandbox = sandbox(Options {
        foreign: 2,
        ..options()
    });
    let body = json!({ "filters": [
        { "key": "status", "values": ["submitted", "processing"] },
        { "key": "product_type", "values": ["video"] },
    ] });
    let request = Request::post("/tasks")
        .header(header::AUTHORIZATION, format!("Bearer {API_KEY}"))
        .body(Body::from(body.to_string()));
    let (_, running) = json_of(sandbox.clone().oneshot(request.unwrap()).await).await;
    assert_eq!(running["data"]["count"], 2, "{running}");
    for (path, n, status) in [(TEXT, 1, 200), (IMAGES, 1, 200), (IMAGES, 2, 429)] {
        let (got, _) = post(&sandbox, path, json!({ "prompt": "a", "n": n })).await;
        assert_eq!(got, status, "{path} with {n}");
    }
}

#[tokio::test]
async fn a_lost_answer_comes_from_a_gateway_after_the_task_was_created() {
    let sandbox = sandbox(options());
    let body = json!({ "prompt": "sandbox:lost", "external_task_id": "mine" });
    let answer = send(&sandbox, Method::POST, TEXT, body.to_string()).await;
    let answer = answer.unwrap();
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    let page = bytes(answer).await;
    assert!(serde_json::from_slice::<Value>(&page).is_err(), "{page:?}");
    let (_, found) = get(&sandbox, &format!("{TEXT}/mine")).await;
    assert_eq!(found["data"]["task_status"], "succeed");
    let (_, again) = post(&sandbox, TEXT, body).await;
    assert_eq!(again["message"], "External_task_id mine already exists");
}

#[tokio::test(start_paused = true)]
async fn every_create_takes_the_latency_and_its_own_delay_to_answer() {
    let sandbox = sandbox(Options {
        latency: Duration::from_millis(500),
        speed: 10,
        ..options()
    });
    for (prompt, milliseconds) in [
        ("a", 500),
        ("", 500),
        ("sandbox:1303", 500),
        ("sandbox:slow=2s", 2500),
    ] {
        let begin = Instant::now();
        post(&sandbox, TEXT, json!({ "prompt": prompt })).await;
        assert_eq!(begin.elapsed().as_millis(), milliseconds, "{prompt}");
    }
    let begin = Instant::now();
    get(&sandbox, TEXT).await;
    assert!(begin.elapsed().is_zero(), "a read");
}

#[tokio::test]
async fn results_are_data_urls_if_the_options_say_so() {
    let sandbox = sandbox(Options {
        results: Results::Data,
        ..options()
    });
    let (_, created) = post(&sandbox, TEXT, json!({ "prompt": "a" })).await;
    let id = created["data"]["task_id"].as_str().unwrap();
    let (_, found) = get(&sandbox, &format!("{TEXT}/{id}")).await;
    let url = &found["data"]["task_result"]["videos"][0]["url"];
    let start = &url.as_str().unwrap()[..22];
    assert_eq!(start, "data:video/mp4;base64,");
}

#[tokio::test]
async fn a_result_is_deleted_after_30_days_and_its_task_is_not() {
    let made = sandbox(options());
    let (_, created) = post(&made, TEXT, json!({ "prompt": "a" })).await;
    let id = created["data"]["task_id"].as_str().unwrap();
    let (_, found) = get(&made, &format!("{TEXT}/{id}")).await;
    let url = &found["data"]["task_result"]["videos"][0]["url"];
    let path = url
        .as_str()
        .unwrap()
        .strip_prefix("http://127.0.0.1:5548")
        .unwrap();
    let days = 24 * 3600;
    for (clock_offset, status) in [(30 * days - 1, 200), (30 * days, 404)] {
        let later = sandbox(Options {
            clock_offset,
            ..options()
        });
        let answer = send(&later, Method::GET, path, String::new())
            .await
            .unwrap();
        assert_eq!(answer.status(), status, "after {clock_offset} s");
    }
}

#[tokio::test]
async fn an_unknown_model_is_refused_with_1203() {
    let sandbox = sandbox(options());
    for (model, status) in [("kling-3.0", 200), ("kling-o1", 404), ("kling-9", 404)] {
        let request = Request::post(format!("/text-to-video/{model}"))
            .header(header::AUTHORIZATION, format!("Bearer {API_KEY}"))
            .body(Body::from(r#"{"prompt":"a"}"#));
        let answer = sandbox.clone().oneshot(request.unwrap()).await.unwrap();
        assert_eq!(answer.status(), status, "{model}");
    }
}

//! Scenarios to count: requests through the whole stack, and two parts of the stack alone.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, USER_AGENT};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use kling_proxy::internals::{
    Clock, Credential, Flags, LogFormat, Metrics, Network, Parts, Peek, Purpose, Rules, Secret,
    Settings, Shared, Sqlite, SystemClock, client_config, envelope, init_log, service_code,
};
use tokio::runtime;
use tokio_util::task::TaskTracker;
use tower::Service;

use crate::upstream;
use crate::valgrind::counted;

/// Counted calls of a scenario. They are so many that work done once for all of them does not show.
pub(crate) const CALLS: u64 = 100;
/// Calls before the counted ones. They connect, mint the token and let buffers grow.
const WARM_UP: u64 = 20;

/// Every scenario with its name.
pub(crate) const SCENARIOS: [(&str, fn()); 6] = [
    ("poll", poll),
    ("running_poll", running_poll),
    ("create", create),
    ("error", error),
    ("token_cached", token_cached),
    ("service_code", service_code),
];

const SUCCEEDED: &str = r#"{"code":0,"message":"SUCCEED","request_id":"CmYbBGdv6pUAAAAAAB4Xgg","data":{"task_id":"829836802793406551","task_status":"succeed","task_status_msg":"","task_info":{"external_task_id":"shot-0001"},"created_at":1722769557708,"updated_at":1722769559708,"task_result":{"videos":[{"id":"f2b1a6c2-1b1f-4d9e-9b0a-5b8f6f3f6b1e","url":"https://video.example/829836802793406551/f2b1a6c2-1b1f-4d9e-9b0a-5b8f6f3f6b1e/0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0.mp4?x-pid=112781&token=0123456789abcdef01234","duration":"5.1"}]},"final_unit_deduction":"0.35"}}"#;
const SUBMITTED: &str = r#"{"code":0,"message":"SUCCEED","request_id":"CmYbBGdv6pUAAAAAAB4Xgg","data":{"task_id":"829836802793406551","task_status":"submitted","task_info":{"external_task_id":"shot-0001"},"created_at":1722769557708,"updated_at":1722769557708}}"#;
const LIMITED: &str = r#"{"code":1303,"message":"parallel task over resource pack limit","request_id":"CmYbBGdv6pUAAAAAAB4Xgg"}"#;
const ORDER: &str = r#"{"model_name":"kling-v2-6","mode":"std","duration":"5","aspect_ratio":"16:9","prompt":"a cat rides a bicycle through the rain, seen from above","external_task_id":"shot-0001"}"#;

/// A poll of a task that has ended.
fn poll() {
    exchange(&[], ask_for_task, "\r\n\r\n", StatusCode::OK, SUCCEEDED);
}

/// A poll of a task that runs, with the answer of the poll before.
fn running_poll() {
    let create = || {
        let create = ask(Method::POST, "/v1/videos/text2video");
        create.body(Body::empty()).unwrap()
    };
    exchange(
        &[create],
        ask_for_task,
        "\r\n\r\n",
        StatusCode::OK,
        SUBMITTED,
    );
}

fn ask_for_task() -> Request {
    let path = "/v1/videos/text2video/829836802793406551";
    ask(Method::GET, path).body(Body::empty()).unwrap()
}

fn create() {
    exchange(&[], order, ORDER, StatusCode::OK, SUBMITTED);
}

/// A create that is refused, with a log line like that of a successful create.
fn error() {
    exchange(&[], order, ORDER, StatusCode::TOO_MANY_REQUESTS, LIMITED);
}

/// The `Authorization` value of a token that was minted before.
fn token_cached() {
    let tokens = shared(&settings(&[])).tokens;
    tokens.bearer().unwrap();
    counted(&mut || {
        for _ in 0..CALLS {
            black_box(tokens.bearer()).unwrap();
        }
    });
}

/// A service code in a response with a successful HTTP status: first `peek`, then `read`.
fn service_code() {
    counted(&mut || {
        for _ in 0..CALLS {
            let text = black_box(LIMITED.as_bytes());
            assert_eq!(envelope::peek(text), Peek::Code(1303));
            let envelope = envelope::read(text).unwrap();
            assert_eq!(service_code::sent_by_kling(envelope.code).code, 1303);
        }
    });
}

fn order() -> Request {
    let path = "/v1/videos/text2video";
    let request = ask(Method::POST, path)
        .header(CONTENT_TYPE, "application/json")
        .header(CONTENT_LENGTH, ORDER.len());
    request.body(Body::from(ORDER)).unwrap()
}

fn ask(method: Method, path: &str) -> http::request::Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost:5546")
        .header(USER_AGENT, "python-requests/2.32.5")
        .header("accept-encoding", "gzip, deflate")
        .header(ACCEPT, "*/*")
        .header("authorization", "Bearer of-the-client")
}

/// Sends requests through the stack and reads the responses to their end: first those that set the scenario
/// up. `end` is the end of a request as upstream sees it.
fn exchange(
    set_up: &[fn() -> Request],
    request: fn() -> Request,
    end: &'static str,
    status: StatusCode,
    body: &str,
) {
    let answer = format!(
        "HTTP/1.1 {status}\r\n\
         date: Sun, 22 Nov 2026 12:00:00 GMT\r\n\
         content-type: application/json; charset=utf-8\r\n\
         content-length: {}\r\n\
         x-request-id: CmYbBGdv6pUAAAAAAB4Xgg\r\n\r\n{body}",
        body.len()
    );
    let upstream = upstream::start(end.as_bytes(), answer.into_bytes());
    // A retry would wait for a random time, so errors are not retried.
    let settings = settings(&[
        ("KLING_PROXY_UPSTREAM__URL", &format!("http://{upstream}")),
        (
            "KLING_PROXY_RETRY__ATTEMPTS",
            if status.is_success() { "3" } else { "1" },
        ),
    ]);
    init_log(LogFormat::Json, settings.log.filter.clone());
    let shared = shared(&settings);
    store(&shared);
    let mut stack = shared.stack(&TaskTracker::new());
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.unwrap();
    let mut send = |requests: &mut Vec<Request>| {
        runtime.block_on(async {
            for request in requests.drain(..) {
                let Ok(mut response) = stack.call(request).await;
                assert_eq!(response.status(), status);
                while let Some(frame) = response.frame().await {
                    black_box(frame.unwrap());
                }
            }
        });
    };
    send(&mut set_up.iter().map(|request| request()).collect());
    send(&mut (0..WARM_UP).map(|_| request()).collect());
    let mut requests = (0..CALLS).map(|_| request()).collect();
    counted(&mut || send(&mut requests));
}

/// Runs the store of tasks on a thread of its own, as `serve` does. It is not counted.
fn store(shared: &Shared) {
    let (ledger, now) = (shared.ledger.clone(), SystemClock.now());
    thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let store = Sqlite::in_memory("bench".to_owned(), now).unwrap();
        runtime
            .unwrap()
            .block_on(ledger.run(Box::new(store), Duration::MAX));
    });
}

/// Returns the default settings, except for these variables.
fn settings(variables: &[(&str, &str)]) -> Settings {
    let variables = variables.iter().copied().collect();
    let (settings, _) = Settings::load(&Flags::default(), &variables).unwrap();
    settings
}

/// Puts the parts together as `serve` does.
fn shared(settings: &Settings) -> Shared {
    let tls = client_config(settings.upstream.ca_file.as_deref()).unwrap();
    let timeouts = settings.upstream.timeouts;
    let origin = settings.upstream.origin.clone();
    Shared::new(Parts {
        credential: credential(),
        validity: settings.token,
        rules: Rules {
            allowed_hosts: settings.access.allowed_hosts.clone(),
            allowed_origins: settings.access.allowed_origins.clone(),
            allowed_methods: settings.access.allowed_methods.clone(),
            allowed_paths: settings.access.allowed_paths.clone(),
            client_tokens: None,
            request_body: settings.limits.request_body,
            in_flight: settings.limits.in_flight,
            purpose: Purpose::Serve,
        },
        errors: settings.errors,
        retry: settings.retry,
        replay: settings.replay,
        dial: Arc::new(Network::new(&origin, None, &tls, timeouts.idle)),
        origin,
        sandboxed: false,
        admin: None,
        timeouts,
        waiting: settings.state.waiting,
        clock: Arc::new(SystemClock),
        metrics: Arc::new(Metrics::new().unwrap()),
    })
}

fn credential() -> Credential {
    let [access_key, secret_key] = ["access", "secret"].map(|key| Secret::from(key.repeat(5)));
    Credential::Pair {
        access_key,
        secret_key,
    }
}

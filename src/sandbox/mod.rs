//! A strict stand-in for the Kling API, so that a client can be tested without an account or a network.
//!
//! It speaks the most used legacy families and `GET /account/costs`, and verifies tokens by literals of its
//! own. Tasks succeed with time and point at playable results. Words in a prompt ask for faults, such as
//! `sandbox:1303`, `sandbox:failed`, `sandbox:slow=5s`, `sandbox:html` and `sandbox:reset`.

mod authorization;
mod order;
mod reply;
mod routes;
mod tasks;
mod trigger;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::http::header::{DATE, HeaderValue};
use axum::http::{Request, Response, Uri};
use tower::{Service, ServiceExt};

use crate::clock::Clock;
use tasks::Tasks;

/// The access key of the sandbox's one account.
pub const ACCESS_KEY: &str = "sandboxAccessKeyForTestsOnly0000";

/// The secret key of the sandbox's one account. It guards nothing.
pub const SECRET_KEY: &str = "sandboxSecretKeyForTestsOnly0000";

/// How the sandbox behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// From the creation of a task to its end; it is `submitted` for the first third.
    pub task_time: Duration,
    /// Slots for running tasks; over it 1303. An image task holds `n` slots, a video 1.
    pub concurrency: usize,
    /// Seconds by which the sandbox's clock is ahead of ours.
    pub clock_offset: i64,
    /// Task ids are the same for the same seed.
    pub seed: u64,
    /// Base of the result URLs; `http://` and the sandbox's address where it is `None`.
    pub public_url: Option<String>,
}

/// The sandbox as a service, to be served on any connection.
#[derive(Clone)]
pub struct Sandbox {
    account: Arc<Account>,
    router: Router,
}

/// The connection is dropped without an answer, as `sandbox:reset` asks.
///
/// hyper does so when a service fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox was asked to drop the connection")]
pub struct Reset;

/// What all requests share.
struct Account {
    clock: Arc<dyn Clock>,
    clock_offset: i64,
    tasks: Mutex<Tasks>,
}

/// The last second that a `Date` header can express.
const END_OF_TIME: Duration = Duration::from_secs(253_402_300_799);

// === impl Sandbox ===

impl Sandbox {
    /// Creates a sandbox without tasks, to be served at `address`.
    pub fn new(options: Options, address: SocketAddr, clock: Arc<dyn Clock>) -> Self {
        let base = options
            .public_url
            .unwrap_or_else(|| format!("http://{address}"));
        let results = format!("{}{}", base.trim_end_matches('/'), routes::RESULTS);
        let tasks = Tasks::new(
            options.seed,
            options.task_time,
            options.concurrency,
            results,
        );
        let account = Arc::new(Account {
            clock,
            clock_offset: options.clock_offset,
            tasks: Mutex::new(tasks),
        });
        Self {
            router: routes::router(account.clone()),
            account,
        }
    }
}

impl Service<Request<Body>> for Sandbox {
    type Response = Response<Body>;
    type Error = Reset;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Reset>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Reset>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        *request.uri_mut() = tidy(request.uri());
        let answer = self.router.clone().oneshot(request);
        let account = self.account.clone();
        Box::pin(async move {
            let Ok::<_, Infallible>(mut response) = answer.await;
            if response.extensions().get::<Reset>().is_some() {
                return Err(Reset);
            }
            let date = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + account.now());
            if let Ok(date) = HeaderValue::try_from(date) {
                response.headers_mut().insert(DATE, date);
            }
            Ok(response)
        })
    }
}

/// Drops empty segments, which real clients send: `…/kolors-virtual-try-on//<id>`, `…/image2video/`.
fn tidy(uri: &Uri) -> Uri {
    let mut target = String::new();
    for segment in uri.path().split('/').filter(|segment| !segment.is_empty()) {
        target.push('/');
        target.push_str(segment);
    }
    if target.is_empty() {
        target.push('/');
    }
    if let Some(query) = uri.query() {
        target.push('?');
        target.push_str(query);
    }
    target.parse().unwrap_or_else(|_| uri.clone())
}

// === impl Account ===

impl Account {
    /// The time by the sandbox's clock, since the epoch.
    fn now(&self) -> Duration {
        let now = self
            .clock
            .now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let offset = Duration::from_secs(self.clock_offset.unsigned_abs());
        let shifted = if self.clock_offset < 0 {
            now.saturating_sub(offset)
        } else {
            now.saturating_add(offset)
        };
        shifted.min(END_OF_TIME)
    }

    /// A lock that is never held across an await.
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Bytes, to_bytes};
    use axum::http::{Method, StatusCode, header};
    use serde_json::{Value, json};

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

    fn options() -> Options {
        Options {
            task_time: Duration::ZERO,
            concurrency: 3,
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
        for (prompt, status, code) in [("sandbox:5001", 503, 5001), ("sandbox:1303@200", 200, 1303)]
        {
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
        let body =
            json!({ "prompt": "sandbox:slow=10ms sandbox:reset", "external_task_id": "mine" });
        let begin = tokio::time::Instant::now();
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
}

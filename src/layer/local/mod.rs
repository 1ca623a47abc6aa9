//! Answers the requests that are for the proxy itself: `/`, `/favicon.ico`, and everything below `/_proxy`.
//! All other requests pass.

mod events;
mod search;
pub mod tasks;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::future::{Either, ready};
use http::header::{CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Method, StatusCode};
use tower::{Layer, Service};

use self::events::EventsRequest;
use self::search::Search;
use self::tasks::TaskRequest;
use crate::error::Error;
use crate::kling::api_path::is_under;
use crate::layer::Refusable;
use crate::layer::wait::WaitLayer;
use crate::request::context::ProxyRequest;
use crate::request::preference;
use crate::tasks::ledger::Ledger;

/// Prefix of the paths that the proxy reserves for itself, with all methods.
const RESERVED: &str = "/_proxy";
/// Path of the text that says to a browser or to curl which program answers.
const FRONT_PAGE: &str = "/";
/// Path that each browser requests for a page without an icon of its own (HTML Standard, section 4.6.7.9).
const ICON: &str = "/favicon.ico";

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const NO_SNIFF: HeaderValue = HeaderValue::from_static("nosniff");

/// Adds [`Local`] to a service.
#[derive(Clone)]
pub struct LocalLayer {
    front_page: Bytes,
    ledger: Ledger,
    wait: WaitLayer,
    search: Arc<Search>,
}

/// Answers requests for the proxy itself, and passes all others.
#[derive(Clone)]
pub struct Local<S> {
    inner: S,
    layer: LocalLayer,
}

/// Future of an answer that waits for the store.
type TaskAnswer = Pin<Box<dyn Future<Output = Result<Response, Error>> + Send>>;

/// Answer to a request for the proxy itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    FrontPage,
    NoIcon,
    Reserved,
}

/// Returns true if the proxy answers a request itself.
///
/// `GET` and `HEAD` only for `/` and the icon: any other method may mean something to upstream.
pub fn is_local(request: &Request) -> bool {
    Answer::to(request.method(), request.uri().path()).is_some()
}

/// Returns true if the path of a request is reserved for the proxy.
pub fn is_reserved(request: &Request) -> bool {
    is_under(request.uri().path(), RESERVED)
}

/// Writes the text of `/`. `upstream` says where other requests go, and `admin` is the URL of the admin
/// listener.
fn front_page(upstream: &str, admin: Option<&str>) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let health = match admin {
        Some(admin) => format!("{admin}/health/ready and {admin}/metrics"),
        None => "this proxy has no admin listener (admin.address)".to_owned(),
    };
    format!(
        "kling-proxy {version}: a local proxy for the Kling AI API\n\
         \n\
         Use this address as the base URL of your client. The proxy adds the credential, and sends each\n\
         request to {upstream}.\n\
         \n\
         tasks            GET /_proxy/tasks, or `kling-proxy tasks`\n\
         health, metrics  {health}\n\
         documentation    the folder docs/ of the source code, and `kling-proxy --help`\n\
         error codes      `kling-proxy explain CODE`\n"
    )
}

// === impl LocalLayer ===

impl LocalLayer {
    /// Makes a layer with the text of `/`. `upstream` says where other requests go, and `admin` is the URL of the
    /// admin listener, if there is one.
    pub fn new(upstream: &str, admin: Option<&str>, ledger: Ledger, wait: WaitLayer) -> Self {
        let front_page = front_page(upstream, admin).into();
        Self {
            front_page,
            ledger,
            wait,
            search: Arc::default(),
        }
    }
}

impl<S> Layer<S> for LocalLayer {
    type Service = Local<S>;

    fn layer(&self, inner: S) -> Local<S> {
        let layer = self.clone();
        Local { inner, layer }
    }
}

// === impl Local ===

impl<S> Local<S> {
    fn answer(&self, answer: Answer) -> Result<Response, Error> {
        match answer {
            Answer::FrontPage => {
                let headers = [(CONTENT_TYPE, TEXT), (X_CONTENT_TYPE_OPTIONS, NO_SNIFF)];
                Ok((headers, Body::from(self.layer.front_page.clone())).into_response())
            }
            Answer::NoIcon => Ok(StatusCode::NO_CONTENT.into_response()),
            Answer::Reserved => Err(Error::NotFound("nothing is at this reserved path")),
        }
    }
}

impl<S> Local<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Error, Future: Send>
        + Clone
        + Send
        + 'static,
{
    /// Answers a request about tasks or for events. Hands back [`Answer::Reserved`] if it is for nothing of
    /// these.
    fn about_tasks(&self, inbound: &ProxyRequest) -> Result<TaskAnswer, Answer> {
        let ProxyRequest { request, context } = inbound;
        let LocalLayer {
            ledger,
            wait,
            search,
            ..
        } = self.layer.clone();
        if let Some(asked) = TaskRequest::of(request, context) {
            let time = preference::wait(request.headers());
            let inner = self.inner.clone();
            return Ok(Box::pin(async move {
                asked.search(&search, inner.clone(), &ledger).await;
                match time {
                    Some(time) => asked.wait(time, inner, ledger, wait).await,
                    None => asked.answer(ledger).await,
                }
            }));
        }
        let asked = EventsRequest::of(request, context).ok_or(Answer::Reserved)?;
        Ok(Box::pin(asked.answer(ledger, wait)))
    }
}

impl<S> Service<ProxyRequest> for Local<S>
where
    S: Service<ProxyRequest, Response = Response, Error = Error, Future: Send>
        + Clone
        + Send
        + 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<TaskAnswer, Refusable<S::Future>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, inbound: ProxyRequest) -> Self::Future {
        let request = &inbound.request;
        let answer = match Answer::to(request.method(), request.uri().path()) {
            None => return Either::Right(Either::Right(self.inner.call(inbound))),
            Some(Answer::Reserved) => self.about_tasks(&inbound),
            Some(answer) => Err(answer),
        };
        match answer {
            Ok(answer) => Either::Left(answer),
            Err(answer) => Either::Right(Either::Left(ready(self.answer(answer)))),
        }
    }
}

// === impl Answer ===

impl Answer {
    /// Returns the answer to a request; `None` if the request is not for the proxy itself.
    fn to(method: &Method, path: &str) -> Option<Self> {
        if is_under(path, RESERVED) {
            return Some(Self::Reserved);
        }
        let answer = match path {
            FRONT_PAGE => Self::FrontPage,
            ICON => Self::NoIcon,
            _ => return None,
        };
        [Method::GET, Method::HEAD]
            .contains(method)
            .then_some(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_answers_two_pages_and_its_reserved_paths_and_nothing_else() {
        for (method, path, answer) in [
            (Method::GET, "/", Some(Answer::FrontPage)),
            (Method::HEAD, "/", Some(Answer::FrontPage)),
            (Method::GET, "/favicon.ico", Some(Answer::NoIcon)),
            (Method::HEAD, "/favicon.ico", Some(Answer::NoIcon)),
            (Method::GET, "/_proxy", Some(Answer::Reserved)),
            (Method::POST, "/_proxy/x", Some(Answer::Reserved)),
            (Method::POST, "/", None),
            (Method::OPTIONS, "/", None),
            (Method::PUT, "/favicon.ico", None),
            (Method::GET, "//", None),
            (Method::GET, "/.", None),
            (Method::GET, "/%2f", None),
            (Method::GET, "/favicon.ico/", None),
            (Method::GET, "/v1/favicon.ico", None),
            (Method::GET, "/_proxyx", None),
            (Method::OPTIONS, "*", None),
            (Method::CONNECT, "", None),
        ] {
            assert_eq!(Answer::to(&method, path), answer, "{method} {path}");
        }
    }

    #[test]
    fn front_page_names_upstream_and_the_admin_listener() {
        let text = front_page("https://kling.test", Some("http://127.0.0.1:5547"));
        for line in [
            "request to https://kling.test.",
            "health, metrics  http://127.0.0.1:5547/health/ready and http://127.0.0.1:5547/metrics",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        let text = front_page("https://kling.test", None);
        assert!(text.contains("no admin listener"), "{text}");
    }
}

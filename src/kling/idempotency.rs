//! Classifies requests: those that only read, and those that may create something that is paid for.

use http::{Method, Request};

/// Effect of a request upstream, and so the cost of sending it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The request changes nothing: sending it again costs nothing.
    Read,
    /// The request may create a task: sending it again may bill the user twice.
    Create,
}

/// `POST` paths that only read: lists with a cursor, in the vendor's documentation of 2026-11-22.
const READ_PATHS: [&str; 2] = ["/tasks", "/solutions"];
/// Parent of further `POST` paths that only read; they have exactly one more segment.
const READ_PARENT: &str = "/account/billing/";

// === impl Effect ===

impl Effect {
    /// Classifies a request by its method and path. In doubt it is a create.
    pub fn of<B>(request: &Request<B>) -> Self {
        let read = match *request.method() {
            Method::GET | Method::HEAD | Method::OPTIONS => true,
            Method::POST => posts_a_read(request.uri().path()),
            _ => false,
        };
        if read { Self::Read } else { Self::Create }
    }
}

fn posts_a_read(path: &str) -> bool {
    // Plain letters only: upstream might resolve `/account/billing/%2e%2e/…` to a create.
    let plain = |segment: &str| {
        !segment.is_empty()
            && segment
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    READ_PATHS.contains(&path) || path.strip_prefix(READ_PARENT).is_some_and(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_to_read_is_a_read() {
        for (method, path, effect) in [
            ("GET", "/v1/videos/text2video/1", Effect::Read),
            ("HEAD", "/", Effect::Read),
            ("OPTIONS", "/v1/videos/text2video", Effect::Read),
            ("POST", "/tasks", Effect::Read),
            ("POST", "/tasks?limit=1", Effect::Read),
            ("POST", "/solutions", Effect::Read),
            ("POST", "/account/billing/balance", Effect::Read),
            ("POST", "/v1/videos/text2video", Effect::Create),
            ("POST", "/tasks/", Effect::Create),
            ("POST", "//tasks", Effect::Create),
            ("POST", "/solutions/virtual_try_on", Effect::Create),
            ("POST", "/account/billing/", Effect::Create),
            (
                "POST",
                "/account/billing/../../v1/videos/text2video",
                Effect::Create,
            ),
            ("POST", "/account/billing/%2e%2e", Effect::Create),
            ("PUT", "/tasks", Effect::Create),
            ("DELETE", "/tasks", Effect::Create),
        ] {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .body(())
                .unwrap();
            assert_eq!(Effect::of(&request), effect, "{method} {path}");
        }
    }
}

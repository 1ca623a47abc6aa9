//! Kinds of credential that Kling accepts on each path.
//!
//! Tokens of key pairs are accepted on the older paths only; an API key is accepted on all (vendor's
//! page "Authentication", as quoted by `aself101/kling-api`, read 2026-11-22).

/// Kinds of credential that Kling accepts on a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepts {
    /// The token of a key pair, or an API key.
    Any,
    /// An API key, but no token of a key pair.
    ApiKey,
}

const PATHS: [(&str, Accepts); 8] = [
    ("/v1", Accepts::Any),
    ("/account", Accepts::Any),
    ("/text-to-video", Accepts::ApiKey),
    ("/image-to-video", Accepts::ApiKey),
    ("/omni-video", Accepts::ApiKey),
    ("/motion-control", Accepts::ApiKey),
    ("/tasks", Accepts::ApiKey),
    ("/solutions", Accepts::ApiKey),
];

// === impl Accepts ===

impl Accepts {
    /// Returns the kinds of credential that a path accepts; `None` if it is not a known path of Kling.
    pub fn of(path: &str) -> Option<Self> {
        let row = PATHS.iter().find(|(prefix, _)| is_under(path, prefix));
        row.map(|(_, accepts)| *accepts)
    }

    /// Returns the same, but `None` also for a path that a server might resolve to another one.
    pub fn of_plain(path: &str) -> Option<Self> {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"/-_.".contains(&b);
        let is_dots = |segment: &str| [".", ".."].contains(&segment);
        let accepts = Self::of(path)?;
        (path.bytes().all(is_plain) && !path.split('/').any(is_dots)).then_some(accepts)
    }
}

/// Returns true if a path begins with these whole segments.
pub fn is_under(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_takes_what_the_vendor_says_and_a_strange_one_is_unknown() {
        use Accepts::{Any, ApiKey};
        for (path, accepts) in [
            ("/v1/videos/text2video", Some(Any)),
            ("/v1/images/kolors-virtual-try-on//1", Some(Any)),
            ("/account/costs", Some(Any)),
            ("/text-to-video/kling-2.6", Some(ApiKey)),
            ("/tasks", Some(ApiKey)),
            ("/tasks/1", Some(ApiKey)),
            ("/solutions/talking_agent", Some(ApiKey)),
            ("/", None),
            ("/tasks2", None),
            ("/kling/v1/videos/text2video", None),
            ("/v1/../tasks", None),
            ("/v1/./x", None),
            ("/v1/%2e%2e/tasks", None),
            ("/v1/..;/tasks", None),
            ("/v1\\..\\tasks", None),
        ] {
            assert_eq!(Accepts::of_plain(path), accepts, "{path}");
        }
        assert_eq!(Accepts::of("/tasks/a%20b"), Some(ApiKey));
    }
}

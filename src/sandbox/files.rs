//! Result files: small, and playable.

use std::collections::HashMap;
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use base64::{Engine, prelude::BASE64_STANDARD};

use super::Results;
use super::reply::Refusal;

/// Builds the URLs of result files.
#[derive(Debug)]
pub(super) struct Files {
    /// Base of the URLs, without a slash at its end.
    base: String,
    results: Results,
}

/// Path prefix of result files.
pub(super) const RESULTS: &str = "/results";

/// Query parameter with the time at which a result is deleted.
const EXPIRES: &str = "Expires";

/// Time after which results are deleted (all of Kling's pages about results).
pub(super) const LIFE: Duration = Duration::from_hours(30 * 24);

/// Drawn for this project, like all result files, which were made with ffmpeg's `geq` and `aevalsrc`.
pub(super) const IMAGE: &[u8] = include_bytes!("result.png");

/// Extension, content type and content. The video lasts two seconds, the sounds last one second.
const SORTS: &[(&str, &str, &[u8])] = &[
    ("mp3", "audio/mpeg", include_bytes!("result.mp3")),
    ("mp4", "video/mp4", include_bytes!("result.mp4")),
    ("png", "image/png", IMAGE),
    ("wav", "audio/wav", include_bytes!("result.wav")),
];

// === impl Files ===

impl Files {
    /// `base` is the URL at which clients reach the sandbox.
    pub(super) fn new(base: &str, results: Results) -> Self {
        let base = format!("{}{RESULTS}", base.trim_end_matches('/'));
        Self { base, results }
    }

    /// Returns the URL of a file that is deleted at `until`, since the epoch.
    ///
    /// A link has that time as `Expires`, in seconds, as Kling's has (measured by `aself101/kling-api`,
    /// 2026). So the sandbox need not remember files, and files of a forgotten task can still be fetched.
    pub(super) fn url(&self, until: Duration, name: &str) -> String {
        match (self.results, sort(name)) {
            (Results::Data, Some((content_type, content))) => {
                format!(
                    "data:{content_type};base64,{}",
                    BASE64_STANDARD.encode(content)
                )
            }
            _ => format!("{}/{name}?{EXPIRES}={}", self.base, until.as_secs()),
        }
    }
}

/// Returns true if a path has the form of those that [`Files::url`] makes.
pub(super) fn is_path(path: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let rest = path
        .strip_prefix(RESULTS)
        .and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|name| !name.is_empty() && !name.starts_with('.') && name.bytes().all(plain))
}

/// Returns the file of a URL. `now` is in seconds since the epoch.
///
/// # Errors
///
/// 1203 if the file is deleted or never existed, or if the URL has no `Expires`.
pub(super) fn serve(
    name: &str,
    parameters: &HashMap<String, String>,
    now: u64,
) -> Result<Response, Refusal> {
    let until = parameters.get(EXPIRES).and_then(|time| time.parse().ok());
    match sort(name) {
        Some((content_type, content)) if until.is_some_and(|until: u64| now < until) => {
            Ok(([(CONTENT_TYPE, content_type)], content).into_response())
        }
        _ => Err(Refusal::documented(1203)),
    }
}

/// Returns the content type and the content of a file.
fn sort(name: &str) -> Option<(&'static str, &'static [u8])> {
    let (_, extension) = name.rsplit_once('.')?;
    let sort = SORTS.iter().find(|sort| sort.0 == extension)?;
    Some((sort.1, sort.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_path_in_the_form_of_a_result_is_one() {
        let url =
            Files::new("http://a.test", Results::Link).url(Duration::from_secs(100), "1-0.png");
        let made = url.strip_prefix("http://a.test").unwrap();
        let (made, _) = made.split_once('?').unwrap();
        for (path, is_result) in [
            (made, true),
            ("/results/1.mp4", true),
            ("/results/", false),
            ("/results", false),
            ("/results//1.mp4", false),
            ("/results/x/1.mp4", false),
            ("/results/..", false),
            ("/results/../v1", false),
            ("/results/1.mp4/", false),
            ("/results/%2e%2e", false),
            ("/results/..;x", false),
            ("/resultsx/1.mp4", false),
            ("//results/1.mp4", false),
            ("/v1/results/1.mp4", false),
        ] {
            assert_eq!(is_path(path), is_result, "{path}");
        }
    }

    #[test]
    fn a_file_is_there_until_the_time_that_its_url_names() {
        for (name, until, now, content_type) in [
            ("1.mp4", Some("100"), 0, Some("video/mp4")),
            ("1-0.png", Some("100"), 99, Some("image/png")),
            ("1.mp3", Some("100"), 99, Some("audio/mpeg")),
            ("1.wav", Some("100"), 99, Some("audio/wav")),
            ("1.mp4", Some("100"), 100, None),
            ("1.mp4", Some("never"), 0, None),
            ("1.mp4", None, 0, None),
            ("1.exe", Some("100"), 0, None),
            ("mp4", Some("100"), 0, None),
        ] {
            let expires = until.map(|until| (EXPIRES.to_owned(), until.to_owned()));
            let answer = serve(name, &expires.into_iter().collect(), now).ok();
            let found = answer.map(|answer| answer.headers()[CONTENT_TYPE].clone());
            assert_eq!(
                found.as_ref().map(|value| value.to_str().unwrap()),
                content_type,
                "{name} at {now}"
            );
        }
    }

    #[test]
    fn a_url_is_a_link_with_the_time_of_its_end_or_the_file_itself() {
        let url =
            |results| Files::new("http://a.test/", results).url(Duration::from_secs(100), "1.png");
        assert_eq!(
            url(Results::Link),
            "http://a.test/results/1.png?Expires=100"
        );
        let data = url(Results::Data);
        let content = data.strip_prefix("data:image/png;base64,").unwrap();
        assert_eq!(BASE64_STANDARD.decode(content).unwrap(), IMAGE);
    }
}

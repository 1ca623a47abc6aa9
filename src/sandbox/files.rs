//! Result files: small, and playable.

use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::reply::Refusal;

/// Builds the URLs of result files.
#[derive(Debug)]
pub(super) struct Files {
    /// Base of the URLs, without a slash at its end.
    base: String,
}

/// Path prefix of result files.
pub(super) const RESULTS: &str = "/results";

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
    pub(super) fn new(base: &str) -> Self {
        let base = format!("{}{RESULTS}", base.trim_end_matches('/'));
        Self { base }
    }

    /// Returns the URL of a file that is deleted at `until`, since the epoch. The URL contains that time,
    /// so the sandbox need not remember files, and files of a forgotten task can still be fetched.
    pub(super) fn url(&self, until: Duration, name: &str) -> String {
        format!("{}/{}/{name}", self.base, until.as_secs())
    }
}

/// Returns the file of a URL. `now` is in seconds since the epoch.
///
/// # Errors
///
/// 1203 if the file is deleted or never existed.
pub(super) fn serve(until: u64, name: &str, now: u64) -> Result<Response, Refusal> {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension);
    let sort = SORTS.iter().find(|sort| Some(sort.0) == extension);
    match sort {
        Some(&(_, content_type, content)) if now < until => {
            Ok(([(CONTENT_TYPE, content_type)], content).into_response())
        }
        _ => Err(Refusal::documented(1203)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_until_the_time_that_its_url_names() {
        for (name, now, content_type) in [
            ("1.mp4", 0, Some("video/mp4")),
            ("1-0.png", 99, Some("image/png")),
            ("1.mp3", 99, Some("audio/mpeg")),
            ("1.wav", 99, Some("audio/wav")),
            ("1.mp4", 100, None),
            ("1.exe", 0, None),
            ("mp4", 0, None),
        ] {
            let answer = serve(100, name, now).ok();
            let found = answer.map(|answer| answer.headers()[CONTENT_TYPE].clone());
            assert_eq!(
                found.as_ref().map(|value| value.to_str().unwrap()),
                content_type,
                "{name} at {now}"
            );
        }
    }
}

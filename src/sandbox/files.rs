//! The files that results point at: small, and playable.

use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::reply::Refusal;

/// Where the files are, to be put into results.
#[derive(Debug)]
pub(super) struct Files {
    /// Without a slash at its end.
    base: String,
}

/// Where files are, under the base of their URLs.
pub(super) const RESULTS: &str = "/results";

/// After so long results are deleted (every vendor's page of a result).
pub(super) const LIFE: Duration = Duration::from_hours(30 * 24);

/// Drawn and composed for this project, with ffmpeg's `geq` and `aevalsrc`.
pub(super) const IMAGE: &[u8] = include_bytes!("result.png");

/// Extension, type and content. The video lasts two seconds, the sounds one.
const SORTS: &[(&str, &str, &[u8])] = &[
    ("mp3", "audio/mpeg", include_bytes!("result.mp3")),
    ("mp4", "video/mp4", include_bytes!("result.mp4")),
    ("png", "image/png", IMAGE),
    ("wav", "audio/wav", include_bytes!("result.wav")),
];

// === impl Files ===

impl Files {
    /// `base` is what clients reach the sandbox by.
    pub(super) fn new(base: &str) -> Self {
        let base = format!("{}{RESULTS}", base.trim_end_matches('/'));
        Self { base }
    }

    /// The URL of a file until it is deleted, since the epoch. That it says so itself spares us from remembering
    /// files, and holds for those of a task that is forgotten.
    pub(super) fn url(&self, until: Duration, name: &str) -> String {
        format!("{}/{}/{name}", self.base, until.as_secs())
    }
}

/// The file of a URL at `now`, in seconds since the epoch.
///
/// # Errors
///
/// 1203 for one that is deleted or never was.
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

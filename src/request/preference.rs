//! The header `Prefer: wait=N` (RFC 7240, section 4.3).

use std::time::Duration;

use axum::response::Response;
use http::header::{HeaderMap, HeaderName, HeaderValue, VARY};

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// Longest wait that a client may ask for, in seconds.
const LONGEST: u64 = 3600;

/// Returns the time that a request wants to wait. A preference that is not understood is ignored, as the RFC
/// asks.
pub fn wait(headers: &HeaderMap) -> Option<Duration> {
    let values = headers.get_all(PREFER).into_iter();
    let mut preferences = values.flat_map(|value| value.to_str().unwrap_or_default().split(','));
    // If there are several, the first counts.
    let seconds = preferences.find_map(seconds)?;
    (1..=LONGEST)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

/// Reads `wait=N`. Parameters behind it are ignored.
fn seconds(preference: &str) -> Option<u64> {
    let (preference, _) = preference.split_once(';').unwrap_or((preference, ""));
    let (name, value) = preference.split_once('=')?;
    if !name.trim().eq_ignore_ascii_case("wait") {
        return None;
    }
    let value = value.trim();
    let unquoted = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'));
    let digits = unquoted.unwrap_or(value);
    let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
    // A number that is too large is out of range, and not another preference.
    is_number.then(|| digits.parse().unwrap_or(u64::MAX))
}

/// Removes the preference from the headers of a request, and returns the wait. The proxy answers it alone.
pub fn take(headers: &mut HeaderMap) -> Option<Duration> {
    let wait = wait(headers);
    if wait.is_some() {
        headers.remove(PREFER);
    }
    wait
}

/// Says in an answer that the wait was applied.
pub fn applied(answer: &mut Response, wait: Duration) {
    let headers = answer.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&format!("wait={}", wait.as_secs())) {
        headers.insert(PREFERENCE_APPLIED, value);
    }
    headers.append(VARY, HeaderValue::from_static("Prefer"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_is_read_in_each_form_and_nonsense_is_ignored() {
        for (values, seconds) in [
            (&["wait=60"][..], Some(60)),
            (&["respond-async, wait=60"], Some(60)),
            (&["respond-async", "wait=60"], Some(60)),
            (&["Wait = 60 ; x=y"], Some(60)),
            (&["wait=\"60\""], Some(60)),
            (&["wait=1", "wait=2"], Some(1)),
            (&["wait=3600"], Some(3600)),
            (&["wait=3601"], None),
            (&["wait=0"], None),
            (&["wait=-1"], None),
            (&["wait=1.5"], None),
            (&["wait=99999999999999999999999"], None),
            (&["wait"], None),
            (&["wait="], None),
            (&["waiting=60"], None),
            (&[""], None),
            (&[], None),
        ] {
            let headers = values
                .iter()
                .map(|value| (PREFER, HeaderValue::from_static(value)));
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(name, value);
            }
            assert_eq!(wait(&map), seconds.map(Duration::from_secs), "{values:?}");
        }
    }
}

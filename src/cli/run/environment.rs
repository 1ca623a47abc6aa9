//! What the command sees.

use std::ffi::{OsStr, OsString};

use crate::credentials::harmless;
use crate::secret::Secret;

/// Names by which tools ask for the API's address.
const URLS: [&str; 4] = [
    "KLING_BASE_URL",
    "KLING_API_BASE_URL",
    "KLING_API_BASE",
    "KLINGAI_BASE_URL",
];
/// Names by which they ask for keys.
const KEYS: [&str; 6] = [
    "KLING_API_KEY",
    "KLING_ACCESS_KEY",
    "KLING_SECRET_KEY",
    "KLINGAI_API_KEY",
    "KLINGAI_ACCESS_KEY",
    "KLINGAI_SECRET_KEY",
];

/// Our environment without secrets, and with all that a tool needs to use the proxy unchanged: it
/// shows the token as an API key, or signs with it as its secret key.
pub(super) fn variables<'a>(
    environment: &'a [(OsString, OsString)],
    url: &'a str,
    token: &'a Secret,
) -> impl Iterator<Item = (&'a OsStr, &'a OsStr)> {
    let kept = harmless(environment).map(|(name, value)| (name.as_os_str(), value.as_os_str()));
    let urls = URLS.map(|name| (OsStr::new(name), OsStr::new(url)));
    let keys = KEYS.map(|name| (OsStr::new(name), OsStr::new(token.expose())));
    kept.chain(urls).chain(keys)
}

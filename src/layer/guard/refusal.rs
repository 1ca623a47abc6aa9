//! The messages of refused hosts and web pages. They show the refused value and, where a setting would
//! allow it, this setting as it would be after the change.

use http::header::{HeaderMap, HeaderValue, ORIGIN};

use super::rules::{Purpose, Rules, SEC_FETCH_SITE, is_host, is_web_origin};
use crate::error::Error;
use crate::telemetry::printable;

/// Longest part of a refused value that a message shows, in characters: a DNS name has at most 253.
const LONGEST_VALUE: usize = 255;
/// Longest setting that a message shows, in bytes. The list of the settings may have any length.
const LONGEST_SETTING: usize = 1024;

/// Refuses a `Host` header. `name` is its host without the port, if it has that form.
pub(super) fn of_host(rules: &Rules, host: &HeaderValue, name: Option<&str>) -> Error {
    let shown = shown(host);
    if rules.purpose == Purpose::Run {
        return Error::HostNotAllowed(format!(
            "host `{shown}` is not that of this proxy: send to `$KLING_BASE_URL`, which `run` has set"
        ));
    }
    let mut message = format!("host `{shown}` is not in `access.allowed_hosts`");
    if let Some(name) = name.filter(|name| is_host(name) && name.len() <= LONGEST_VALUE) {
        let hosts = rules.allowed_hosts.iter().map(String::as_str);
        message.push_str(&to_allow("access.allowed_hosts", hosts, name));
    }
    Error::HostNotAllowed(message)
}

/// Refuses a request of a web page.
pub(super) fn of_page(rules: &Rules, headers: &HeaderMap) -> Error {
    let listed = &rules.allowed_origins;
    let mut origins = headers.get_all(ORIGIN).iter();
    let origin = origins.find(|origin| !listed.contains(origin));
    if rules.purpose == Purpose::Admin {
        let page = match origin {
            Some(origin) => format!("a page of `{}`", shown(origin)),
            None => "a page of another site".to_owned(),
        };
        return Error::OriginNotAllowed(format!("{page} may not use the admin listener"));
    }
    let Some(origin) = origin else {
        let site = headers.get(SEC_FETCH_SITE).map_or_else(String::new, shown);
        return Error::OriginNotAllowed(format!(
            "a page of another site (`sec-fetch-site: {site}`) sent this request without its \
             origin, so that no setting can allow it: send it by `fetch`"
        ));
    };
    let message = format!(
        "the origin `{}` of this page is not in `access.allowed_origins`",
        shown(origin)
    );
    let addable = origin.to_str().ok().filter(|origin| is_web_origin(origin));
    let advice = match addable.filter(|origin| origin.len() <= LONGEST_VALUE) {
        Some(origin) => {
            let origins = listed.iter().filter_map(|origin| origin.to_str().ok());
            to_allow("access.allowed_origins", origins, origin)
        }
        None => ", and cannot be allowed: serve the page by http or https".to_owned(),
    };
    Error::OriginNotAllowed(message + &advice)
}

/// The setting `key` with one more entry. A longer list is not repeated.
fn to_allow<'a>(key: &str, list: impl Iterator<Item = &'a str>, new: &'a str) -> String {
    let list: Vec<_> = list.chain([new]).collect();
    // A list of texts is the same in JSON and TOML, and cannot fail to serialize.
    let list = serde_json::to_string(&list).unwrap_or_default();
    if list.len() <= LONGEST_SETTING {
        format!("; to allow it, set {key} = {list}")
    } else {
        format!("; to allow it, add \"{new}\" to this list")
    }
}

/// The beginning of a header's value, printable.
fn shown(value: &HeaderValue) -> String {
    let value = String::from_utf8_lossy(value.as_bytes());
    match value.char_indices().nth(LONGEST_VALUE) {
        Some((end, _)) => format!("{}…", printable(&value[..end])),
        None => printable(&value).into_owned(),
    }
}

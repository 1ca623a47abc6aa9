//! What the command sees.

use std::ffi::OsString;
use std::net::SocketAddr;

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

/// Names by which they ask what to reach without the network's own proxy.
const DIRECT: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// Our environment without secrets, and with all that a tool needs to use the proxy unchanged: it
/// shows the token as an API key, or signs with it as its secret key.
pub(super) fn variables(
    environment: &[(OsString, OsString)],
    address: SocketAddr,
    token: &Secret,
) -> impl Iterator<Item = (OsString, OsString)> {
    let set = |name: &str, value: &str| (name.into(), value.into());
    let url = format!("http://{address}");
    let direct = directly(environment, address);
    let kept = harmless(environment).cloned();
    kept.chain(URLS.map(|name| set(name, &url)))
        .chain(KEYS.map(|name| set(name, token.expose())))
        .chain(DIRECT.map(|name| (name.into(), direct.clone())))
}

/// What is reached directly already, and our address: the network's proxy would see the token, and
/// could not reach us.
fn directly(environment: &[(OsString, OsString)], address: SocketAddr) -> OsString {
    let mut set = environment.iter().filter(|(_, value)| !value.is_empty());
    let known = set.find(|(name, _)| DIRECT.iter().any(|direct| name == direct));
    let address = address.ip().to_string();
    let Some((_, known)) = known else {
        return address.into();
    };
    let mut list = known.clone();
    list.push(",");
    list.push(address);
    list
}

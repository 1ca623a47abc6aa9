//! What the command sees.

use std::ffi::OsString;
use std::net::SocketAddr;

use crate::auth::credentials::without_secrets;
use crate::auth::secret::Secret;
use crate::environment::Environment;

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

/// What the names of variables end with that name such a proxy.
const PROXY: &str = "_PROXY";

/// Our environment without secrets, and with all that a tool needs to use the proxy unchanged: it
/// shows the token as an API key, or signs with it as its secret key.
pub(super) fn variables(
    environment: &Environment,
    address: SocketAddr,
    token: &Secret,
) -> impl Iterator<Item = (OsString, OsString)> {
    let set = |name: &str, value: &str| (name.into(), value.into());
    let url = format!("http://{address}");
    let kept = without_secrets(environment).cloned();
    kept.chain(URLS.map(|name| set(name, &url)))
        .chain(KEYS.map(|name| set(name, token.expose())))
        .chain(directly(environment, address))
}

/// Excepts our address from the network's own proxy, which would see the token and could not reach us.
/// Whatever else the variables say stays true: tools differ in which of them they read.
fn directly(environment: &Environment, address: SocketAddr) -> Vec<(OsString, OsString)> {
    let set = environment
        .variables()
        .filter(|(_, value)| !value.is_empty());
    let (direct, others): (Vec<_>, Vec<_>) = set
        .filter(|(name, _)| name.to_string_lossy().to_ascii_uppercase().ends_with(PROXY))
        .partition(|(name, _)| DIRECT.iter().any(|direct| name == direct));
    let address = address.ip().to_string();
    if others.is_empty() {
        return Vec::new();
    }
    if direct.is_empty() {
        return DIRECT
            .map(|name| (name.into(), address.clone().into()))
            .into();
    }
    // `*` alone excepts all.
    let extended = direct.into_iter().filter(|(_, list)| list != "*");
    extended
        .map(|(name, list)| {
            let mut list = list.clone();
            list.push(",");
            list.push(&address);
            (name.clone(), list)
        })
        .collect()
}

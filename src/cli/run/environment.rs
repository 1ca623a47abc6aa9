//! The environment variables of the command.

use std::ffi::OsString;
use std::net::SocketAddr;

use crate::auth::credentials::without_secrets;
use crate::auth::secret::Secret;
use crate::environment::Environment;

/// Variables from which tools read the address of the API.
const URLS: [&str; 4] = [
    "KLING_BASE_URL",
    "KLING_API_BASE_URL",
    "KLING_API_BASE",
    "KLINGAI_BASE_URL",
];
/// Variables from which tools read their keys.
const KEYS: [&str; 6] = [
    "KLING_API_KEY",
    "KLING_ACCESS_KEY",
    "KLING_SECRET_KEY",
    "KLINGAI_API_KEY",
    "KLINGAI_ACCESS_KEY",
    "KLINGAI_SECRET_KEY",
];

/// Variables that list the hosts to reach without the network's proxy.
const DIRECT: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// Suffix of proxy variables, such as `HTTP_PROXY` or `ALL_PROXY`.
const PROXY: &str = "_PROXY";

/// Returns our environment without secrets, and with the variables that let an unchanged tool use the
/// proxy. The tool sends the token as an API key, or signs with the token as its secret key.
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

/// Excludes our address from the network's proxy, which would see the token and could not reach us.
///
/// Returns the changed variables, which keep their other entries. Each of [`DIRECT`] that is set is
/// changed, since some tools read one and some the other.
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
    // A value of `*` already excludes all hosts.
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

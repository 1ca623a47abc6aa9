//! Opens a port that a user asked for. If it is taken, finds out if another proxy answers there, for
//! example one in another terminal.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use http::HeaderMap;
use reqwest::Client;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::timeout;

use super::health::reachable;
use super::http_client::{self, Fetched};
use super::{Exit, Failure, runtime};
use crate::admin;
use crate::server;

/// Longest time for the questions to a taken port.
const PATIENCE: Duration = Duration::from_secs(1);
/// A path that a proxy answers itself, so that the question costs nothing upstream.
const RESERVED: &str = "/_proxy/";
/// What the names of the headers begin with that only a proxy or its sandbox sends.
const OWN_HEADERS: &str = "kling-proxy-";

/// The body of a health endpoint, as [`admin`] writes it.
#[derive(Deserialize)]
struct Health {
    #[serde(rename = "phase")]
    _phase: IgnoredAny,
    #[serde(rename = "reasons")]
    _reasons: IgnoredAny,
}

/// Opens a listening socket.
///
/// # Errors
///
/// If the port is taken, the message says by whom, and recommends the flags `instead`.
pub(super) fn bind(address: SocketAddr, instead: &str) -> Result<TcpListener, Failure> {
    server::bind(address).map_err(|error| {
        let text = if error.kind() != io::ErrorKind::AddrInUse {
            format!("cannot listen on {address}: {error}")
        } else if is_proxy(reachable(address)) {
            format!("another kling-proxy answers at {address}: stop it, or choose `{instead}`")
        } else {
            format!(
                "cannot listen on {address}, because another program uses it: stop it, or choose \
                 `{instead}`"
            )
        };
        Failure::new(Exit::Failed, text)
    })
}

/// Returns true if a proxy, its admin listener or its sandbox answers at an address in time.
fn is_proxy(address: SocketAddr) -> bool {
    let (Ok(runtime), Ok(client)) = (runtime(), http_client::plain()) else {
        return false;
    };
    let answer = runtime.block_on(async { timeout(PATIENCE, ask(&client, address)).await });
    runtime.shutdown_background();
    answer.unwrap_or(false)
}

async fn ask(client: &Client, address: SocketAddr) -> bool {
    let fetch = async |path| {
        let url = format!("http://{address}{path}");
        http_client::fetch(client, url, HeaderMap::new()).await.ok()
    };
    let Some(Fetched { headers, .. }) = fetch(RESERVED).await else {
        return false;
    };
    if headers
        .keys()
        .any(|name| name.as_str().starts_with(OWN_HEADERS))
    {
        return true;
    }
    // An admin listener beyond loopback has health and metrics only.
    let health = fetch(admin::READY).await;
    health.is_some_and(|health| serde_json::from_slice::<Health>(&health.body).is_ok())
}

//! `kling-proxy health` and `kling-proxy wait`: ask a running proxy whether it is ready, for health
//! checks in images without a shell, and for what is started after it.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http::HeaderMap;
use reqwest::Client;
use tokio::time::{sleep, timeout};

use super::http_client::{self, Fetched};
use super::{Exit, Failure, SettingsArgs, runtime, say};
use crate::admin;
use crate::environment::Environment;

/// Between two questions of `wait`: a proxy is ready within less.
const PAUSE: Duration = Duration::from_millis(100);

/// Asks once.
pub(super) fn run(args: &SettingsArgs, environment: &Environment) -> Result<(), Failure> {
    let address = address(args, environment)?;
    let client = client()?;
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let answer = runtime.block_on(ask(&client, address));
    say(answer.map_err(|reason| Failure::new(Exit::Failed, reason))?);
    Ok(())
}

/// Asks until the answer is yes, no longer than `patience`.
pub(super) fn wait(
    patience: Duration,
    args: &SettingsArgs,
    environment: &Environment,
) -> Result<(), Failure> {
    let address = address(args, environment)?;
    let client = client()?;
    let mut last = "no answer yet".to_owned();
    let ready = async {
        loop {
            match ask(&client, address).await {
                Ok(answer) => return answer,
                Err(reason) => last = reason,
            }
            sleep(PAUSE).await;
        }
    };
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    // Its timer needs the runtime.
    let answer = runtime.block_on(async { timeout(patience, ready).await });
    say(answer.map_err(|_| {
        let patience = humantime::format_duration(patience);
        Failure::new(Exit::Failed, format!("not within {patience}: {last}"))
    })?);
    Ok(())
}

/// Reads a duration of the command line: a number alone is in seconds, as of timeout(1).
pub(super) fn duration(text: &str) -> Result<Duration, humantime::DurationError> {
    match text.parse() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text),
    }
}

/// Where the proxy of these settings answers.
fn address(args: &SettingsArgs, environment: &Environment) -> Result<SocketAddr, Failure> {
    let (settings, _) = args.load(environment)?;
    let address = settings.admin.address.ok_or_else(|| {
        let reason = "admin.address is off: there is nothing to ask";
        Failure::new(Exit::Failed, reason)
    })?;
    Ok(reachable(address))
}

/// Makes a client for the admin listener, which speaks plain HTTP.
fn client() -> Result<Client, Failure> {
    http_client::plain().map_err(|error| Failure::because(Exit::Failed, &error))
}

/// The answer of a proxy that is ready, else what is wrong.
async fn ask(client: &Client, address: SocketAddr) -> Result<String, String> {
    let limit = admin::PROBE_TIMEOUT;
    let url = format!("http://{address}{}", admin::READY);
    let answer = match timeout(limit, http_client::fetch(client, url, HeaderMap::new())).await {
        Ok(Ok(answer)) if answer.is_whole => Ok(answer),
        Ok(Ok(_)) => Err("the response exceeds the length limit".to_owned()),
        Ok(Err(error)) => Err(root(&error).to_string()),
        Err(_) => Err(format!("not within {}", humantime::format_duration(limit))),
    };
    let Fetched { status, body, .. } = answer
        .map_err(|reason| format!("no proxy answers on {address} (admin.address): {reason}"))?;
    let text = String::from_utf8_lossy(&body).trim_end().to_owned();
    if status.is_success() {
        Ok(text)
    } else {
        Err(format!("not ready: {text}"))
    }
}

/// The cause of all causes, such as a connection that was refused.
pub(super) fn root(error: &dyn Error) -> &dyn Error {
    error.source().map_or(error, root)
}

/// Where to connect to what listens on every address.
pub(super) fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

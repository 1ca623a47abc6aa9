//! `kling-proxy health` and `kling-proxy wait`: ask a running proxy whether it is ready, for health
//! checks in images without a shell, and for what is started after it.

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http::header::HOST;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::{Exit, Failure, SettingsArgs, runtime, say, send};
use crate::admin;
use crate::environment::Environment;
use crate::error::BoxError;

/// Between two questions of `wait`: a proxy is ready within less.
const PAUSE: Duration = Duration::from_millis(100);
/// What answers more than this is no proxy, in bytes.
const BOUND: usize = 64 << 10;

/// Asks once.
pub(super) fn run(args: &SettingsArgs, environment: &Environment) -> Result<(), Failure> {
    let address = address(args, environment)?;
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let answer = runtime.block_on(ask(address));
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
    let mut last = "no answer yet".to_owned();
    let ready = async {
        loop {
            match ask(address).await {
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

/// Where the proxy of these settings answers.
fn address(args: &SettingsArgs, environment: &Environment) -> Result<SocketAddr, Failure> {
    let (settings, _) = args.load(environment)?;
    let address = settings.admin.address.ok_or_else(|| {
        let reason = "admin.address is off: there is nothing to ask";
        Failure::new(Exit::Failed, reason)
    })?;
    Ok(reachable(address))
}

/// The answer of a proxy that is ready, else what is wrong.
async fn ask(address: SocketAddr) -> Result<String, String> {
    let limit = admin::PROBE_TIMEOUT;
    let answer = match timeout(limit, get(address, admin::READY)).await {
        Ok(answer) => answer.map_err(|error| root(&*error).to_string()),
        Err(_) => Err(format!("not within {}", humantime::format_duration(limit))),
    };
    let (status, text) = answer
        .map_err(|reason| format!("no proxy answers on {address} (admin.address): {reason}"))?;
    if status.is_success() {
        Ok(text)
    } else {
        Err(format!("not ready: {text}"))
    }
}

/// One request on a connection of its own.
async fn get(address: SocketAddr, path: &str) -> Result<(StatusCode, String), BoxError> {
    let stream = TcpStream::connect(address).await?;
    let request = Request::get(path).header(HOST, address.to_string());
    let answer = send(stream, request.body(Empty::new())?).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), BOUND).collect().await?;
    let body = body.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// The cause of all causes, such as a connection that was refused.
fn root(error: &dyn Error) -> &dyn Error {
    error.source().map_or(error, root)
}

/// Where to connect to what listens on every address.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

//! `kling-proxy health` and `kling-proxy wait`: ask a running proxy whether it is ready, for health
//! checks in images without a shell, and for what is started after it.

use std::error::Error;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use reqwest::Client;
use tokio::time::{sleep, timeout};

use super::{Exit, Failure, SettingsArgs, runtime, say};
use crate::admin;

/// Between two questions of `wait`: a proxy is ready within less.
const PAUSE: Duration = Duration::from_millis(100);

/// What asks.
struct Probe {
    client: Client,
    address: SocketAddr,
}

/// Asks once.
pub(super) fn run(
    args: &SettingsArgs,
    environment: &[(OsString, OsString)],
) -> Result<(), Failure> {
    let probe = Probe::new(args, environment)?;
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let answer = runtime.block_on(probe.ask());
    say(answer.map_err(|reason| Failure::new(Exit::Failed, reason))?);
    Ok(())
}

/// Asks until the answer is yes, no longer than `patience`.
pub(super) fn wait(
    patience: Duration,
    args: &SettingsArgs,
    environment: &[(OsString, OsString)],
) -> Result<(), Failure> {
    let probe = Probe::new(args, environment)?;
    let mut last = "no answer yet".to_owned();
    let ready = async {
        loop {
            match probe.ask().await {
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

// === impl Probe ===

impl Probe {
    fn new(args: &SettingsArgs, environment: &[(OsString, OsString)]) -> Result<Self, Failure> {
        let (settings, _) = args.load(environment)?;
        let address = settings.admin.address.ok_or_else(|| {
            let reason = "admin.address is off: there is nothing to ask";
            Failure::new(Exit::Failed, reason)
        })?;
        let client = Client::builder()
            .no_proxy()
            .timeout(admin::PROBE_TIMEOUT)
            .build()
            .map_err(|error| Failure::because(Exit::Failed, &error))?;
        Ok(Self {
            client,
            address: reachable(address),
        })
    }

    /// The answer of a proxy that is ready, else what is wrong.
    async fn ask(&self) -> Result<String, String> {
        let address = self.address;
        let unanswered = |error: reqwest::Error| {
            let reason = root(&error);
            format!("no proxy answers on {address} (admin.address): {reason}")
        };
        let url = format!("http://{address}{}", admin::READY);
        let answer = self.client.get(url).send().await.map_err(unanswered)?;
        let ready = answer.status().is_success();
        let body = answer.text().await.map_err(unanswered)?;
        if ready {
            Ok(body)
        } else {
            Err(format!("not ready: {body}"))
        }
    }
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

//! `kling-proxy health`: asks a running proxy once, for health checks in images without a shell.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Exit, Failure, SettingsArgs, runtime, say};
use crate::admin;

pub(super) fn run(
    args: &SettingsArgs,
    environment: &[(OsString, OsString)],
) -> Result<(), Failure> {
    let (settings, _) = args.load(environment)?;
    let Some(address) = settings.admin.address else {
        return Err(Failure::new(
            Exit::Failed,
            "admin.address is off: there is nothing to ask",
        ));
    };
    let url = format!("http://{}{}", reachable(address), admin::READY);
    let failed = |error: &dyn std::error::Error| Failure::because(Exit::Failed, error);
    let runtime = runtime();
    let answer = runtime.map_err(|error| failed(&error))?.block_on(async {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(admin::PROBE_TIMEOUT)
            .build()?;
        let answer = client.get(url).send().await?;
        let healthy = answer.status().is_success();
        Ok::<_, reqwest::Error>((healthy, answer.text().await?))
    });
    match answer.map_err(|error| failed(&error))? {
        (true, body) => {
            say(body);
            Ok(())
        }
        (false, body) => Err(Failure::new(Exit::Failed, format!("not ready: {body}"))),
    }
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

//! `kling-proxy check`: does step by step all that a request needs, and shows for each step that fails how to
//! correct it.

mod account;
mod certificate;
mod clock;
mod local;
mod network;
mod region;
mod report;
mod verdict;

use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use self::account::Credentials;
use self::network::Target;
use self::report::{Fault, Finding, Report};
use super::serve::{embedded_sandbox, sandbox_credential};
use super::{Exit, Failure, Output, SettingsArgs, runtime};
use crate::auth::credentials::Places;
use crate::clock::{Clock, SystemClock};
use crate::environment::Environment;
use crate::sandbox::Sandbox;
use crate::server::{self, CertificateFiles, ConnectionLimits, Listener, Stop, Worker};

/// Most connections to the embedded sandbox at once. The check makes one after the other.
const SANDBOX_CONNECTIONS: usize = 8;

pub(super) fn run(
    with_sandbox: bool,
    offline: bool,
    output: Output,
    args: &SettingsArgs,
    environment: &Environment,
) -> Result<(), Failure> {
    let mut report = Report::new(output);
    let (settings, rows) = match args.load(environment) {
        Ok(loaded) => loaded,
        Err(failure) => {
            // The caller prints the lines of the failure, as for `serve`. A script needs them in the JSON
            // object too.
            if let Output::Json = output {
                report.take::<()>("settings", || Err(Fault::of_settings(&failure.lines)));
                let _ = report.end();
            }
            return Err(failure);
        }
    };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    report.take("settings", || {
        Ok(local::settings(&settings, &rows, environment, with_sandbox))
    });
    if let Some(path) = &settings.access.client_tokens_file {
        report.take("client_tokens", || local::client_tokens(path, &clock));
    }
    if let (Some(certificate), Some(key)) =
        (&settings.listen.certificate_file, &settings.listen.key_file)
    {
        let files = CertificateFiles {
            certificate: certificate.clone(),
            key: key.clone(),
        };
        let hosts = &settings.access.allowed_hosts;
        report.take("certificate", || {
            certificate::judge(files, hosts, clock.now())
        });
    }
    let credential = report.take("credential", || {
        if with_sandbox {
            let credential = sandbox_credential();
            let text = format!("{} of the sandbox", credential.kind());
            return Ok(Finding::new(credential, text));
        }
        local::credential(&Places {
            environment,
            configured: &settings.credentials,
        })
    });
    let roots = report.take("trust", || {
        local::trust(settings.upstream.ca_file.as_deref())
    });
    let (Some(credential), Some(roots)) = (credential, roots) else {
        return report.end();
    };
    if offline || report.has_failed() {
        return report.end();
    }

    let (embedded, origin) = if with_sandbox {
        let (listener, sandbox, origin) = embedded_sandbox(settings.sandbox, &clock)?;
        (Some((listener, sandbox)), origin)
    } else {
        (None, settings.upstream.origin.clone())
    };
    let upstream = settings.upstream;
    let target = Target {
        egress: upstream.proxy.and_then(|proxy| proxy.leading_to(&origin)),
        origin,
        roots,
        timeouts: upstream.timeouts,
    };
    let credentials = Credentials {
        credential,
        validity: settings.token,
        clock,
    };
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    let (header_timeout, idle) = (settings.limits.header_timeout, upstream.timeouts.idle);
    runtime.block_on(async {
        let serving = async {
            match embedded {
                Some((listener, sandbox)) => serve(listener, sandbox, header_timeout, idle).await,
                None => pending().await,
            }
        };
        tokio::select! {
            // The report has shown already why a step failed.
            _ = ask(&mut report, &target, credentials) => {}
            never = serving => match never {},
        }
    });
    // Does not wait for a name that is still being resolved, so that the process can end.
    runtime.shutdown_background();
    report.end()
}

/// Serves the embedded sandbox for as long as the check takes.
async fn serve(
    listener: Listener,
    sandbox: Sandbox,
    header_timeout: Duration,
    idle: Duration,
) -> Infallible {
    let limits = ConnectionLimits {
        connections: Arc::new(Semaphore::new(SANDBOX_CONNECTIONS)),
        heads: Arc::default(),
        evictor: None,
        header_timeout,
        idle,
    };
    let (_stop, stopped) = watch::channel(Stop::Never);
    // A failure shows in the check: its connection is not answered.
    let _ = server::run(vec![listener], Worker::alone(), sandbox, limits, stopped).await;
    pending().await
}

/// Runs the steps that need the network, until one fails. Each step needs the result of the one before.
async fn ask(
    report: &mut Report,
    target: &Target,
    mut credentials: Credentials,
) -> Result<(), Fault> {
    target.reach(report, credentials.clock.now()).await?;
    let asked = account::ask(target, &credentials);
    let mut answer = report.wait("answer", asked).await?;
    let compared = async { clock::compare(&answer, target, &credentials) };
    let corrected = report.wait("clock", compared).await?;
    if let Some(clock) = corrected {
        // Asks again by upstream's clock, as the proxy does after upstream refused a token for its time.
        credentials.clock = clock;
        let again = account::ask(target, &credentials);
        answer = report.wait("second_answer", again).await?;
    }
    let judged = verdict::judge(&answer, target, &credentials);
    report.wait("account", judged).await
}

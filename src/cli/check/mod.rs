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

use std::sync::Arc;

use self::account::Credentials;
use self::network::Target;
use self::report::{Fault, Report};
use super::{Exit, Failure, Output, SettingsArgs, runtime};
use crate::auth::credentials::Places;
use crate::clock::{Clock, SystemClock};
use crate::environment::Environment;
use crate::server::CertificateFiles;

pub(super) fn run(
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
        Ok(local::settings(&settings, &rows, environment))
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

    let upstream = settings.upstream;
    let target = Target {
        egress: upstream
            .proxy
            .and_then(|proxy| proxy.leading_to(&upstream.origin)),
        origin: upstream.origin,
        roots,
        timeouts: upstream.timeouts,
    };
    let credentials = Credentials {
        credential,
        validity: settings.token,
        clock,
    };
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    // The report has shown already why a step failed.
    let _ = runtime.block_on(ask(&mut report, &target, credentials));
    // Does not wait for a name that is still being resolved, so that the process can end.
    runtime.shutdown_background();
    report.end()
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

//! Certificates: the one that our clients get (`listen.tls.*`), and the one that we get from upstream.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::ParsedCertificate;
use x509_cert::Certificate;
use x509_cert::der::Decode;

use super::local::EXPOSED;
use super::report::{Fault, Finding, StepResult};
use crate::auth::trusted_file;
use crate::cli::Exit;
use crate::error::chain;
use crate::server::{self, CertificateFiles};
use crate::telemetry::printable;

/// A certificate with less time left than this should be renewed now.
const SOON: Duration = Duration::from_hours(14 * 24);

/// Issuer and validity period of a certificate.
#[derive(Clone, Debug)]
pub(super) struct CertificateFacts {
    /// Distinguished name of the issuer, with special characters escaped.
    pub(super) issuer: String,
    /// Start of the validity period (`notBefore`).
    pub(super) begins: SystemTime,
    /// End of the validity period (`notAfter`).
    pub(super) ends: SystemTime,
}

// === impl CertificateFacts ===

impl CertificateFacts {
    /// Reads a certificate. Returns `None` if it cannot be parsed.
    pub(super) fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = Certificate::from_der(certificate).ok()?;
        let certificate = certificate.tbs_certificate();
        let validity = certificate.validity();
        Some(Self {
            issuer: printable(&certificate.issuer().to_string()).into_owned(),
            begins: validity.not_before.to_system_time(),
            ends: validity.not_after.to_system_time(),
        })
    }
}

/// Checks the certificate for HTTPS: its files, its validity period, and the hosts that it is good for.
pub(super) fn judge(files: CertificateFiles, hosts: &[String], now: SystemTime) -> StepResult {
    let key = files.key.clone();
    let certificate = server::Certificate::load(files).map_err(|error| {
        Fault::new(
            Exit::Settings,
            "certificate_unusable",
            chain(&error),
            "want a certificate chain and the private key of its certificate, both in PEM; chmod 600 the key",
        )
    })?;
    let shown = certificate.chain();
    let facts: Option<Vec<_>> = shown.iter().map(CertificateFacts::read).collect();
    // A chain is valid until the first of its certificates expires.
    let facts = facts.and_then(|facts| facts.into_iter().min_by_key(|facts| facts.ends));
    let covered = |host: &&String| shown.first().is_some_and(|own| covers(own, host));
    let (covered, others): (Vec<_>, Vec<_>) = hosts.iter().partition(covered);

    let dates = facts.as_ref().map_or_else(
        || "its dates cannot be read".to_owned(),
        |facts| {
            format!(
                "good until {} ({})",
                time(facts.ends),
                left(facts.ends, now)
            )
        },
    );
    let mut text = format!("{dates}, for {}", list(&covered));
    if !others.is_empty() {
        text = format!("{text}; not for {}", list(&others));
    }
    let mut found = Finding::new((), text);
    if let Some(facts) = facts {
        if facts.ends <= now {
            found.warn("certificate_ended", "renew it: clients refuse it");
        } else if facts.ends < now + SOON {
            found.warn(
                "certificate_ends_soon",
                "renew it: then clients will refuse it",
            );
        }
        if facts.begins > now {
            let begins = time(facts.begins);
            found.warn(
                "certificate_not_yet_valid",
                format!("clients refuse it until {begins}, unless this machine's clock is wrong"),
            );
        }
    }
    if covered.is_empty() {
        found.warn(
            "certificate_of_another_name",
            "clients refuse it under each name of access.allowed_hosts: want one with a \
             subjectAltName such as DNS:localhost",
        );
    }
    if is_exposed(&key) {
        found.warn(
            EXPOSED,
            format!("every user can read {}: chmod 600", key.display()),
        );
    }
    Ok(found)
}

/// Formats a time for people (RFC 3339, UTC, to the second).
pub(super) fn time(time: SystemTime) -> impl std::fmt::Display {
    humantime::format_rfc3339_seconds(time)
}

/// Returns true if the certificate is good for the name of a host, as a client checks it.
fn covers(certificate: &CertificateDer<'_>, host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host);
    match (ParsedCertificate::try_from(certificate), name) {
        (Ok(certificate), Ok(name)) => verify_server_name(&certificate, &name).is_ok(),
        _ => false,
    }
}

/// Formats the time that is left until `ends`, or has passed since then.
fn left(ends: SystemTime, now: SystemTime) -> String {
    let days = |time: Duration| match time.as_secs() / (24 * 60 * 60) {
        0 => "less than a day".to_owned(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    };
    match ends.duration_since(now) {
        Ok(left) => format!("{} left", days(left)),
        Err(over) => format!("over for {}", days(over.duration())),
    }
}

fn list(names: &[&String]) -> String {
    if names.is_empty() {
        return "none of access.allowed_hosts".to_owned();
    }
    let names: Vec<_> = names.iter().map(|name| name.as_str()).collect();
    names.join(", ")
}

fn is_exposed(key: &Path) -> bool {
    trusted_file::read(key).is_ok_and(|file| file.exposed)
}

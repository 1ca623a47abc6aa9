//! The steps of `check` that need no network: settings, files and their modes, the credential.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;

use super::report::{Fault, Finding, StepResult};
use crate::auth::client_token::ClientTokens;
use crate::auth::credentials::{self, Places};
use crate::auth::secret::Secret;
use crate::auth::token::Credential;
use crate::auth::trusted_file::{self, TrustedFileError};
use crate::cli::{Exit, TRIAL, find_credential, with_trial};
use crate::clock::Clock;
use crate::environment::Environment;
use crate::error::chain;
use crate::settings::{SettingRow, Settings};
use crate::upstream::{TlsError, trust_roots};

/// The type of a warning about a file that every user can read.
pub(super) const EXPOSED: &str = "file_readable_by_others";

/// Variables by which other programs find the network's proxy, in upper or lower case.
const PROXY_VARIABLES: [&str; 3] = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"];

/// Where settings come from, and whether others can read a secret there.
pub(super) fn settings(
    settings: &Settings,
    rows: &[SettingRow],
    environment: &Environment,
    with_sandbox: bool,
) -> Finding {
    let set = rows.iter().filter(|row| !row.is_default());
    let mut sources: Vec<_> = set.map(|row| row.source.as_str()).collect();
    sources.sort_unstable();
    sources.dedup();
    let upstream = if with_sandbox {
        "the embedded sandbox".to_owned()
    } else {
        settings.upstream.origin.to_string()
    };
    let mut text = if sources.is_empty() {
        format!("upstream is {upstream}; all are defaults")
    } else {
        format!("upstream is {upstream}; set by {}", sources.join(", "))
    };
    let unused = proxy_variables(environment).join(" and ");
    if !unused.is_empty() {
        let are = if unused.contains(' ') { "are" } else { "is" };
        text = format!("{text}; {unused} {are} set and not used");
    }
    let mut found = Finding::new((), text);
    if !unused.is_empty() && settings.upstream.proxy.is_none() {
        found.warn(
            "proxy_variables_unused",
            format!(
                "if the only way to upstream is the proxy of {unused}, set upstream.proxy to it"
            ),
        );
    }
    // The settings file is the only source that is a file.
    for source in sources {
        let path = Path::new(source);
        let holds_secret = rows
            .iter()
            .any(|row| row.source == source && row.is_secret());
        if holds_secret && trusted_file::read(path).is_ok_and(|file| file.exposed) {
            found.warn(
                EXPOSED,
                format!("every user can read {source}, which holds a secret: chmod 600"),
            );
        }
    }
    found
}

/// The names of variables that name a proxy. Their values may hold passwords.
fn proxy_variables(environment: &Environment) -> Vec<String> {
    let set = environment
        .variables()
        .filter(|(_, value)| !value.is_empty());
    let names = set.map(|(name, _)| name.to_string_lossy());
    let of_proxies = |name: &Cow<'_, str>| {
        PROXY_VARIABLES
            .iter()
            .any(|known| name.eq_ignore_ascii_case(known))
    };
    let mut names: Vec<_> = names.filter(of_proxies).map(Cow::into_owned).collect();
    names.sort_unstable();
    names
}

/// Checks that the client tokens of `access.client_tokens_file` can be used.
pub(super) fn client_tokens(path: &Path, clock: &Arc<dyn Clock>) -> StepResult {
    let tokens = ClientTokens::read(path, Arc::clone(clock)).map_err(|error| {
        Fault::new(
            Exit::Settings,
            "client_tokens_unusable",
            format!("access.client_tokens_file: {}", chain(&error)),
            "correct the file: one token a line, or name:token, and mode 600 in a folder of yours",
        )
    })?;
    let mut found = Finding::new((), format!("read from {}", path.display()));
    if let Some(warning) = tokens.warning {
        found.warn(EXPOSED, warning);
    }
    Ok(found)
}

/// Finds the credential: an access key and a secret key, or an API key.
pub(super) fn credential(places: &Places) -> StepResult<Credential> {
    let found = find_credential(places).map_err(|error| missing(&error))?;
    let text = format!("{} from {}", found.credential.kind(), found.source);
    let is_token = matches!(&found.credential, Credential::ApiKey(key) if is_token(key));
    let mut outcome = Finding::new(found.credential, text);
    for warning in found.warnings {
        outcome.warn("credential_place", warning);
    }
    if is_token {
        outcome.warn(
            "token_as_api_key",
            "this is a token, which ends within half an hour: set the API key itself, or the \
             access key and secret key that the token was made of",
        );
    }
    Ok(outcome)
}

/// Returns true if a key has the form of a JWT: three parts, of which the first is JSON in base64.
fn is_token(key: &Secret) -> bool {
    let key = key.expose();
    key.starts_with("eyJ") && key.matches('.').count() == 2
}

/// Describes the reason why no place has a usable credential, with advice.
fn missing(error: &credentials::Error) -> Fault {
    use credentials::Error::{Command, Half, Malformed, Missing, Unreadable};
    let text = with_trial(error, TRIAL);
    let (r#type, advice) = match error {
        // The message of this error holds the advice too.
        Missing => {
            let (text, advice) = text.split_once(": ").unwrap_or((&text, ""));
            return Fault::new(Exit::Settings, "no_credential", text, advice);
        }
        Half { missing, .. } => ("half_credential", format!("set {missing} too")),
        Unreadable { path, cause, .. } => match cause {
            TrustedFileError::Io(_) => (
                "file_unreadable",
                format!(
                    "see that {} is there, and that this user may read it",
                    path.display()
                ),
            ),
            TrustedFileError::Irregular
            | TrustedFileError::TooLarge
            | TrustedFileError::NotText => (
                "file_unreadable",
                format!(
                    "see that {} is a file of a key, and nothing else",
                    path.display()
                ),
            ),
            TrustedFileError::Writable(_) => (
                "file_writable_by_others",
                format!(
                    "chmod 600 {}, and check that nobody has changed or replaced it",
                    path.display()
                ),
            ),
            TrustedFileError::WritableFolder { folder, .. } => (
                "file_writable_by_others",
                format!(
                    "chmod go-w {}, and check that nobody has changed or replaced {}",
                    folder.display(),
                    path.display()
                ),
            ),
            TrustedFileError::Foreign(_) | TrustedFileError::ForeignFolder { .. } => (
                "file_of_another_user",
                format!(
                    "make {} and its folder the property of the proxy's user",
                    path.display()
                ),
            ),
        },
        Command(_) => (
            "command_failed",
            "run the words of credentials.command by hand, without a shell".to_owned(),
        ),
        Malformed(_) => (
            "malformed_credential",
            "copy the key again, and nothing else".to_owned(),
        ),
    };
    Fault::new(Exit::Settings, r#type, text, advice)
}

/// Collects the root certificates to check upstream's certificate against.
pub(super) fn trust(ca_file: Option<&Path>) -> StepResult<Arc<RootCertStore>> {
    let roots = trust_roots(ca_file).map_err(|error| {
        let (r#type, advice) = match &error {
            TlsError::Environment { variable, .. } => (
                "environment_roots_unusable",
                format!("correct what {variable} names, or unset it"),
            ),
            TlsError::CaFile(..) | TlsError::Setup(_) => (
                "ca_file_unusable",
                "name a file of root certificates in PEM, in a folder of yours".to_owned(),
            ),
        };
        Fault::new(Exit::Settings, r#type, chain(&error), advice)
    })?;
    let text = format!(
        "{} root certificates: {}",
        roots.store.len(),
        roots.sources.join(", ")
    );
    Ok(Finding::new(roots.store, text))
}

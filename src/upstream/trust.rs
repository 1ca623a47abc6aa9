//! Trust roots: the certificates by which the proxy checks that a server is upstream.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs, io};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CipherSuite, ClientConfig, RootCertStore};

use crate::auth::trusted_file::{self, TrustedFileError};
use crate::error::BoxError;

/// Variable that names a file of roots. They replace those of the platform, as in OpenSSL (`openssl-env(7)`).
const FILE: &str = "SSL_CERT_FILE";
/// Variable that names folders of such roots, with `:` between them.
const FOLDERS: &str = "SSL_CERT_DIR";

/// The trust roots and their sources.
#[derive(Clone, Debug)]
pub struct TrustRoots {
    pub store: Arc<RootCertStore>,
    /// Number of roots from each source, as text for people.
    pub sources: Vec<String>,
    /// True if environment variables have replaced the roots of the platform.
    pub is_of_environment: bool,
}

/// Problems with the trust roots or with the set-up of TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of `upstream.ca_file` cannot be used.
    #[error("`upstream.ca_file`: cannot use {}", .0.display())]
    CaFile(PathBuf, #[source] BoxError),
    /// The file or folders that a variable names cannot be used.
    #[error("`{variable}`: cannot use {}", .path.display())]
    Environment {
        variable: &'static str,
        /// Value of the variable, as a path.
        path: PathBuf,
        #[source]
        cause: BoxError,
    },
    /// The TLS library does not accept these settings.
    #[error("cannot set up TLS")]
    Setup(#[from] rustls::Error),
}

/// Collects the roots of the platform and of `ca_file`.
///
/// If the platform has no roots at all, as in an empty container, the bundled roots of Mozilla are used
/// instead. `SSL_CERT_FILE` and `SSL_CERT_DIR` replace the roots of the platform. If those are in no usual
/// place, as with Nix and conda, all programs rely on these variables.
///
/// # Errors
///
/// [`TlsError::CaFile`] and [`TlsError::Environment`].
pub fn trust_roots(ca_file: Option<&Path>) -> Result<TrustRoots, TlsError> {
    let mut store = RootCertStore::empty();
    let mut sources = of_environment(&mut store)?;
    let is_of_environment = !sources.is_empty();
    if !is_of_environment {
        sources.push(of_platform(&mut store));
    }
    if let Some(path) = ca_file {
        let unusable = |error: BoxError| TlsError::CaFile(path.to_owned(), error);
        let file = trusted_file::read(path).map_err(|error| unusable(error.into()))?;
        let before = store.len();
        for certificate in CertificateDer::pem_slice_iter(&file.bytes) {
            let certificate = certificate.map_err(|error| unusable(error.into()))?;
            store
                .add(certificate)
                .map_err(|error| unusable(error.into()))?;
        }
        let added = store.len() - before;
        if added == 0 {
            return Err(unusable("it holds no certificate".into()));
        }
        sources.push(format!("{added} of upstream.ca_file ({})", path.display()));
    }
    Ok(TrustRoots {
        store: Arc::new(store),
        sources,
        is_of_environment,
    })
}

/// Adds the roots of the platform, or else the bundled ones, and returns their number and source for people.
fn of_platform(store: &mut RootCertStore) -> String {
    let platform = rustls_native_certs::load_native_certs();
    for error in &platform.errors {
        tracing::debug!(%error, "platform trust roots");
    }
    let (added, _) = store.add_parsable_certificates(platform.certs);
    if added > 0 {
        return format!("{added} of this platform");
    }
    store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    format!("{} bundled with this program", store.len())
}

/// Adds the roots that the environment variables name, and returns their numbers and sources for people.
/// Returns an empty list if no such variable is set.
fn of_environment(store: &mut RootCertStore) -> Result<Vec<String>, TlsError> {
    let mut sources = Vec::new();
    for (variable, read) in [
        (FILE, of_file as fn(&OsStr) -> Result<_, BoxError>),
        (FOLDERS, of_folders),
    ] {
        let Some(value) = env::var_os(variable) else {
            continue;
        };
        let unusable = |cause| TlsError::Environment {
            variable,
            path: PathBuf::from(&value),
            cause,
        };
        match (variable, value.is_empty()) {
            // With an empty value, the library that reads the platform's roots would find none, and the
            // bundled ones would be used.
            (FILE, true) => return Err(unusable("it is empty: unset it".into())),
            (_, true) => continue,
            (_, false) => {}
        }
        let (added, _) = store.add_parsable_certificates(read(&value).map_err(unusable)?);
        if added == 0 {
            return Err(unusable("it holds no certificate".into()));
        }
        let path = Path::new(&value).display();
        sources.push(format!("{added} of {variable} ({path})"));
    }
    Ok(sources)
}

fn of_file(path: &OsStr) -> Result<Vec<CertificateDer<'static>>, BoxError> {
    Ok(certificates(Path::new(path))?)
}

/// Returns the certificates in folders, each of them once, because `openssl rehash` adds links to the files.
fn of_folders(folders: &OsStr) -> Result<Vec<CertificateDer<'static>>, BoxError> {
    let (mut found, mut left_out) = (Vec::new(), None);
    for folder in env::split_paths(folders) {
        let entries = match fs::read_dir(&folder) {
            // Such lists name the usual folders of several systems, which do not all exist.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
                continue;
            }
            match certificates(&path) {
                Ok(certificates) => found.extend(certificates),
                // A file that cannot be read adds no roots, and is no reason to fail.
                Err(TrustedFileError::Io(error)) => {
                    tracing::debug!(%error, path = %path.display(), "trust root");
                }
                Err(untrusted) => {
                    let reason = format!("{}: {untrusted}", path.display());
                    tracing::warn!("trust root left out: {reason}");
                    left_out = Some(reason);
                }
            }
        }
    }
    if let (true, Some(reason)) = (found.is_empty(), left_out) {
        return Err(reason.into());
    }
    found.sort_unstable_by(|a, b| a[..].cmp(&b[..]));
    found.dedup();
    Ok(found)
}

/// Returns the certificates of a file, which may hold other things too.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustedFileError> {
    let file = trusted_file::read(path)?;
    let sections = CertificateDer::pem_slice_iter(&file.bytes);
    Ok(sections.filter_map(Result::ok).collect())
}

/// Creates TLS settings that trust the [`trust_roots`].
///
/// # Errors
///
/// Any [`TlsError`].
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let roots = trust_roots(ca_file)?;
    let sources = roots.sources.join(", ");
    if roots.is_of_environment {
        tracing::info!(sources, "trust roots");
    } else {
        tracing::debug!(sources, "trust roots");
    }
    client_config_with(roots.store)
}

/// Creates TLS settings that trust `roots`.
///
/// # Errors
///
/// [`TlsError::Setup`].
pub fn client_config_with(roots: Arc<RootCertStore>) -> Result<ClientConfig, TlsError> {
    let mut provider = rustls::crypto::ring::default_provider();
    // AES-128 comes first, which browsers prefer too. With 256 bits, both ends spend a tenth more on an
    // upload.
    provider
        .cipher_suites
        .sort_by_key(|suite| !is_aes_128(suite.suite()));
    Ok(ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

fn is_aes_128(suite: CipherSuite) -> bool {
    matches!(
        suite,
        CipherSuite::TLS13_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}

//! Whom to believe that they are upstream.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CipherSuite, ClientConfig, RootCertStore};

use crate::error::BoxError;
use crate::trusted_file;

/// What is wrong with the trust roots.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// `upstream.ca_file` cannot be used.
    #[error("`upstream.ca_file`: cannot use {}", .0.display())]
    CaFile(PathBuf, #[source] BoxError),
    /// The TLS library does not take our settings.
    #[error("cannot set up TLS")]
    Setup(#[from] rustls::Error),
}

/// Trusts what the platform trusts, and `ca_file`; where the platform has no roots at all, as in
/// an empty container, Mozilla's, which are bundled.
///
/// # Errors
///
/// [`TlsError::CaFile`].
pub fn trust_roots(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    let platform = rustls_native_certs::load_native_certs();
    for error in &platform.errors {
        tracing::debug!(%error, "platform trust roots");
    }
    roots.add_parsable_certificates(platform.certs);
    if roots.is_empty() {
        tracing::debug!("no trust roots on this platform: using the bundled ones");
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    }
    if let Some(path) = ca_file {
        let unusable = |error: BoxError| TlsError::CaFile(path.to_owned(), error);
        let file = trusted_file::read(path).map_err(|error| unusable(error.into()))?;
        let mut found = false;
        for certificate in CertificateDer::pem_slice_iter(&file.bytes) {
            let certificate = certificate.map_err(|error| unusable(error.into()))?;
            roots
                .add(certificate)
                .map_err(|error| unusable(error.into()))?;
            found = true;
        }
        if !found {
            return Err(unusable("it holds no certificate".into()));
        }
    }
    Ok(roots)
}

/// Trusts the [`trust_roots`].
///
/// # Errors
///
/// [`TlsError`].
pub fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let mut provider = rustls::crypto::ring::default_provider();
    // What browsers like best too: with 256 bits both ends spend a tenth more on an upload.
    provider
        .cipher_suites
        .sort_by_key(|suite| !is_aes_128(suite.suite()));
    Ok(ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(trust_roots(ca_file)?)
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

//! HTTPS: the certificate, which can be renewed while the proxy runs, and the handshake.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

use crate::auth::trusted_file;
use crate::error::BoxError;

/// ALPN name of the only protocol on offer.
const HTTP_1: &[u8] = b"http/1.1";
/// Response to a client that sends plain HTTP to an HTTPS port.
const PLAIN_HTTP: &[u8] = b"HTTP/1.1 400 Bad Request\r\n\
    content-type: text/plain\r\n\
    content-length: 29\r\n\
    connection: close\r\n\r\n\
    this port speaks HTTPS only.\n";
/// Most bytes to read of a refused plain request, so that the response is not lost in a reset.
const LONGEST_PLAIN: u64 = 64 << 10;

/// Paths of a certificate and of its private key, both in PEM.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    /// The chain, our own certificate first (`listen.tls.certificate_file`).
    pub certificate: PathBuf,
    /// Private key of the certificate (`listen.tls.key_file`).
    pub key: PathBuf,
}

/// Certificate for clients, and its files.
#[derive(Debug)]
pub struct Certificate {
    files: CertificateFiles,
    current: ArcSwap<CertifiedKey>,
}

/// Reasons why a certificate is not used. They show nothing of the key.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("`listen.tls.certificate_file`: cannot use {}", .0.display())]
    Certificate(PathBuf, #[source] BoxError),
    #[error("`listen.tls.key_file`: cannot use {}", .0.display())]
    Key(PathBuf, #[source] BoxError),
    #[error("`listen.tls.key_file`: {} is not the key of the certificate", .0.display())]
    Mismatch(PathBuf),
}

/// Connection whose TLS handshake is still to be done.
pub(super) struct Handshake {
    pub(super) config: Arc<ServerConfig>,
    pub(super) stream: TcpStream,
}

/// Certificate and key as loaded from the files.
struct Loaded {
    certificate: CertifiedKey,
    /// True if every user of this machine can read the key.
    exposed: bool,
}

// === impl CertificateFiles ===

impl CertificateFiles {
    fn load(&self) -> Result<Loaded, CertificateError> {
        let unusable = |error| CertificateError::Certificate(self.certificate.clone(), error);
        let pem = trusted_file::read_public(&self.certificate);
        let pem = pem.map_err(|error| unusable(error.into()))?;
        let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|error| unusable(error.into()))?;
        if chain.is_empty() {
            return Err(unusable("it holds no certificate in PEM".into()));
        }
        let (key, exposed) = self.load_key()?;
        let certificate = CertifiedKey::new(chain, key);
        match certificate.keys_match() {
            Ok(()) => Ok(Loaded {
                certificate,
                exposed,
            }),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(CertificateError::Mismatch(self.key.clone()))
            }
            Err(error) => Err(unusable(error.into())),
        }
    }

    fn load_key(&self) -> Result<(Arc<dyn SigningKey>, bool), CertificateError> {
        let unusable = |error| CertificateError::Key(self.key.clone(), error);
        let file = trusted_file::read(&self.key).map_err(|error| unusable(error.into()))?;
        // The parser's own error is dropped, because it quotes the file.
        let key = PrivateKeyDer::from_pem_slice(&file.bytes)
            .map_err(|_| unusable("it holds no unencrypted private key in PEM".into()))?;
        let key = ring::sign::any_supported_type(&Zeroizing::new(key))
            .map_err(|error| unusable(error.into()))?;
        Ok((key, file.exposed))
    }
}

// === impl Certificate ===

impl Certificate {
    /// Reads the certificate and its key.
    ///
    /// # Errors
    ///
    /// [`CertificateError`]
    pub fn load(files: CertificateFiles) -> Result<Self, CertificateError> {
        let loaded = files.load()?;
        loaded.warn(&files);
        Ok(Self {
            files,
            current: ArcSwap::from_pointee(loaded.certificate),
        })
    }

    /// Reads the files again, and shows their content from the next connection on. Returns true if the
    /// certificate has changed.
    ///
    /// # Errors
    ///
    /// [`CertificateError`]. The certificate then stays as it was.
    pub fn reload(&self) -> Result<bool, CertificateError> {
        let loaded = self.files.load()?;
        // A new key always has a new certificate, because the certificate certifies the key.
        let changed = loaded.certificate.cert != self.current.load().cert;
        if changed {
            loaded.warn(&self.files);
            self.current.store(Arc::new(loaded.certificate));
        }
        Ok(changed)
    }

    /// Returns the chain that clients are shown now, our own certificate first.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.current.load().cert.clone()
    }

    /// Returns the configuration with which a listener speaks TLS with this certificate.
    ///
    /// # Errors
    ///
    /// The TLS library rejects our settings.
    pub fn server_config(self: Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(self);
        config.alpn_protocols = vec![HTTP_1.to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

// === impl Loaded ===

impl Loaded {
    fn warn(&self, files: &CertificateFiles) {
        if self.exposed {
            let path = files.key.display();
            tracing::warn!("listen.tls.key_file: every user can read {path}: chmod 600");
        }
    }
}

// === impl Handshake ===

impl Handshake {
    /// Runs the handshake. It waits for the client without a timeout.
    pub(super) async fn finish(mut self) -> io::Result<TlsStream<TcpStream>> {
        let mut first = [0];
        // No TLS record begins with a letter, but every HTTP method does.
        if self.stream.peek(&mut first).await? > 0 && first[0].is_ascii_uppercase() {
            refuse_plain(&mut self.stream).await?;
            return Err(io::Error::other("plain HTTP on a port of HTTPS"));
        }
        TlsAcceptor::from(self.config).accept(self.stream).await
    }
}

async fn refuse_plain(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(PLAIN_HTTP).await?;
    stream.shutdown().await?;
    copy(&mut stream.take(LONGEST_PLAIN), &mut sink()).await?;
    Ok(())
}

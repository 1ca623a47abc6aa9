//! Certificates that only one test trusts.

use std::{sync::Arc, time::Duration};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd,
};
use rustls::{ClientConfig, RootCertStore, crypto::CryptoProvider};

/// Trust root of a test.
pub struct Root(CertifiedIssuer<'static, KeyPair>);

/// Certificate that a root has signed, with its key.
pub struct Issued {
    pub certificate: Certificate,
    pub key: KeyPair,
}

// === impl Root ===

impl Root {
    pub fn new() -> Self {
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(root, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn issue(&self, name: &str) -> Issued {
        self.sign(&CertificateParams::new([name.to_owned()]).unwrap())
    }

    /// Issues a certificate that ends at this time, in seconds since 1970.
    pub fn issue_until(&self, name: &str, end: u64) -> Issued {
        let mut certificate = CertificateParams::new([name.to_owned()]).unwrap();
        certificate.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(end);
        self.sign(&certificate)
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    fn sign(&self, certificate: &CertificateParams) -> Issued {
        let key = KeyPair::generate().unwrap();
        let certificate = certificate.signed_by(&key, &self.0).unwrap();
        Issued { certificate, key }
    }

    /// Returns the configuration of a client that trusts only this root and offers these protocols.
    pub fn client(&self, protocols: &[&str]) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = protocols
            .iter()
            .map(|name| name.as_bytes().into())
            .collect();
        client
    }
}

pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

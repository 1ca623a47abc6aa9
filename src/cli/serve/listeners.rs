//! The sockets that clients connect to.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use crate::cli::{Exit, Failure};
use crate::error::chain;
use crate::server::{self, Certificate, CertificateFiles, Listener, SocketFile};
use crate::settings::{Listen, Problem, Settings};
use crate::upstream::Origin;

/// All listening sockets but the sandbox's.
pub(super) struct Listeners {
    /// Where requests come from.
    pub(super) data: Vec<Listener>,
    /// Health and metrics.
    pub(super) admin: Option<Listener>,
    /// The file of a Unix socket that we made.
    pub(super) socket_file: Option<SocketFile>,
    /// What clients are shown over TLS.
    pub(super) certificate: Option<Arc<Certificate>>,
}

// === impl Listeners ===

impl Listeners {
    /// Opens what the settings ask for. Call it before the first thread is started, as
    /// [`SocketFile::bind`] says.
    pub(super) fn open(settings: &Settings) -> Result<Self, Failure> {
        let Listen {
            addresses,
            unix_socket,
            ..
        } = &settings.listen;
        let certificate = load_certificate(&settings.listen)?;
        let tls = certificate.clone().map(Certificate::server_config);
        let tls = tls.transpose();
        let tls = tls.map_err(|error| Failure::because(Exit::Failed, &error))?;
        let mut data = Vec::new();
        for address in addresses {
            let socket = bind(*address)?;
            data.push(match &tls {
                Some(tls) => Listener::Tls(socket, Arc::clone(tls)),
                None => Listener::Tcp(socket),
            });
        }
        let admin = settings.admin.address.map(bind).transpose()?;
        let mut socket_file = None;
        if let Some(path) = unix_socket {
            let (socket, file) = SocketFile::bind(path).map_err(|error| {
                let (path, error) = (path.display(), chain(&error));
                Failure::new(Exit::Failed, format!("cannot listen on {path}: {error}"))
            })?;
            data.push(Listener::Unix(socket));
            socket_file = Some(file);
        }
        Ok(Self {
            data,
            admin: admin.map(Listener::Tcp),
            socket_file,
            certificate,
        })
    }

    /// Whether other machines can connect.
    pub(super) fn are_exposed(&self) -> bool {
        !self.data.iter().all(Listener::is_local)
    }

    /// A proxy whose upstream is itself would answer no request and fill up; if it were the admin
    /// listener, that would be reachable through the data listener.
    pub(super) fn refuse_circle(&self, origin: &Origin) -> Result<(), Failure> {
        let addresses = self.data.iter().chain(&self.admin);
        let mut ports = addresses.filter_map(|listener| Some(listener.address()?.port()));
        if ports.any(|port| origin.loopback_port() == Some(port)) {
            let problem = Problem::new("upstream.url", format!("{origin} is this proxy itself"));
            return Err(Failure::new(Exit::Settings, problem.to_string()));
        }
        Ok(())
    }
}

/// Opens a TCP socket.
pub(super) fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    server::bind(address)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot listen on {address}: {error}")))
}

fn load_certificate(listen: &Listen) -> Result<Option<Arc<Certificate>>, Failure> {
    let (Some(certificate), Some(key)) = (&listen.certificate_file, &listen.key_file) else {
        return Ok(None);
    };
    let certificate = Certificate::load(CertificateFiles {
        certificate: certificate.clone(),
        key: key.clone(),
    });
    let certificate = certificate.map_err(|error| Failure::because(Exit::Settings, &error))?;
    Ok(Some(Arc::new(certificate)))
}

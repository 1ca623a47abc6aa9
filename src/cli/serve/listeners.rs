//! The sockets that clients connect to.

use std::net::{SocketAddr, TcpListener};

use crate::cli::{Exit, Failure};
use crate::error::chain;
use crate::server::{self, Listener, SocketFile};
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
        let mut data = Vec::new();
        for address in addresses {
            data.push(Listener::Tcp(bind(*address)?));
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
        })
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

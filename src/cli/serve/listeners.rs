//! The sockets that clients connect to.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use super::configuration::Configuration;
use crate::cli::health::reachable;
use crate::cli::{Exit, Failure, taken_port};
use crate::error::chain;
use crate::server::{self, Certificate, CertificateFiles, Listener, SocketFile};
use crate::settings::{ListenSettings, SettingProblem, Settings};
use crate::upstream::Origin;

/// All listening sockets except the one of the sandbox.
pub(in crate::cli) struct Listeners {
    /// Sockets for requests that are forwarded.
    pub(super) data: Vec<Listener>,
    /// Sockets for health and metrics.
    pub(super) admin: Vec<Listener>,
    /// File of the Unix socket, if this process has made one.
    pub(super) socket_file: Option<SocketFile>,
    /// Certificate for HTTPS; `None` for plain HTTP.
    pub(super) certificate: Option<Arc<Certificate>>,
}

/// Name of an inherited socket for health and metrics.
const ADMIN: &str = "admin";

// === impl Listeners ===

impl Listeners {
    /// Takes over the sockets that a service manager has opened, else opens what the settings ask
    /// for. Call it before the first thread is started, as [`SocketFile::bind`] says.
    pub(super) fn open(
        configuration: &Configuration,
        inherited: Vec<(String, Listener)>,
    ) -> Result<Self, Failure> {
        let settings = &configuration.settings;
        let certificate = load_certificate(&settings.listen)?;
        let (mut data, mut admin) = (Vec::new(), Vec::new());
        for (name, listener) in inherited {
            if name == ADMIN {
                admin.push(listener);
            } else {
                refuse_exposed(&listener, settings)?;
                data.push(listener);
            }
        }
        let mut socket_file = None;
        if data.is_empty() {
            refuse_nowhere(&settings.listen)?;
            for address in &settings.listen.addresses {
                let instead = SocketAddr::new(address.ip(), 0);
                let instead = format!("--listen {instead} --admin off");
                data.push(Listener::Tcp(taken_port::bind(*address, &instead)?));
            }
            if let Some(path) = &settings.listen.unix_socket {
                let (socket, file) = bind_file(path)?;
                data.push(Listener::Unix(socket));
                socket_file = Some(file);
            }
        }
        // At last: if both ports are taken, the message names that of the clients.
        if admin.is_empty()
            && let Some(address) = settings.admin.address
        {
            admin.push(Listener::Tcp(bind_admin(address, configuration)?));
        }
        if let Some(certificate) = &certificate {
            let config = Arc::clone(certificate).server_config();
            let config = config.map_err(|error| Failure::because(Exit::Failed, &error))?;
            let secure = |listener: Listener| listener.with_tls(&config);
            data = data.into_iter().map(secure).collect();
        }
        Ok(Self {
            data,
            admin,
            socket_file,
            certificate,
        })
    }

    /// Opens one socket on a free port of the loopback address, regardless of the settings. Returns its
    /// address too.
    pub(in crate::cli) fn private() -> Result<(Self, SocketAddr), Failure> {
        let listener = bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener
            .local_addr()
            .map_err(|error| Failure::because(Exit::Failed, &error))?;
        let listeners = Self {
            data: vec![Listener::Tcp(listener)],
            admin: Vec::new(),
            socket_file: None,
            certificate: None,
        };
        Ok((listeners, address))
    }

    /// Returns the URL at which clients reach the first TCP socket for requests, for the links to the
    /// sandbox's results; `None` if there is no such socket. The host of the URL is one of the allowed
    /// `hosts`: the address of the socket, else the first of them.
    pub(super) fn public_url(&self, hosts: &[String]) -> Option<String> {
        let (listener, address) = with_address(&self.data)?;
        let scheme = match listener {
            Listener::Tls(..) => "https",
            Listener::Tcp(_) | Listener::Unix(_) | Listener::Memory(_) => "http",
        };
        let own = match address.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let host = if hosts.contains(&own) {
            &own
        } else {
            hosts.first()?
        };
        Some(format!("{scheme}://{host}:{}", address.port()))
    }

    /// Returns the URL of the first TCP socket for health and metrics.
    pub(super) fn admin_url(&self) -> Option<String> {
        let (_, address) = with_address(&self.admin)?;
        Some(format!("http://{address}"))
    }

    /// Returns true if other machines can connect to a socket for requests.
    pub(super) fn are_exposed(&self) -> bool {
        !self.data.iter().all(Listener::is_local)
    }

    /// Refuses an upstream that is the proxy itself. Such a proxy would answer no request and fill up. If
    /// upstream were the admin listener, clients could reach that listener through the proxy.
    pub(super) fn refuse_circle(&self, origin: &Origin) -> Result<(), Failure> {
        let addresses = self.data.iter().chain(&self.admin);
        let mut ports = addresses.filter_map(|listener| Some(listener.address()?.port()));
        if ports.any(|port| origin.loopback_port() == Some(port)) {
            let problem =
                SettingProblem::new("upstream.url", format!("{origin} is this proxy itself"));
            return Err(Failure::new(Exit::Settings, problem.to_string()));
        }
        Ok(())
    }
}

/// Returns the first TCP socket with its address, as clients on this machine write it.
fn with_address(listeners: &[Listener]) -> Option<(&Listener, SocketAddr)> {
    listeners
        .iter()
        .find_map(|listener| Some((listener, reachable(listener.address()?))))
}

/// Opens the admin listener. If nobody has chosen its port and another proxy has it, any other will do.
fn bind_admin(address: SocketAddr, configuration: &Configuration) -> Result<TcpListener, Failure> {
    let mut rows = configuration.rows.iter();
    let is_default = rows.any(|row| row.key == "admin.address" && row.is_default());
    match server::bind(address) {
        Err(error) if is_default && error.kind() == io::ErrorKind::AddrInUse => {
            let listener = bind(SocketAddr::new(address.ip(), 0))?;
            if let Ok(own) = listener.local_addr() {
                tracing::warn!(
                    "admin.address: {address} is taken, so the admin listener of this proxy is at {own}"
                );
            }
            Ok(listener)
        }
        Ok(listener) => Ok(listener),
        Err(_) => taken_port::bind(address, "--admin off"),
    }
}

/// Opens a TCP socket that listens on `address`.
pub(super) fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    server::bind(address)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot listen on {address}: {error}")))
}

fn bind_file(path: &Path) -> Result<(UnixListener, SocketFile), Failure> {
    SocketFile::bind(path).map_err(|error| {
        let (path, error) = (path.display(), chain(&error));
        Failure::new(Exit::Failed, format!("cannot listen on {path}: {error}"))
    })
}

/// Refuses an inherited socket that other machines can reach, by the rule for `listen.address`.
fn refuse_exposed(listener: &Listener, settings: &Settings) -> Result<(), Failure> {
    let address = listener.address();
    match address.and_then(|address| settings.exposure("LISTEN_FDS", address)) {
        Some(problem) => Err(Failure::new(Exit::Settings, problem.to_string())),
        None => Ok(()),
    }
}

/// Finds settings that ask for no listener at all.
fn refuse_nowhere(listen: &ListenSettings) -> Result<(), Failure> {
    if !listen.addresses.is_empty() || listen.unix_socket.is_some() {
        return Ok(());
    }
    let reason = "want an address, where there is no listen.unix_socket";
    let problem = SettingProblem::new("listen.address", reason);
    Err(Failure::new(Exit::Settings, problem.to_string()))
}

fn load_certificate(listen: &ListenSettings) -> Result<Option<Arc<Certificate>>, Failure> {
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

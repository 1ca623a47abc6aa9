//! Connects to upstream in steps: name, connection, tunnel, TLS. The step that fails shows which part of the
//! connection is broken.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use http::StatusCode;
use reqwest::Client;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore,
    SignatureScheme,
};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::certificate::{CertificateFacts, time};
use super::report::{Fault, Finding, Report, StepResult};
use crate::cli::{Exit, http_client};
use crate::error::{BoxError, chain};
use crate::telemetry::printable;
use crate::upstream::{EgressProxy, Origin, Timeouts, TunnelError};

/// Upstream to connect to, with the egress proxy, root certificates and timeouts for it.
#[derive(Clone)]
pub(super) struct Target {
    /// Egress proxy through which upstream is reached; `None` for a direct connection.
    pub(super) egress: Option<EgressProxy>,
    pub(super) origin: Origin,
    pub(super) roots: Arc<RootCertStore>,
    pub(super) timeouts: Timeouts,
}

/// Certificate verifier that keeps the server's certificate. After a refusal the certificate is not available
/// from anywhere else.
#[derive(Debug)]
struct Witness {
    verifier: Arc<WebPkiServerVerifier>,
    shown: Mutex<Option<CertificateFacts>>,
}

// === impl Target ===

impl Target {
    /// Connects to upstream, with one step of the report for each part, and then closes the connection. The
    /// HTTP client that sends the request cannot report these steps, so they are made here.
    pub(super) async fn reach(&self, report: &mut Report, now: SystemTime) -> Result<(), Fault> {
        let deadline = self.deadline();
        let addresses = report.wait("name", self.resolve(deadline)).await?;
        let connected = self.connect(&addresses, deadline);
        let stream = report.wait("connection", connected).await?;
        let stream = match &self.egress {
            Some(egress) => {
                let tunnel = self.open_tunnel(egress, stream, deadline);
                report.wait("tunnel", tunnel).await?
            }
            None => stream,
        };
        if self.origin.is_secure() {
            let encrypted = self.encrypt(stream, deadline, now);
            report.wait("tls", encrypted).await?;
        }
        Ok(())
    }

    /// Makes an HTTP client that connects with the same root certificates and egress proxy.
    pub(super) fn client(&self) -> Result<Client, Fault> {
        http_client::client(Arc::clone(&self.roots), self.egress.as_ref())
            .map_err(|error| tls_failed(chain(&error)))
    }

    /// Returns the time by which name, connection, tunnel and TLS together must be done.
    fn deadline(&self) -> Instant {
        Instant::now() + self.timeouts.connect
    }

    /// Returns the name and port that this machine itself connects to, and the setting that names them.
    fn first_hop(&self) -> (&str, u16, &'static str) {
        let ((name, port), setting) = match &self.egress {
            Some(egress) => (egress.name_and_port(), "upstream.proxy"),
            None => (self.origin.name_and_port(), "upstream.url"),
        };
        (name, port, setting)
    }

    /// Finds the addresses of the first hop's name.
    async fn resolve(&self, deadline: Instant) -> StepResult<Vec<SocketAddr>> {
        let (name, port, setting) = self.first_hop();
        if let Ok(address) = name.parse::<IpAddr>() {
            let addresses = vec![SocketAddr::new(address, port)];
            return Ok(Finding::new(addresses, format!("{setting} has an address")));
        }
        let reason = match timeout_at(deadline, lookup_host((name, port))).await {
            Ok(Ok(addresses)) => {
                let addresses: Vec<_> = addresses.collect();
                let shown: Vec<_> = addresses
                    .iter()
                    .map(|found| found.ip().to_string())
                    .collect();
                let text = format!("{name} is {}", shown.join(", "));
                return Ok(Finding::new(addresses, text));
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => self.too_long(),
        };
        let text = format!("cannot resolve {name}: {reason}");
        Err(if has_route() {
            Fault::new(
                Exit::Unavailable,
                "name_not_resolved",
                text,
                format!(
                    "look at the spelling of {setting}, and at this machine's name servers \
                     (/etc/resolv.conf); in a container, at its DNS policy"
                ),
            )
        } else {
            no_network(&text)
        })
    }

    /// Connects to the first address that accepts a connection.
    async fn connect(&self, addresses: &[SocketAddr], deadline: Instant) -> StepResult<TcpStream> {
        let mut failures = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            // An address that does not respond must not use up the time of the others.
            let rest = deadline.saturating_duration_since(Instant::now());
            let share = rest / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
            let connected = timeout_at(Instant::now() + share, TcpStream::connect(address)).await;
            match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => return Ok(Finding::new(stream, format!("to {address}"))),
                Err(error) => failures.push((address, error)),
            }
        }
        let texts = failures
            .iter()
            .map(|(address, error)| format!("{address}: {error}"));
        let text = texts.collect::<Vec<_>>().join("; ");
        let kinds: Vec<_> = failures.iter().map(|(_, error)| error.kind()).collect();
        let (_, _, setting) = self.first_hop();
        let fault = |r#type, advice: &str| Fault::new(Exit::Unavailable, r#type, &text, advice);
        // If the addresses fail in different ways, the most informative failure is reported.
        Err(if kinds.contains(&io::ErrorKind::ConnectionRefused) {
            fault(
                "connection_refused",
                &format!(
                    "the machine answers, and nothing listens at this port: look at {setting}"
                ),
            )
        } else if kinds.contains(&io::ErrorKind::TimedOut) {
            fault(
                "connection_timed_out",
                "nothing answers: a firewall may drop it; where only an egress proxy leads out, \
                 name it in upstream.proxy, since the environment's proxy variables are ignored",
            )
        } else if has_route() {
            fault("no_route", "look at this machine's routes and its firewall")
        } else {
            no_network(&text)
        })
    }

    /// Asks the egress proxy for a tunnel to upstream.
    async fn open_tunnel(
        &self,
        egress: &EgressProxy,
        stream: TcpStream,
        deadline: Instant,
    ) -> StepResult<TcpStream> {
        let text = match timeout_at(deadline, egress.open_tunnel(stream, &self.origin)).await {
            Ok(Ok(tunnel)) => return Ok(Finding::new(tunnel, "through upstream.proxy")),
            Ok(Err(error @ TunnelError::Refused(StatusCode::PROXY_AUTHENTICATION_REQUIRED))) => {
                return Err(Fault::new(
                    Exit::Unavailable,
                    "tunnel_unauthorized",
                    chain(&error),
                    "put user and password that the proxy knows into upstream.proxy: \
                     http://user:password@…",
                ));
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => self.too_long(),
        };
        Err(Fault::new(
            Exit::Unavailable,
            "tunnel_refused",
            printable(&text),
            format!(
                "the proxy must allow CONNECT to {}, and reach it: ask who runs it, and look at \
                 upstream.proxy",
                self.origin
            ),
        ))
    }

    /// Makes the TLS handshake, and reports the issuer of upstream's certificate.
    async fn encrypt(&self, stream: TcpStream, deadline: Instant, now: SystemTime) -> StepResult {
        let (name, _) = self.origin.name_and_port();
        let failed = |error: BoxError| tls_failed(chain(&*error));
        let witness = Witness::new(&self.roots).map_err(failed)?;
        let config = witness.config().map_err(|error| failed(error.into()))?;
        let server = ServerName::try_from(name.to_owned()).map_err(|error| failed(error.into()))?;
        let handshake = TlsConnector::from(Arc::new(config)).connect(server, stream);
        match timeout_at(deadline, handshake).await {
            Ok(Ok(_)) => {
                let text = match witness.shown() {
                    Some(CertificateFacts { issuer, ends, .. }) => {
                        format!("certificate of {issuer}, good until {}", time(ends))
                    }
                    None => "certificate verified".to_owned(),
                };
                Ok(Finding::new((), text))
            }
            Ok(Err(error)) => Err(refused(name, &error, witness.shown().as_ref(), now)),
            Err(_) => Err(tls_failed(self.too_long())),
        }
    }

    fn too_long(&self) -> String {
        let limit = humantime::format_duration(self.timeouts.connect);
        format!("not within upstream.connect_timeout, {limit}")
    }
}

// === impl Witness ===

impl Witness {
    fn new(roots: &Arc<RootCertStore>) -> Result<Arc<Self>, BoxError> {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), provider);
        Ok(Arc::new(Self {
            verifier: verifier.build()?,
            shown: Mutex::default(),
        }))
    }

    /// Makes a TLS configuration that trusts only the servers that the verifier trusts.
    fn config(self: &Arc<Self>) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        Ok(ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::<Self>::clone(self))
            .with_no_client_auth())
    }

    fn shown(&self) -> Option<CertificateFacts> {
        let shown = self.shown.lock();
        shown.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = CertificateFacts::read(own);
        self.verifier
            .verify_server_cert(own, others, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier
            .verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.verifier
            .verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// Describes a TLS handshake that failed, by the error and the certificate that the server showed.
fn refused(
    name: &str,
    error: &io::Error,
    shown: Option<&CertificateFacts>,
    now: SystemTime,
) -> Fault {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let Some(TlsError::InvalidCertificate(wrong)) = cause else {
        let text = printable(&chain(error)).into_owned();
        return match cause {
            Some(TlsError::InvalidMessage(_)) => Fault::new(
                Exit::Unavailable,
                "not_tls",
                format!("what answers for {name} does not speak TLS: {text}"),
                "look at the port of upstream.url; a hotel's or a guest network may want a login \
                 first",
            ),
            _ => tls_failed(text),
        };
    };
    let issuer = shown.map_or("somebody unknown", |facts| facts.issuer.as_str());
    match (wrong, shown) {
        (
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
            Some(CertificateFacts { begins, ends, .. }),
        ) => Fault::new(
            Exit::Unavailable,
            "certificate_out_of_time",
            format!(
                "the certificate for {name}, issued by {issuer}, is good from {} until {}, and \
                 this machine's clock says {}",
                time(*begins),
                time(*ends),
                time(now)
            ),
            "if the clock is wrong, set it; else whoever runs that server has to renew it",
        ),
        (
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            _,
        ) => Fault::new(
            Exit::Unavailable,
            "certificate_of_another_name",
            format!("another server answers for {name}, with a certificate issued by {issuer}"),
            "look at upstream.url, and at what this machine's name servers and /etc/hosts say \
                 of it",
        ),
        _ => Fault::new(
            Exit::Unavailable,
            "certificate_not_trusted",
            format!(
                "the certificate shown for {name} was issued by {issuer}, whom nothing here \
                 trusts ({})",
                printable(&TlsError::InvalidCertificate(wrong.clone()).to_string())
            ),
            "if that is your network's TLS inspection, name its root certificate in \
             upstream.ca_file; if nobody knows of one, somebody reads along: use another network",
        ),
    }
}

fn tls_failed(reason: String) -> Fault {
    Fault::new(
        Exit::Unavailable,
        "tls_failed",
        reason,
        "something in between may end TLS connections: try another network, or ask who runs this \
         one",
    )
}

fn no_network(text: &str) -> Fault {
    Fault::new(
        Exit::Unavailable,
        "no_network",
        format!("{text}; this machine has no route to anywhere"),
        "connect this machine to a network",
    )
}

/// Returns true if this machine has a route to the internet. Nothing is sent: `connect` on a datagram socket
/// only looks up the route. The addresses are reserved for documentation (RFC 5737, RFC 3849).
fn has_route() -> bool {
    let ways = [
        ("0.0.0.0:0", "192.0.2.1:443"),
        ("[::]:0", "[2001:db8::1]:443"),
    ];
    ways.into_iter()
        .any(|(from, to)| UdpSocket::bind(from).is_ok_and(|socket| socket.connect(to).is_ok()))
}

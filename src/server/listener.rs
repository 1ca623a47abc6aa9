//! Listening sockets of every kind, and their connections.

use std::fmt;
use std::future::pending;
use std::io::{self, IoSlice};
use std::net::{self, SocketAddr};
use std::os::unix;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;

use super::head::Head;
use super::reset::Reset;
use super::tls::Handshake;
use crate::auth::client_share::Peer;

/// Longest queue of connections in the kernel that wait to be accepted.
pub(super) const BACKLOG: i32 = 1024;

/// Socket that clients connect to, not yet registered with a runtime.
#[derive(Debug)]
pub enum Listener {
    Tcp(net::TcpListener),
    /// TCP with TLS on top.
    Tls(net::TcpListener, Arc<ServerConfig>),
    Unix(unix::net::UnixListener),
    /// Connections from inside this process, for a simulation.
    Memory(mpsc::Receiver<DuplexStream>),
}

/// [`Listener`] that is registered with a runtime.
pub(super) enum Acceptor {
    Tcp(TcpListener),
    Tls(TcpListener, Arc<ServerConfig>),
    Unix(UnixListener),
    Memory(Mutex<mpsc::Receiver<DuplexStream>>),
}

/// Accepted connection, not yet registered with a runtime.
pub(super) enum Socket {
    Tcp(net::TcpStream),
    Tls(net::TcpStream, Arc<ServerConfig>),
    Unix(unix::net::UnixStream),
    Memory(DuplexStream),
}

/// Connection that is registered with a runtime. All kinds share this type, so that the HTTP code is
/// compiled once.
pub(super) struct ClientStream {
    kind: Kind,
    /// Longest time that the client may leave written data unread.
    idle: Duration,
    reset: Reset,
    head: Head,
    /// Deadline for a client of a Unix socket to read some of the data that waits to be written.
    stall: Option<Pin<Box<Sleep>>>,
}

enum Kind {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
    Memory(DuplexStream),
}

/// Opens a listening socket. It is not shared (`SO_REUSEPORT`): a second proxy on the same port
/// must fail, not take half of the requests.
///
/// # Errors
///
/// The address is taken, or is not this machine's.
pub fn bind(address: SocketAddr) -> io::Result<net::TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    // Lets a restart bind while the kernel still remembers connections of the last run.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

// === impl Listener ===

impl Listener {
    /// Adds TLS to a TCP listener. Leaves other listeners as they are.
    #[must_use]
    pub fn with_tls(self, config: &Arc<ServerConfig>) -> Self {
        match self {
            Self::Tcp(socket) => Self::Tls(socket, Arc::clone(config)),
            other => other,
        }
    }

    /// Returns the address and port of a TCP listener.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(socket) | Self::Tls(socket, _) => socket.local_addr().ok(),
            Self::Unix(_) | Self::Memory(_) => None,
        }
    }

    /// Returns true if only this machine can connect.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) | Self::Memory(_) => true,
            Self::Tcp(_) | Self::Tls(..) => self
                .address()
                .is_some_and(|address| address.ip().is_loopback()),
        }
    }

    /// Registers the listener with the current runtime.
    pub(super) fn register(self) -> io::Result<Acceptor> {
        Ok(match self {
            Self::Tcp(socket) => Acceptor::Tcp(TcpListener::from_std(socket)?),
            Self::Tls(socket, config) => Acceptor::Tls(TcpListener::from_std(socket)?, config),
            Self::Unix(socket) => Acceptor::Unix(UnixListener::from_std(socket)?),
            Self::Memory(coming) => Acceptor::Memory(Mutex::new(coming)),
        })
    }
}

/// Shows the URL to which clients connect.
impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, address) = match self {
            Self::Tcp(socket) => ("http://", socket.local_addr().map(|a| a.to_string())),
            Self::Tls(socket, _) => ("https://", socket.local_addr().map(|a| a.to_string())),
            Self::Unix(socket) => ("unix:", socket.local_addr().map(|a| path(&a))),
            Self::Memory(_) => ("memory:", Ok(String::new())),
        };
        let address = address.unwrap_or_else(|error| format!("({error})"));
        write!(f, "{scheme}{address}")
    }
}

fn path(address: &unix::net::SocketAddr) -> String {
    let path = address.as_pathname();
    path.map_or("unnamed".to_owned(), |path| path.display().to_string())
}

// === impl Acceptor ===

impl Acceptor {
    /// Waits for the next connection.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Tcp(socket) => Socket::Tcp(socket.accept().await?.0.into_std()?),
            Self::Tls(socket, config) => {
                Socket::Tls(socket.accept().await?.0.into_std()?, Arc::clone(config))
            }
            Self::Unix(socket) => Socket::Unix(socket.accept().await?.0.into_std()?),
            Self::Memory(coming) => match coming.lock().await.recv().await {
                Some(stream) => Socket::Memory(stream),
                None => pending().await,
            },
        })
    }
}

// === impl Socket ===

impl Socket {
    /// Registers the socket with the current runtime and runs the TLS handshake, which has no timeout of
    /// its own.
    ///
    /// `idle` is the longest time that the client may leave written data unread. `reset` decides at the
    /// close if the connection is reset. Received bytes count towards `head`.
    pub(super) async fn open(
        self,
        idle: Duration,
        reset: Reset,
        head: Head,
    ) -> io::Result<ClientStream> {
        let tcp = |stream: net::TcpStream| {
            if let Err(error) = set_up(&stream, idle) {
                tracing::debug!(%error, "cannot set up a connection");
            }
            TcpStream::from_std(stream)
        };
        let kind = match self {
            Self::Tcp(stream) => Kind::Tcp(tcp(stream)?),
            Self::Tls(stream, config) => {
                let stream = tcp(stream)?;
                let handshake = Handshake { config, stream };
                // Boxed, because each connection would hold memory for it otherwise.
                Kind::Tls(Box::new(Box::pin(handshake.finish()).await?))
            }
            Self::Unix(stream) => Kind::Unix(UnixStream::from_std(stream)?),
            Self::Memory(stream) => Kind::Memory(stream),
        };
        Ok(ClientStream {
            kind,
            idle,
            reset,
            head,
            stall: None,
        })
    }
}

fn set_up(stream: &net::TcpStream, idle: Duration) -> io::Result<()> {
    // Without this option, a small response may wait for the client's acknowledgement.
    stream.set_nodelay(true)?;
    // hyper has no timeout for a client that stops reading, but the kernel has one (tcp(7)).
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(idle))?;
    Ok(())
}

// === impl ClientStream ===

impl ClientStream {
    /// Returns the address or user that connects, or `None` for a program of our own on this machine.
    pub(super) fn peer(&self) -> Option<Peer> {
        let tcp = |stream: &TcpStream| Peer::at(stream.peer_addr().ok()?.ip());
        match &self.kind {
            Kind::Tcp(stream) => tcp(stream),
            Kind::Tls(stream) => tcp(stream.get_ref().0),
            Kind::Unix(stream) => Peer::user(stream.peer_cred().ok()?.uid()),
            Kind::Memory(_) => None,
        }
    }

    /// Returns the outcome of a write, or an error if the client has read nothing for too long. hyper has
    /// no timeout for that, and the kernel has one for TCP only.
    fn written<T>(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() || !matches!(self.kind, Kind::Unix(_)) {
            self.stall = None;
            return outcome;
        }
        let idle = self.idle;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(idle)));
        ready!(stall.as_mut().poll(cx));
        let error = "the client does not read its answer";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, error)))
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        if !self.reset.is_wanted() {
            return;
        }
        let tcp = match &self.kind {
            Kind::Tcp(stream) => stream,
            Kind::Tls(stream) => stream.get_ref().0,
            Kind::Unix(_) | Kind::Memory(_) => return,
        };
        // If this fails, the connection has ended anyway.
        let _ = socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
    }
}

/// Calls a method of the stream inside.
macro_rules! inner {
    ($stream:ident.$method:ident($($argument:expr),*)) => {
        match &mut $stream.kind {
            Kind::Tcp(stream) => Pin::new(stream).$method($($argument),*),
            Kind::Tls(stream) => Pin::new(stream).$method($($argument),*),
            Kind::Unix(stream) => Pin::new(stream).$method($($argument),*),
            Kind::Memory(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        ready!(inner!(self.poll_read(cx, into)))?;
        Poll::Ready(self.head.received(into.filled().len() - before))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = inner!(self.poll_write(cx, bytes));
        self.written(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = inner!(self.poll_write_vectored(cx, slices));
        self.written(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.kind {
            Kind::Tcp(stream) => stream.is_write_vectored(),
            Kind::Tls(stream) => stream.is_write_vectored(),
            Kind::Unix(stream) => stream.is_write_vectored(),
            Kind::Memory(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = inner!(self.poll_flush(cx));
        self.written(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = inner!(self.poll_shutdown(cx));
        ready!(self.written(cx, outcome))?;
        self.reset.shut_down();
        Poll::Ready(Ok(()))
    }
}

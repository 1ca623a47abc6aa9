//! Listening sockets of every kind, and the connections that come from them.

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

/// How many connections wait in the kernel's queue.
pub(super) const BACKLOG: i32 = 1024;

/// A socket that clients connect to, not bound to a runtime yet.
#[derive(Debug)]
pub enum Listener {
    /// By address and port.
    Tcp(net::TcpListener),
    /// The same, over TLS.
    Tls(net::TcpListener, Arc<ServerConfig>),
    /// By path.
    Unix(unix::net::UnixListener),
    /// By this process itself: a simulation.
    Memory(mpsc::Receiver<DuplexStream>),
}

/// A [`Listener`] in its runtime.
pub(super) enum Acceptor {
    Tcp(TcpListener),
    Tls(TcpListener, Arc<ServerConfig>),
    Unix(UnixListener),
    Memory(Mutex<mpsc::Receiver<DuplexStream>>),
}

/// An accepted connection, not bound to a runtime yet.
pub(super) enum Socket {
    Tcp(net::TcpStream),
    Tls(net::TcpStream, Arc<ServerConfig>),
    Unix(unix::net::UnixStream),
    Memory(DuplexStream),
}

/// A connection in its runtime. One type for all kinds, so that there is one copy of the HTTP code.
pub(super) struct ClientStream {
    kind: Kind,
    /// How long the peer may leave unread what is written to it.
    idle: Duration,
    reset: Reset,
    head: Head,
    /// Of a Unix socket, when a peer is given up that takes nothing of what is written to it.
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
    // A restart need not wait for connections of the last run to be forgotten.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

// === impl Listener ===

impl Listener {
    /// Speaks TLS from now on, if it is one of TCP.
    #[must_use]
    pub fn with_tls(self, config: &Arc<ServerConfig>) -> Self {
        match self {
            Self::Tcp(socket) => Self::Tls(socket, Arc::clone(config)),
            other => other,
        }
    }

    /// Where it listens, if that is an address.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(socket) | Self::Tls(socket, _) => socket.local_addr().ok(),
            Self::Unix(_) | Self::Memory(_) => None,
        }
    }

    /// Whether only this machine can connect.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) | Self::Memory(_) => true,
            Self::Tcp(_) | Self::Tls(..) => self
                .address()
                .is_some_and(|address| address.ip().is_loopback()),
        }
    }

    /// Hands it over to the current runtime.
    pub(super) fn register(self) -> io::Result<Acceptor> {
        Ok(match self {
            Self::Tcp(socket) => Acceptor::Tcp(TcpListener::from_std(socket)?),
            Self::Tls(socket, config) => Acceptor::Tls(TcpListener::from_std(socket)?, config),
            Self::Unix(socket) => Acceptor::Unix(UnixListener::from_std(socket)?),
            Self::Memory(coming) => Acceptor::Memory(Mutex::new(coming)),
        })
    }
}

/// What a client is told to connect to.
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
    /// The next connection.
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
    /// Hands it over to the current runtime, and makes sure of who we are where that takes TLS: as
    /// long as the client likes. `idle` is how long its peer may leave unread what was written to it;
    /// it is reset when it is closed, if that is wanted by then; what comes is counted to its `head`.
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
                // Boxed, or each connection would have room for it.
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
    // Without it a small answer may wait for the client's acknowledgement.
    stream.set_nodelay(true)?;
    // hyper has no timeout for a client that stops reading; the kernel has (tcp(7)).
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(idle))?;
    Ok(())
}

// === impl ClientStream ===

impl ClientStream {
    /// Who connects, if that is not a program of our own user on this machine.
    pub(super) fn peer(&self) -> Option<Peer> {
        let tcp = |stream: &TcpStream| Peer::at(stream.peer_addr().ok()?.ip());
        match &self.kind {
            Kind::Tcp(stream) => tcp(stream),
            Kind::Tls(stream) => tcp(stream.get_ref().0),
            Kind::Unix(stream) => Peer::user(stream.peer_cred().ok()?.uid()),
            Kind::Memory(_) => None,
        }
    }

    /// What came of writing; an error if the peer has taken nothing for too long. hyper has no timeout for
    /// that, and the kernel has one for TCP only.
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
        // If it fails, the connection has ended anyhow.
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

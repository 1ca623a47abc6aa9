//! Accepts connections and serves them; given its sockets, its service and the word to stop.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tower::{Service, ServiceExt};

use crate::error::BoxError;

/// How many connections wait in the kernel's queue.
const BACKLOG: u32 = 1024;
/// How long to wait before accepting again when that failed, mostly for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener's connections may take.
#[derive(Clone)]
pub struct Limits {
    /// One permit a connection, shared by all threads.
    pub connections: Arc<Semaphore>,
    /// To receive a request head, and so how long a connection may be idle.
    pub header_timeout: Duration,
    /// For what is in flight when told to stop.
    pub drain: Duration,
}

/// Opens a listening socket. It is not shared (`SO_REUSEPORT`): a second proxy on the same port
/// must fail, not take half of the requests.
///
/// # Errors
///
/// The address is taken, or is not this machine's.
pub fn bind(address: SocketAddr) -> io::Result<StdListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    // A restart need not wait for connections of the last run to be forgotten.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG.cast_signed())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Serves all listeners until told to stop, then lets what is in flight end within the limit.
/// Returns how many connections had to be cut.
///
/// # Errors
///
/// A listener could not be registered with the runtime.
pub async fn run<S>(
    listeners: Vec<StdListener>,
    service: S,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) -> io::Result<usize>
where
    S: Service<Request, Response = Response> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
{
    let graceful = GracefulShutdown::new();
    let mut accepting = JoinSet::new();
    let (sender, mut accepted) = tokio::sync::mpsc::channel(1);
    for listener in listeners {
        let listener = TcpListener::from_std(listener)?;
        accepting.spawn(accept(
            listener,
            Arc::clone(&limits.connections),
            sender.clone(),
        ));
    }
    drop(sender);

    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout);
    let stopped = stop.wait_for(|stop| *stop);
    tokio::pin!(stopped);
    loop {
        let (stream, permit) = tokio::select! {
            _ = &mut stopped => break,
            Some(connection) = accepted.recv() => connection,
        };
        let service = service
            .clone()
            .map_request(|request: hyper::Request<_>| request.map(Body::new));
        let connection =
            http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %error, "connection ended early");
            }
            drop(permit);
        });
    }
    accepting.shutdown().await;
    let open = graceful.count();
    let drained = tokio::time::timeout(limits.drain, graceful.shutdown()).await;
    Ok(if drained.is_ok() { 0 } else { open })
}

/// Accepts for as long as somebody takes what was accepted. Over the limit connections wait in the
/// kernel's queue.
async fn accept(
    listener: TcpListener,
    permits: Arc<Semaphore>,
    accepted: tokio::sync::mpsc::Sender<(TcpStream, OwnedSemaphorePermit)>,
) {
    while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
        let stream = loop {
            match listener.accept().await {
                Ok((stream, _)) => break stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        // Without it a small answer may wait for the client's acknowledgement.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        if accepted.send((stream, permit)).await.is_err() {
            return;
        }
    }
}

//! Accepts connections and serves them; given its sockets, its service and the word to stop.

mod listener;
mod socket_file;
mod tls;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::Request;
use bytes::Bytes;
use futures_util::FutureExt;
use http::Method;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower::Service;

use self::listener::{Accepted, Acceptor, Stream};
pub use self::listener::{Listener, bind};
pub use self::socket_file::{SocketFile, SocketFileError};
pub use self::tls::{Certificate, CertificateError, CertificateFiles};
use crate::effect::Effect;
use crate::error::{BoxError, Error, Failure};

/// How long to wait before accepting again when that failed, mostly for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a listener's connections may take.
#[derive(Clone)]
pub struct Limits {
    /// One permit a connection, shared by all threads.
    pub connections: Arc<Semaphore>,
    /// To receive a request head, and so how long a connection may be idle.
    pub header_timeout: Duration,
    /// How long a peer may leave what was written to it unread.
    pub idle: Duration,
    /// For what is in flight when told to stop.
    pub drain: Duration,
}

/// Serves all listeners until told to stop, then lets what is in flight end within the limit.
/// Returns how many connections had to be cut.
///
/// The service has to be ready always: it is not asked, since what limits requests answers them.
///
/// # Errors
///
/// A listener could not be registered with the runtime.
pub async fn run<S, B>(
    listeners: Vec<Listener>,
    service: S,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) -> io::Result<usize>
where
    S: Service<Request, Response = http::Response<B>> + Send + 'static,
    S::Error: Into<BoxError> + Send,
    S::Future: Send,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let mut accepting = JoinSet::new();
    let (sender, mut accepted) = mpsc::channel(1);
    for listener in listeners {
        accepting.spawn(accept(listener.register()?, limits.clone(), sender.clone()));
    }
    drop(sender);

    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout);
    // One for all connections of this thread: a clone for each request would cost more than the guard.
    let service = Arc::new(Mutex::new(service));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let stopped = stop.wait_for(|stop| *stop);
    tokio::pin!(stopped);
    loop {
        let (stream, permit) = tokio::select! {
            _ = &mut stopped => break,
            Some(connection) = accepted.recv() => connection,
            Some(_) = connections.join_next() => continue,
        };
        let service = Arc::clone(&service);
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let last = ends_connection(&request);
            let paid = Effect::of(&request) == Effect::Create;
            let mut answer = Box::pin(call(&service, request.map(boxed)));
            // hyper drops it unpolled if the client has sent all of its request and gone; what
            // outlives its client has to be begun by then.
            let answered = paid.then(|| (&mut answer).now_or_never()).flatten();
            let answered = answered.map(Box::new); // rare: not each connection has room for it
            async move {
                let mut answer = match answered {
                    Some(answered) => (*answered)?,
                    None => answer.await?,
                };
                if last || is_malformed(&answer) {
                    answer
                        .headers_mut()
                        .insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, S::Error>(answer)
            }
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended early");
            }
            drop(permit);
        });
    }
    accepting.shutdown().await;
    // Whether in time or not: what is left then is what is cut.
    let _ = tokio::time::timeout(limits.drain, graceful.shutdown()).await;
    while connections.try_join_next().is_some() {}
    Ok(connections.len())
}

/// Calls a service that is ready always.
fn call<S: Service<Request>>(service: &Mutex<S>, request: Request) -> S::Future {
    let mut service = service.lock().unwrap_or_else(PoisonError::into_inner);
    service.call(request)
}

/// A body that is there, or none.
fn boxed(body: Incoming) -> axum::body::Body {
    if body.is_end_stream() {
        axum::body::Body::empty()
    } else {
        axum::body::Body::new(body)
    }
}

/// Whether what follows a request may be meant for another protocol: it asked for a tunnel or an
/// upgrade, and neither is granted.
fn ends_connection<B>(request: &hyper::Request<B>) -> bool {
    request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE)
}

/// Whether the guard found the request malformed, so that nobody can say where the next one begins.
fn is_malformed<B>(answer: &http::Response<B>) -> bool {
    let failure = answer.extensions().get::<Failure>();
    failure.is_some_and(|failure| failure.code == Error::MALFORMED)
}

/// Accepts for as long as somebody takes what was accepted. Over the limit one connection waits
/// here, and the others in the kernel's queue.
async fn accept(
    listener: Acceptor,
    limits: Limits,
    sender: mpsc::Sender<(Stream, OwnedSemaphorePermit)>,
) {
    // Beside the loop: a silent client holds up nobody, and is dropped with the loop at the end.
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept(limits.idle) => accepted,
            Some(_) = handshakes.join_next() => continue,
        };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&limits.connections).acquire_owned().await else {
            return;
        };
        match accepted {
            Accepted::Ready(stream) => {
                if sender.send((stream, permit)).await.is_err() {
                    return;
                }
            }
            Accepted::Shaking(handshake) => {
                let (sender, limit) = (sender.clone(), limits.header_timeout);
                handshakes.spawn(async move {
                    match timeout(limit, handshake.finish()).await {
                        Ok(Ok(stream)) => {
                            // Nobody takes it any more when we end.
                            let _ = sender.send((Stream::Tls(Box::new(stream)), permit)).await;
                        }
                        Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
                        Err(_) => tracing::debug!("no TLS connection: the client was too slow"),
                    }
                });
            }
        }
    }
}

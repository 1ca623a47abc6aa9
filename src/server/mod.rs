//! Accepts connections and serves them. The caller provides the sockets, the service and the stop signal.

mod balance;
mod connections;
mod evictor;
mod head;
mod listener;
mod reset;
mod socket_file;
mod tls;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::Request;
use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Method, Version};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep, timeout};
use tower::Service;

pub use self::balance::Worker;
use self::balance::{Accepted, Workers};
use self::connections::Connections;
pub use self::evictor::Evictor;
use self::head::Head;
pub use self::head::Heads;
use self::listener::{Acceptor, ClientStream};
pub use self::listener::{Listener, bind};
use self::reset::Reset;
pub use self::socket_file::SocketFile;
pub use self::tls::{Certificate, CertificateFiles};
use crate::error::BoxError;

/// Largest read buffer of a connection, and largest write buffer, in bytes. Each client that does not read
/// its response occupies one. With 256 KiB, uploads of 13 MB over 4 connections were 8 % faster.
const LARGEST_BUFFER: usize = head::LARGEST;
/// Pause after a failed accept. The usual reason is a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Limits for the connections of a listener.
#[derive(Clone)]
pub struct ConnectionLimits {
    /// One permit per connection, shared by all threads. Above the limit, new connections wait.
    pub connections: Arc<Semaphore>,
    /// Memory of incomplete request heads, shared by all threads.
    pub heads: Arc<Heads>,
    /// Closes old connections, so that new ones need not wait.
    pub evictor: Option<Arc<Evictor>>,
    /// Longest time to receive a request head, and so the longest idle time of a connection.
    pub header_timeout: Duration,
    /// Longest time that a client may leave written data unread.
    pub idle: Duration,
}

/// Signal to stop. It is never taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// No stop: go on serving.
    Never,
    /// Accept nothing new, and let requests in flight end.
    Drain,
    /// Cut the requests in flight.
    Now,
}

/// Accepts from all listeners until [`Stop::Drain`], and serves the connections that this worker gets. Then
/// lets requests in flight end until [`Stop::Now`]. Returns the number of connections that had to be cut.
///
/// The service must always be ready. Its `poll_ready` is not called, because the layer that limits requests
/// answers those above its limit itself.
///
/// # Errors
///
/// A listener could not be registered with the runtime.
pub async fn run<S, B>(
    listeners: Vec<Listener>,
    worker: Worker,
    service: S,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<Stop>,
) -> io::Result<usize>
where
    S: Service<Request, Response = http::Response<B>> + Send + 'static,
    S::Error: Into<BoxError> + Send,
    S::Future: Send,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let Worker {
        workers,
        mut accepted,
    } = worker;
    let mut accepting = JoinSet::new();
    for listener in listeners {
        let (listener, limits) = (listener.register()?, limits.clone());
        accepting.spawn(accept(listener, limits, Arc::clone(&workers)));
    }

    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_header_size(head::LARGEST)
        .max_buf_size(LARGEST_BUFFER);
    // One service for all connections of this thread: a clone for each request would cost more than the
    // lock.
    let service = Arc::new(Mutex::new(service));
    let graceful = GracefulShutdown::new();
    let mut connections = Connections::new(Arc::clone(&limits.heads));
    let told = stop.clone();
    let serve = |arrival: Accepted, head: Head| {
        let service = Arc::clone(&service);
        let (http, watcher) = (http.clone(), graceful.watcher());
        let (header_timeout, idle, told) = (limits.header_timeout, limits.idle, told.clone());
        let reset = Reset::default();
        async move {
            let Accepted {
                socket,
                counted,
                permit,
            } = arrival;
            let _counted = (counted, permit);
            let opening = socket.open(idle, reset.clone(), head.clone());
            let Some(stream) = open(opening, header_timeout, told).await else {
                return;
            };
            let peer = stream.peer();
            let service = service_fn(move |mut request: hyper::Request<Incoming>| {
                if let Some(peer) = peer {
                    request.extensions_mut().insert(peer);
                }
                answer(&service, request, &reset, &head)
            });
            let connection = http.serve_connection(TokioIo::new(stream), service);
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%error, "connection ended early");
            }
        }
    };
    loop {
        tokio::select! {
            biased;
            // A dropped sender is a signal to stop too.
            _ = stop.wait_for(|stop| *stop > Stop::Never) => break,
            Some(arrival) = accepted.recv() => {
                let connection = connections.begin(|head| serve(arrival, head));
                if let Some(evictor) = &limits.evictor {
                    evictor.begun(connection);
                }
            }
            Some(()) = connections.ended() => {
                if let Some(evictor) = &limits.evictor {
                    evictor.restock();
                }
            }
        }
    }
    accepting.shutdown().await;
    accepted.close();
    while let Some(arrival) = accepted.recv().await {
        connections.begin(|head| serve(arrival, head));
    }
    connections.close_unfinished();
    tokio::select! {
        () = graceful.shutdown() => {}
        _ = stop.wait_for(|stop| *stop == Stop::Now) => {}
    }
    Ok(connections.count())
}

/// Calls the service for a request. Closes the connection after the response if it must not be used again.
fn answer<S, B>(
    service: &Mutex<S>,
    request: hyper::Request<Incoming>,
    reset: &Reset,
    head: &Head,
) -> impl Future<Output = Result<S::Response, S::Error>> + use<S, B>
where
    S: Service<Request, Response = http::Response<B>>,
    B: Body,
{
    let last = ends_connection(&request);
    let old = request.version() < Version::HTTP_11;
    let reset = old.then(|| reset.clone());
    let (request, behind) = boxed(request, head);
    let last = last || head.is_too_large();
    // hyper drops the future unpolled if the client has sent the whole request and disconnected. So this
    // call already begins the work that outlives its client. Boxed, so that idle connections hold no memory
    // for it.
    let answer = Box::pin(call(service, request));
    async move {
        let mut answer = answer.await?;
        if last || behind.is_some_and(|head| head.is_too_large()) {
            let headers = answer.headers_mut();
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(reset) = reset {
            reset.begin(answer.body());
        }
        Ok(answer)
    }
}

/// Calls a service that is always ready.
fn call<S: Service<Request>>(service: &Mutex<S>, request: Request) -> S::Future {
    let mut service = service.lock().unwrap_or_else(PoisonError::into_inner);
    service.call(request)
}

/// Boxes the body of a request, after its complete head. Also returns the head that follows the body, if
/// there is a body.
fn boxed(request: hyper::Request<Incoming>, head: &Head) -> (Request, Option<Head>) {
    if request.body().is_end_stream() {
        head.end(&request);
        return (request.map(|_| axum::body::Body::empty()), None);
    }
    let (parts, body) = request.into_parts();
    let request = Request::from_parts(parts, ());
    let behind = head.clone().followed_by(&request, body);
    let request = request.map(|()| axum::body::Body::new(behind));
    (request, Some(head.clone()))
}

/// Returns true if the bytes after a request may be meant for another protocol: the request asks for a
/// tunnel or an upgrade, and the proxy grants neither.
fn ends_connection<B>(request: &hyper::Request<B>) -> bool {
    request.method() == Method::CONNECT || request.headers().contains_key(UPGRADE)
}

/// Accepts connections until the workers take no more. Above the limit, one connection waits here, and the
/// others wait in the kernel's queue.
async fn accept(listener: Acceptor, limits: ConnectionLimits, workers: Arc<Workers>) -> Option<()> {
    let ConnectionLimits {
        connections,
        evictor,
        ..
    } = limits;
    loop {
        match listener.accept().await {
            Ok(socket) => {
                let permit = Arc::clone(&connections).acquire_owned().await.ok()?;
                workers.assign(socket, permit).await?;
                if evictor.is_some() {
                    // Lets the connection respond to a request that it has received, before later
                    // connections close it.
                    yield_now().await;
                }
            }
            // The connection ended while it waited.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(_) if evictor.as_ref().is_some_and(|evictor| evictor.make_room()) => {
                // An aborted connection closes when its task runs next.
                yield_now().await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Prepares a connection for requests, within `limit`. A silent client delays neither other clients nor a
/// stop.
async fn open(
    opening: impl Future<Output = io::Result<ClientStream>>,
    limit: Duration,
    mut stop: watch::Receiver<Stop>,
) -> Option<ClientStream> {
    let opened = tokio::select! {
        biased; // without TLS, `opening` is ready at once
        opened = timeout(limit, opening) => opened,
        _ = stop.wait_for(|stop| *stop > Stop::Never) => return None,
    };
    match opened {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
        Err(_) => tracing::debug!("no TLS connection: the client was too slow"),
    }
    None
}

//! TCP connections to a name that may have several addresses.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Time that an address has before the next one is tried beside it: the "Connection Attempt Delay" that RFC
/// 8305, section 8, recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Silence after which TCP begins to probe the peer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Connects to a name or an address. On Linux, `idle` limits the time that the peer may leave sent data
/// unacknowledged.
///
/// # Errors
///
/// The name has no address, or none of its addresses can be connected to: then this is the error of the last
/// one. There is no timeout here.
pub(super) async fn connect((name, port): (&str, u16), idle: Duration) -> io::Result<TcpStream> {
    let addresses = lookup_host((name, port)).await?;
    let stream = connect_to_first(addresses).await?;
    let socket = SockRef::from(&stream);
    socket.set_tcp_nodelay(true)?;
    let keep_alive = TcpKeepalive::new().with_time(KEEP_ALIVE);
    socket.set_tcp_keepalive(&keep_alive)?;
    // Nothing else notices an upstream that has responded and then stops reading.
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(idle))?;
    Ok(stream)
}

/// Connects to the address that responds first. A silent address delays the next one, but does not use up its
/// time (RFC 8305, section 5).
async fn connect_to_first(
    mut addresses: impl Iterator<Item = SocketAddr>,
) -> io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        let more = addresses.next().map(|address| {
            attempts.spawn(TcpStream::connect(address));
        });
        let finished = match more {
            Some(()) => timeout(ATTEMPT_DELAY, attempts.join_next()).await,
            None => Ok(attempts.join_next().await),
        };
        match finished {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            Ok(Some(Ok(Err(error)))) => failure = error,
            Ok(Some(Err(error))) => failure = io::Error::other(error),
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Returns an address at which no program listens.
    async fn closed() -> SocketAddr {
        listener().await.1
    }

    #[tokio::test]
    async fn address_that_refuses_is_followed_by_the_next() {
        let (_listener, open) = listener().await;
        let addresses = [closed().await, closed().await, open];
        let stream = connect_to_first(addresses.into_iter()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open);
    }

    #[tokio::test]
    async fn last_failure_is_told_when_no_address_can_be_connected_to() {
        let addresses = [closed().await, closed().await];
        let error = connect_to_first(addresses.into_iter()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let error = connect_to_first([].into_iter()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}

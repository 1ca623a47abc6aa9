//! A name of upstream's may have several addresses, of which some do not answer.

use std::net::{Ipv6Addr, SocketAddr};

use socket2::{Domain, Socket, Type};
use tokio::time::{Duration, Instant};

use crate::support::{Proxy, Upstream, get, in_namespace, post};

/// Listens, and takes no connection: its queue is full, so that the kernel drops what comes.
struct Silent {
    _listener: Socket,
    _waiting: Vec<Socket>,
}

impl Silent {
    fn at(address: SocketAddr) -> Self {
        let socket = || Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        let listener = socket();
        listener.bind(&address.into()).unwrap();
        listener.listen(0).unwrap();
        let connect = || {
            let socket = socket();
            socket.set_nonblocking(true).unwrap();
            // It is in progress, or waits in the queue.
            let _ = socket.connect(&address.into());
            socket
        };
        Self {
            _listener: listener,
            _waiting: (0..8).map(|_| connect()).collect(),
        }
    }
}

/// It would be asked first (RFC 6724, section 6), and for each request.
#[test]
fn address_that_does_not_answer_delays_a_connection_by_a_moment_only() {
    let test = "addresses::address_that_does_not_answer_delays_a_connection_by_a_moment_only";
    if in_namespace(test, "::1 localhost\n127.0.0.1 localhost\n") {
        return;
    }
    let upstream = Upstream::tls("http/1.1");
    let port = upstream.url.rsplit(':').next().unwrap().parse().unwrap();
    let _silent = Silent::at((Ipv6Addr::LOCALHOST, port).into());
    // No request is sent again, and none has time for more than two addresses.
    let proxy = Proxy::to(&upstream)
        .setting("retry.attempts", "1")
        .setting("upstream.connect_timeout", "20s")
        .start();
    for request in [get("/v1/x"), post("/v1/x", "{}")] {
        let begun = Instant::now();
        assert_eq!(proxy.send(request).status(), 200);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(upstream.seen().requests.len(), 2);
}

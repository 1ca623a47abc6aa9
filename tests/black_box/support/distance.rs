//! A long distance between the two ends of a connection: all bytes arrive later.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

use tokio::time::Instant;

/// Delays all bytes to an address and back by `way`. Returns the address to connect to.
pub fn delay(address: SocketAddr, way: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = listener.local_addr().unwrap();
    thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            thread::spawn(move || {
                // The kernel has accepted at once. A distant kernel would have needed a round trip.
                thread::sleep(2 * way);
                let Ok(far) = TcpStream::connect(address) else {
                    return;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    to.set_nodelay(true).unwrap();
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || carry(from, to, way));
                }
            });
        }
    });
    front
}

/// Passes bytes on, each after a delay of `way`, and then the end of the stream.
fn carry(mut from: TcpStream, mut to: TcpStream, way: Duration) {
    let (sender, under_way) = mpsc::channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        for (arrival, bytes) in under_way {
            thread::sleep(arrival.duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = [0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let arrival = Instant::now() + way;
        if sender.send((arrival, buffer[..count].to_vec())).is_err() {
            return;
        }
    }
}

//! An upstream with one fixed response, on threads of its own.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Starts an upstream that responds to each request that ends with `end`.
pub(crate) fn start(end: &'static [u8], answer: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = answer.clone();
            // The thread ends when the proxy disconnects.
            thread::spawn(move || serve(&stream?, end, &answer));
        }
    });
    address
}

fn serve(mut stream: &TcpStream, end: &[u8], answer: &[u8]) -> io::Result<()> {
    let mut request = [0; 4096];
    let mut length = 0;
    loop {
        match stream.read(&mut request[length..])? {
            0 => return Ok(()),
            more => length += more,
        }
        if request[..length].ends_with(end) {
            stream.write_all(answer)?;
            length = 0;
        }
    }
}

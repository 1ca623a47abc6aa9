//! A client that sends exactly the bytes it is given.

use std::{
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tokio::time::Instant;

use super::{Message, PATIENCE, http::read_chunk};

/// Time between two bytes of a slow client.
const MOMENT: Duration = Duration::from_millis(20);

/// Connection to a listener. Reading panics if nothing arrives for too long.
pub struct Connection(BufReader<Stream>);

enum Stream {
    Tcp(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
    Unix(UnixStream),
}

// === impl Connection ===

impl Connection {
    pub fn to(address: SocketAddr) -> Self {
        Self::try_to(address).expect("a listener")
    }

    /// Connects, or returns the error if nobody listens.
    pub fn try_to(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Ok(Self(BufReader::new(Stream::Tcp(stream))))
    }

    /// Connects to `localhost` over TLS, or returns the error of the handshake.
    pub fn tls(address: SocketAddr, client: ClientConfig) -> io::Result<Self> {
        let mut stream = TcpStream::connect(address).expect("a listener");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        let name = "localhost".try_into().unwrap();
        let mut session = ClientConnection::new(Arc::new(client), name).unwrap();
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        let stream = StreamOwned::new(session, stream);
        Ok(Self(BufReader::new(Stream::Tls(Box::new(stream)))))
    }

    /// Returns the TLS session, with the outcome of the handshake.
    pub fn session(&self) -> &ClientConnection {
        match self.0.get_ref() {
            Stream::Tls(stream) => &stream.conn,
            _ => panic!("for TLS only"),
        }
    }

    pub fn unix(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("a listener");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(Stream::Unix(stream)))
    }

    /// Sends bytes. Ignores the error of a closed connection, because the response shows that.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        let _ = self.0.get_mut().write_all(bytes.as_ref());
        self
    }

    /// Sends one byte per moment until the peer closes. Panics if it never does.
    pub fn dribble(&mut self, byte: u8) {
        let deadline = Instant::now() + PATIENCE;
        self.0
            .get_mut()
            .tcp()
            .set_read_timeout(Some(MOMENT))
            .unwrap();
        loop {
            assert!(Instant::now() < deadline, "not closed");
            match self.send([byte]).0.read(&mut [0; 1024]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// Closes the sending side, unless the peer has closed the connection.
    pub fn half_close(&mut self) {
        let _ = self.0.get_mut().tcp().shutdown(Shutdown::Write);
    }

    /// Reads a whole response, or returns the error that ended it.
    pub fn try_answer(&mut self) -> io::Result<Message> {
        let head = Message::read_head(&mut self.0)?;
        let mut answer = head.ok_or(io::ErrorKind::UnexpectedEof)?;
        answer.read_body(&mut self.0)?;
        Ok(answer)
    }

    pub fn answer(&mut self) -> Message {
        self.try_answer().expect("a whole answer")
    }

    /// Reads only the head of a response. A response to HEAD has nothing else.
    pub fn head(&mut self) -> Message {
        Message::read_head(&mut self.0)
            .expect("a head")
            .expect("an answer")
    }

    /// Reads the body of a response whose head was read.
    pub fn finish(&mut self, answer: &mut Message) {
        answer.read_body(&mut self.0).expect("a whole body");
    }

    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        read_chunk(&mut self.0).expect("a chunk")
    }

    /// Returns true if a response begins or the connection ends within `patience`.
    pub fn is_answered_within(&mut self, patience: Duration) -> bool {
        self.0
            .get_ref()
            .tcp()
            .set_read_timeout(Some(patience))
            .unwrap();
        let answered = self.0.fill_buf().is_ok();
        self.0
            .get_ref()
            .tcp()
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        answered
    }

    /// Reads until the peer closes. Returns an error if the connection does not end cleanly.
    pub fn end(&mut self) -> Result<(), io::ErrorKind> {
        let read = io::copy(&mut self.0, &mut io::sink());
        read.map(drop).map_err(|error| error.kind())
    }

    /// Returns all bytes until the peer closes.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        if let Err(error) = self.0.read_to_end(&mut rest) {
            assert_eq!(
                error.kind(),
                io::ErrorKind::ConnectionReset,
                "not closed: {error}"
            );
        }
        rest
    }
}

// === impl Stream ===

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Tcp(stream) => stream,
            _ => panic!("for TCP only"),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Tls(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
            Self::Unix(stream) => stream.flush(),
        }
    }
}

/// Sends the bytes and returns all bytes until the peer closes.
pub fn raw(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Vec<u8> {
    Connection::to(address).send(bytes).rest()
}

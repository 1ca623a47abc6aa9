//! Simulated clients of a run.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use crate::books::{Entry, Name, Told, request_id};
use crate::plan::{Kind, Wish};
use crate::world::World;

/// Client that wants one thing, and asks for it as often as the plan allows.
pub(crate) struct Client {
    world: World,
    index: usize,
    connect: mpsc::Sender<DuplexStream>,
}

/// Most unread bytes that the client's side of a connection holds.
const BUFFER: usize = 64 << 10;

// === impl Client ===

impl Client {
    pub(crate) fn new(world: World, index: usize, connect: mpsc::Sender<DuplexStream>) -> Self {
        Self {
            world,
            index,
            connect,
        }
    }

    pub(crate) async fn run(self) {
        let wish = self.world.plan.wishes[self.index].clone();
        self.world.until(wish.at).await;
        for (try_, patience) in wish.tries.iter().enumerate() {
            if self.ask((self.index, try_), &wish, *patience).await {
                return;
            }
        }
    }

    /// Sends one request. Returns true if no further try is needed.
    async fn ask(&self, name: Name, wish: &Wish, patience: u64) -> bool {
        let begun = self.world.now();
        let entry = Entry {
            kind: wish.kind,
            begun,
            left: None,
            told: None,
            arrivals: Vec::new(),
        };
        self.world.note(|books| books.requests.insert(name, entry));
        let asking = timeout(Duration::from_millis(patience), self.exchange(name, wish));
        let told = asking.await;
        let now = self.world.now();
        self.world.note(|books| {
            let entry = books.requests.get_mut(&name).unwrap();
            match told {
                Ok(told) => entry.told = Some((now, told)),
                Err(_) => entry.left = Some(now),
            }
        });
        match told {
            // The client left, and asks again at once.
            Err(_) => false,
            // A request that may be sent again is sent again a moment later.
            Ok(Told::Status(429 | 503)) => {
                sleep(Duration::from_millis(10)).await;
                false
            }
            Ok(_) => true,
        }
    }

    async fn exchange(&self, name: Name, wish: &Wish) -> Told {
        let (mut stream, proxy) = duplex(BUFFER);
        if self.connect.send(proxy).await.is_err() {
            return Told::NotAccepted;
        }
        // If the proxy stops reading, the response shows that.
        let _ = send(&mut stream, name, wish).await;
        match answer(&mut stream).await {
            Ok(status) => Told::Status(status),
            Err(_) => Told::CutOff,
        }
    }
}

async fn send(stream: &mut DuplexStream, name: Name, wish: &Wish) -> io::Result<()> {
    let method = match wish.kind {
        Kind::Read => "GET",
        Kind::Create => "POST",
    };
    let body = match wish.size {
        0 => String::new(),
        size => format!(
            r#"{{"x":"{}","external_task_id":"{}"}}"#,
            "x".repeat(size),
            name.0
        ),
    };
    let length = match wish.kind {
        Kind::Read => String::new(),
        Kind::Create => format!("content-length: {}\r\n", body.len()),
    };
    let path = match wish.kind {
        Kind::Read => "/v1/videos",
        Kind::Create => "/text-to-video",
    };
    let head = format!(
        "{method} {path}/{} HTTP/1.1\r\nhost: localhost\r\nx-request-id: {}\r\nx-try: {}\r\n{length}\r\n",
        name.0,
        request_id(name),
        name.1,
    );
    stream.write_all(head.as_bytes()).await?;
    let (first, last) = body.split_at(body.len() / 2);
    stream.write_all(first.as_bytes()).await?;
    if wish.pause > 0 {
        sleep(Duration::from_millis(wish.pause)).await;
    }
    stream.write_all(last.as_bytes()).await
}

/// Reads a whole response, and returns its status.
async fn answer(stream: &mut DuplexStream) -> io::Result<u16> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head.split("content-length: ").nth(1);
    if let Some(length) = length.and_then(|rest| rest.split('\r').next()) {
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await?;
        return Ok(status);
    }
    // The body is in chunks. The last chunk is empty.
    let mut body = Vec::new();
    while !body.ends_with(b"\r\n0\r\n\r\n") && body != b"0\r\n\r\n" {
        body.push(stream.read_u8().await?);
    }
    Ok(status)
}

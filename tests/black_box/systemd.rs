//! What a service manager hands over, and what it is told.

use std::{
    fs::File,
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        unix::net::{SocketAddr, UnixDatagram, UnixListener},
    },
};

use tempfile::TempDir;

use crate::support::{
    Connection, PATIENCE, Proxy, SUCCESS, Signal, Upstream, assert_has, eventually, get,
};

/// A service manager that waits for messages.
struct Manager {
    socket: UnixDatagram,
}

// === impl Manager ===

impl Manager {
    fn at(address: &SocketAddr) -> Self {
        let socket = UnixDatagram::bind_addr(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket }
    }

    /// The next message.
    fn told(&self) -> String {
        let mut message = [0; 4096];
        let length = self.socket.recv(&mut message).expect("a message");
        String::from_utf8(message[..length].to_vec()).unwrap()
    }
}

fn loopback() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

#[test]
fn inherited_sockets_serve_instead_of_those_of_the_settings() {
    let (upstream, folder) = (Upstream::ok(), TempDir::new().unwrap());
    let [path, unused] = ["inherited", "unused"].map(|name| folder.path().join(name));
    let tcp = loopback();
    let address = tcp.local_addr().unwrap();
    let unix = UnixListener::bind(&path).unwrap();
    let proxy = Proxy::to(&upstream)
        .setting("listen.unix_socket", unused.to_str().unwrap())
        .sockets(vec![("tcp", tcp.into()), ("unix", unix.into())])
        .start();
    assert_eq!(proxy.address, address);
    assert_eq!(proxy.get("/v1/x").text(), SUCCESS);
    let answer = Connection::unix(&path).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS);
    assert!(!unused.exists());
    proxy.signal(Signal::TERM);
    let lines = proxy.stdout.to_end();
    assert_eq!(lines.matches("proxy ").count(), 2, "{lines}");
    assert_eq!(proxy.end().0, Some(0));
    assert!(path.exists(), "it is not ours to remove");
}

#[test]
fn inherited_socket_needs_no_address_in_the_settings() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream).setting("listen.address", "[]");
    let proxy = command.sockets(vec![("", loopback().into())]).start();
    assert_eq!(proxy.get("/v1/x").text(), SUCCESS);
}

#[test]
fn inherited_socket_beyond_loopback_needs_protection() {
    let upstream = Upstream::ok();
    let any = || TcpListener::bind("0.0.0.0:0").unwrap();
    let finished = Proxy::to(&upstream).sockets(vec![("", any().into())]).run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    let ways_out = [
        "0.0.0.0",
        "access.client_tokens_file",
        "listen.unsafe_allow_remote",
    ];
    assert_has(&finished.stderr, &ways_out);

    let command = Proxy::to(&upstream).setting("listen.unsafe_allow_remote", "true");
    let proxy = command.sockets(vec![("", any().into())]).start();
    let address = (std::net::Ipv4Addr::LOCALHOST, proxy.address.port()).into();
    assert_eq!(
        Connection::to(address).send(get("/v1/x")).answer().text(),
        SUCCESS
    );
}

#[test]
fn inherited_socket_by_the_name_of_admin_is_the_admin_listener() {
    let upstream = Upstream::ok();
    let admin = loopback();
    let address = admin.local_addr().unwrap();
    let command = Proxy::to(&upstream);
    let proxy = command.sockets(vec![("admin", admin.into())]).start();
    assert_eq!(proxy.listener("admin"), address);
    assert_eq!(proxy.admin("/health/ready").status(), 200);
    assert_ne!(proxy.address, address, "the settings' own address serves");
    assert_eq!(proxy.get("/metrics").text(), SUCCESS);
}

#[test]
fn inherited_descriptor_that_is_no_listening_stream_socket_is_refused() {
    let upstream = Upstream::ok();
    let listener = loopback();
    let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let unusable: [(&str, OwnedFd); 4] = [
        ("udp", UdpSocket::bind("127.0.0.1:0").unwrap().into()),
        ("datagram", UnixDatagram::unbound().unwrap().into()),
        ("file", File::open("/dev/null").unwrap().into()),
        ("connected", connected.into()),
    ];
    for (name, descriptor) in unusable {
        let sockets = vec![("", loopback().into()), (name, descriptor)];
        let finished = Proxy::to(&upstream).sockets(sockets).run();
        assert_eq!(finished.code, Some(78), "{name}: {finished:?}");
        assert_has(&finished.stderr, &["LISTEN_FDS", "socket 2", name]);
    }
}

#[test]
fn sockets_for_another_process_are_not_taken() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream).env("LISTEN_FDS", "1");
    let proxy = command.env("LISTEN_PID", "1").start();
    assert_eq!(proxy.get("/v1/x").text(), SUCCESS);
}

#[test]
fn service_manager_is_told_of_start_reload_and_end() {
    let (upstream, folder) = (Upstream::ok(), TempDir::new().unwrap());
    let path = folder.path().join("notify");
    let manager = Manager::at(&SocketAddr::from_pathname(&path).unwrap());
    let command = Proxy::to(&upstream).env("NOTIFY_SOCKET", path.to_str().unwrap());
    let proxy = command.start();
    assert_has(&manager.told(), &["READY=1\n", "STATUS="]);
    assert_eq!(proxy.get("/v1/x").status(), 200, "ready means ready");

    let mut last = 0;
    for _ in 0..2 {
        proxy.signal(Signal::HUP);
        let reloading = manager.told();
        assert_has(&reloading, &["RELOADING=1\n"]);
        let time = reloading
            .lines()
            .find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        let time: u64 = time.unwrap().parse().unwrap();
        assert!(time > last, "{time} after {last}");
        last = time;
        assert_has(&manager.told(), &["READY=1\n"]);
    }

    let gate = upstream.hold();
    let mut slow = proxy.connect();
    slow.send(get("/v1/slow"));
    upstream.wait(|seen| seen.requests.len() > 1);
    proxy.signal(Signal::TERM);
    assert_has(&manager.told(), &["STOPPING=1\n"]);
    proxy.signal(Signal::HUP);
    gate.open();
    assert_eq!(slow.answer().text(), SUCCESS);
    assert_eq!(proxy.end().0, Some(0));
    manager.socket.set_nonblocking(true).unwrap();
    assert!(manager.socket.recv(&mut [0]).is_err(), "nothing after that");
}

#[cfg(target_os = "linux")]
#[test]
fn service_manager_may_wait_at_an_abstract_address() {
    use std::os::linux::net::SocketAddrExt as _;
    let upstream = Upstream::ok();
    let name = format!("kling-proxy-test-{}", std::process::id());
    let manager = Manager::at(&SocketAddr::from_abstract_name(&name).unwrap());
    let command = Proxy::to(&upstream).env("NOTIFY_SOCKET", format!("@{name}"));
    let _proxy = command.start();
    assert_has(&manager.told(), &["READY=1\n"]);
}

#[test]
fn proxy_that_does_not_start_is_never_ready() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("notify");
    let manager = Manager::at(&SocketAddr::from_pathname(&path).unwrap());
    let taken = loopback();
    let finished = Proxy::to(&Upstream::ok())
        .env("NOTIFY_SOCKET", path.to_str().unwrap())
        .setting("listen.address", taken.local_addr().unwrap().to_string())
        .run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    manager.socket.set_nonblocking(true).unwrap();
    assert!(manager.socket.recv(&mut [0]).is_err());
}

#[test]
fn service_manager_that_cannot_be_reached_is_warned_of_and_no_more() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream).env("NOTIFY_SOCKET", "/nowhere/notify");
    let proxy = command.start();
    let warning = |line: &str| line.contains("WARN") && line.contains("service manager");
    assert!(proxy.stderr.find(warning).is_some());
    eventually("it serves", || proxy.get("/v1/x").status() == 200);
}

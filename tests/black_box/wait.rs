//! `health` and `wait`: whether a proxy is ready, now or soon.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    os::fd::OwnedFd,
    thread,
};

use crate::support::{
    Command, Proxy, Signal, Upstream, assert_has, closed, eventually, started_with,
};

#[test]
fn proxy_that_is_ready_is_waited_for_no_longer() {
    let (_upstream, proxy) = started_with(&[]);
    let admin = proxy.listener("admin").to_string();
    let asked = |command: &str| {
        Command::new([command])
            .setting("admin.address", &admin)
            .run()
    };
    let [health, wait] = ["health", "wait"].map(asked);
    assert_eq!((health.code, wait.code), (Some(0), Some(0)), "{wait:?}");
    assert_eq!(wait.stdout, health.stdout);
    assert_has(&wait.stdout, &[r#""phase":"ready""#]);
}

#[test]
fn proxy_that_starts_later_is_waited_for() {
    let (socket, address) = closed();
    let wait = Command::new(["wait"]).setting("admin.address", &address);
    let waiting = thread::spawn(|| wait.run());
    socket.listen(16).unwrap();
    let upstream = Upstream::ok();
    let _proxy = Proxy::to(&upstream)
        .sockets(vec![("admin", OwnedFd::from(socket))])
        .start();
    let finished = waiting.join().unwrap();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    assert_has(&finished.stdout, &[r#""phase":"ready""#]);
}

#[test]
fn failed_wait_tells_what_was_wrong_last() {
    let (_socket, address) = closed();
    let (_upstream, proxy) = started_with(&[("shutdown.delay", "1h")]);
    proxy.signal(Signal::TERM);
    eventually("it stops", || proxy.admin("/health/ready").status() == 503);
    let stopping = proxy.listener("admin").to_string();
    for (admin, reason) in [
        (&*address, "Connection refused"),
        (&stopping, "the proxy is shutting down"),
    ] {
        let asked = |command: Command| command.setting("admin.address", admin).run();
        // A number alone is in seconds.
        for limit in ["1s", "1"] {
            let wait = asked(Command::new(["wait", "--timeout", limit]));
            assert_eq!((wait.code, &*wait.stdout), (Some(1), ""), "{wait:?}");
            assert_has(&wait.stderr, &["not within 1s", reason]);
        }
        let health = asked(Command::new(["health"]));
        assert_eq!((health.code, &*health.stdout), (Some(1), ""), "{health:?}");
        assert_has(&health.stderr, &[reason]);
    }
}

#[test]
fn what_is_no_proxy_is_given_up() {
    let (silent, address) = closed();
    silent.listen(16).unwrap();
    let endless = TcpListener::bind("127.0.0.1:0").unwrap();
    let endless_address = endless.local_addr().unwrap().to_string();
    let answering = thread::spawn(move || {
        let (mut client, _) = endless.accept().unwrap();
        let _ = client.read(&mut [0; 4096]).unwrap();
        let _ = client.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
        while client.write_all(&[b'a'; 4096]).is_ok() {}
    });
    for (admin, reason) in [
        (address, "not within 3s"),
        (endless_address, "length limit"),
    ] {
        let health = Command::new(["health"]).setting("admin.address", admin);
        let health = health.run();
        assert_eq!((health.code, &*health.stdout), (Some(1), ""), "{health:?}");
        assert_has(&health.stderr, &["no proxy answers", reason]);
    }
    answering.join().unwrap();
}

#[test]
fn there_is_no_waiting_for_what_never_comes() {
    for (key, value, code, reason) in [
        ("admin.address", "off", 1, "admin.address is off"),
        ("token.lifetime", "5s", 78, "token.lifetime"),
    ] {
        for command in ["health", "wait"] {
            let finished = Command::new([command]).setting(key, value).run();
            assert_eq!(finished.code, Some(code), "{command}: {finished:?}");
            assert_has(&finished.stderr, &[reason]);
        }
    }
}

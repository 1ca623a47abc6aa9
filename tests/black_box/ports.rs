//! A port that is taken: the message names what answers there, and what to do.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
};

use tokio::time::{Duration, Instant};

use crate::support::{Command, Proxy, Upstream, get, in_namespace, started};

/// How a command ended: the code, and what it told.
fn end(command: Command) -> (Option<i32>, String) {
    let finished = command.run();
    let lines = finished.stderr.lines();
    let told = lines.filter_map(|line| line.strip_prefix("kling-proxy: "));
    (finished.code, told.collect::<Vec<_>>().join("\n"))
}

#[test]
fn other_proxy_at_the_port_is_named_with_the_way_out() {
    let (upstream, first) = started();
    let sandbox = Command::new(["sandbox", "--address", "127.0.0.1:0"]).listening("sandbox");
    for (address, key, way_out) in [
        (
            first.address,
            "listen.address",
            "--listen 127.0.0.1:0 --admin off",
        ),
        (
            first.listener("admin"),
            "listen.address",
            "--listen 127.0.0.1:0 --admin off",
        ),
        (
            sandbox.address,
            "listen.address",
            "--listen 127.0.0.1:0 --admin off",
        ),
        (first.listener("admin"), "admin.address", "--admin off"),
        (first.address, "admin.address", "--admin off"),
    ] {
        let command = Proxy::to(&upstream).setting(key, address.to_string());
        let told =
            format!("another kling-proxy answers at {address}: stop it, or choose `{way_out}`");
        assert_eq!(end(command), (Some(1), told), "{key}");
    }
    let address = sandbox.address.to_string();
    let told = format!(
        "another kling-proxy answers at {address}: stop it, or choose `--address 127.0.0.1:0`"
    );
    let command = Command::new(["sandbox", "--address", &address]);
    assert_eq!(end(command), (Some(1), told));
    // Nothing of the question reaches upstream.
    assert_eq!(upstream.seen().connections, 0);
    assert_eq!(first.get("/v1/x").status(), 200);
}

#[test]
fn other_program_at_the_port_is_asked_for_a_second_at_most() {
    let upstream = Upstream::ok();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let begun = Instant::now();
    let told = |address: &str| {
        format!(
            "cannot listen on {address}, because another program uses it: stop it, or choose \
             `--listen 127.0.0.1:0 --admin off`"
        )
    };
    let command = Proxy::to(&upstream).setting("listen.address", &silent);
    assert_eq!(end(command), (Some(1), told(&silent)));
    assert!(begun.elapsed() < Duration::from_secs(5));

    let http = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = http.local_addr().unwrap().to_string();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = http.accept() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
        }
    });
    let command = Proxy::to(&upstream).setting("listen.address", &address);
    assert_eq!(end(command), (Some(1), told(&address)));
}

#[test]
fn settings_and_credentials_are_checked_before_a_port_is_opened() {
    let (upstream, first) = started();
    let taken = first.address.to_string();
    let command = || Command::new([]).setting("listen.address", &taken);
    for (command, told) in [
        (command().upstream(&upstream), "no credential"),
        (
            command().keys().setting("upstream.ca_file", "/nowhere"),
            "/nowhere",
        ),
        (
            command()
                .keys()
                .setting("access.client_tokens_file", "/nowhere"),
            "access.client_tokens_file",
        ),
        (
            command()
                .keys()
                .setting("listen.tls.certificate_file", "/nowhere")
                .setting("listen.tls.key_file", "/nowhere"),
            "/nowhere",
        ),
    ] {
        let (code, text) = end(command);
        assert_eq!(code, Some(78), "{text}");
        assert!(text.contains(told), "{text}");
    }
}

/// The default ports are those of the machine, where other proxies may run.
#[test]
fn second_proxy_takes_a_free_admin_port_unless_one_was_chosen() {
    let test = "ports::second_proxy_takes_a_free_admin_port_unless_one_was_chosen";
    if in_namespace(test, "127.0.0.1 localhost\n") {
        return;
    }
    let upstream = Upstream::ok();
    let command = || Proxy::to(&upstream).setting("admin.address", "");
    let first = command().setting("listen.address", "").start();
    assert_eq!(first.address.to_string(), "127.0.0.1:5546");
    assert_eq!(first.listener("admin").to_string(), "127.0.0.1:5547");

    let second = command().start();
    let own = second.listener("admin");
    let line = second.stderr.find(|line| line.contains("5547")).unwrap();
    let told = format!(
        "admin.address: 127.0.0.1:5547 is taken, so the admin listener of this proxy is at {own}"
    );
    assert!(line.contains("WARN") && line.contains(&told), "{line}");
    assert_eq!(second.send(get("/v1/x")).status(), 200);
    assert!(second.metric("kling_proxy_requests_in_flight") < 1.0);

    // Both are taken: the port that was asked for is named.
    let told = "another kling-proxy answers at 127.0.0.1:5546: stop it, or choose `--listen \
                127.0.0.1:0 --admin off`";
    let both = command().setting("listen.address", "");
    assert_eq!(end(both), (Some(1), told.to_owned()));

    let chosen = command().argument("--admin").argument("127.0.0.1:5547");
    let told = "another kling-proxy answers at 127.0.0.1:5547: stop it, or choose `--admin off`";
    assert_eq!(end(chosen), (Some(1), told.to_owned()));
}

//! HTTPS: who proves to be who, how certificates are renewed, and that handshakes hold up nobody.

use std::{
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
};

use rustls::pki_types::CertificateDer;
use tempfile::TempDir;

use crate::support::{
    Command, Connection, Issued, Proxy, Root, SUCCESS, Signal, Upstream, assert_has, eventually,
    get, post,
};

/// The files of a certificate, and who vouches for it.
struct Files {
    root: Root,
    certificate: PathBuf,
    key: PathBuf,
    _folder: TempDir,
}

// === impl Files ===

impl Files {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let files = Self {
            root: Root::new(),
            certificate: folder.path().join("certificate.pem"),
            key: folder.path().join("key.pem"),
            _folder: folder,
        };
        files.write(&files.root.issue("localhost"));
        files
    }

    fn write(&self, issued: &Issued) {
        fs::write(&self.key, issued.key.serialize_pem()).unwrap();
        fs::set_permissions(&self.key, Permissions::from_mode(0o600)).unwrap();
        fs::write(&self.certificate, issued.certificate.pem()).unwrap();
    }

    fn proxy(&self, upstream: &Upstream) -> Command {
        Proxy::to(upstream)
            .setting(
                "listen.tls.certificate_file",
                self.certificate.to_str().unwrap(),
            )
            .setting("listen.tls.key_file", self.key.to_str().unwrap())
    }

    fn connect(&self, address: SocketAddr) -> Connection {
        Connection::tls(address, self.root.client(&[])).expect("a handshake")
    }

    /// The certificate that is shown now.
    fn shown(&self, address: SocketAddr) -> CertificateDer<'static> {
        let connection = self.connect(address);
        connection.session().peer_certificates().unwrap()[0].clone()
    }
}

#[test]
fn https_is_served_and_announced() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let mut connection = files.connect(proxy.address);
    for _ in 0..2 {
        let answer = connection
            .send(post("/v1/videos/text2video", "{}"))
            .answer();
        assert_eq!(answer.text(), SUCCESS);
    }
    let announced = format!("https://{} -> {}", proxy.address, upstream.url);
    assert!(
        proxy
            .stdout
            .find(|line| line.ends_with(&announced))
            .is_some()
    );
    let ready = proxy.admin("/health/ready");
    assert_eq!(ready.status(), 200, "the admin listener stays plain");
}

#[test]
fn http_1_is_the_only_protocol_on_offer() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let agreed = |protocols: &[&str]| {
        let client = files.root.client(protocols);
        let connection = Connection::tls(proxy.address, client).ok()?;
        Some(connection.session().alpn_protocol().map(<[u8]>::to_vec))
    };
    assert_eq!(agreed(&["h2", "http/1.1"]), Some(Some(b"http/1.1".into())));
    assert_eq!(agreed(&[]), Some(None));
    assert_eq!(agreed(&["h2"]), None, "no handshake");
}

#[test]
fn several_addresses_and_a_unix_socket_serve_together() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let socket = files.key.with_file_name("kling.sock");
    let proxy = files
        .proxy(&upstream)
        .setting("listen.address", r#"["127.0.0.1:0", "[::1]:0"]"#)
        .setting("listen.unix_socket", socket.to_str().unwrap())
        .start();
    let second = proxy.stdout.find(|line| line.contains("https://[::1]"));
    let second = second.expect("a line for the second address");
    let (_, second) = second.split_once("https://").unwrap();
    let second = second.split(' ').next().unwrap().parse().unwrap();
    for address in [proxy.address, second] {
        assert_eq!(
            files.connect(address).send(get("/v1/x")).answer().text(),
            SUCCESS
        );
    }
    let answer = Connection::unix(&socket).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS, "without TLS");
}

#[test]
fn host_is_checked_over_tls_too() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let foreign = "GET /v1/x HTTP/1.1\r\nhost: evil.test\r\n\r\n";
    let answer = files.connect(proxy.address).send(foreign).answer();
    assert_eq!(answer.status(), 421);
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn certificate_without_its_key_is_a_problem_and_the_other_way_round() {
    for (set, missing) in [
        ("listen.tls.certificate_file", "listen.tls.key_file"),
        ("listen.tls.key_file", "listen.tls.certificate_file"),
    ] {
        let finished = Command::new([]).keys().setting(set, "/tmp/x.pem").run();
        assert_eq!(finished.code, Some(78), "{finished:?}");
        assert_has(&finished.stderr, &[&format!("`{missing}`: want a file")]);
    }
}

#[test]
fn certificate_or_key_that_cannot_be_used_is_named_and_nothing_of_the_key_is_shown() {
    let files = Files::new();
    let other = files.root.issue("localhost").key.serialize_pem();
    let certificate = fs::read_to_string(&files.certificate).unwrap();
    let upstream = Upstream::ok();
    let refused = |name: &str, part: &str| {
        let finished = files.proxy(&upstream).run();
        assert_eq!(finished.code, Some(78), "{name} {part}: {finished:?}");
        assert_has(&finished.stderr, &[name, part]);
        assert!(!finished.stderr.contains("canary"), "{finished:?}");
    };
    for (key, part) in [
        (other.as_str(), "not the key of the certificate"),
        (&certificate, "no unencrypted private key"),
        ("-----BEGIN canary", "no unencrypted private key"),
        ("", "no unencrypted private key"),
    ] {
        fs::write(&files.key, key).unwrap();
        refused("`listen.tls.key_file`", part);
    }
    fs::set_permissions(&files.key, Permissions::from_mode(0o622)).unwrap();
    refused("`listen.tls.key_file`", "others can write it");
    fs::remove_file(&files.key).unwrap();
    refused("`listen.tls.key_file`", files.key.to_str().unwrap());

    files.write(&files.root.issue("localhost"));
    fs::write(&files.certificate, "").unwrap();
    refused("`listen.tls.certificate_file`", "no certificate");
    fs::remove_file(&files.certificate).unwrap();
    refused(
        "`listen.tls.certificate_file`",
        files.certificate.to_str().unwrap(),
    );
}

#[test]
fn renewed_certificate_is_shown_without_a_restart() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let renewed = files.root.issue("localhost");
    files.write(&renewed);
    eventually("the new certificate is shown", || {
        files.shown(proxy.address) == *renewed.certificate.der()
    });
}

#[test]
fn broken_new_certificate_keeps_the_old_one_with_a_warning() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let before = files.shown(proxy.address);
    fs::write(&files.certificate, "-----BEGIN").unwrap();
    proxy.signal(Signal::HUP);
    let warning =
        |line: &str| line.contains("WARN") && line.contains("listen.tls.certificate_file");
    assert!(proxy.stderr.find(warning).is_some());
    assert_eq!(files.shown(proxy.address), before);

    let renewed = files.root.issue("localhost");
    files.write(&renewed);
    proxy.signal(Signal::HUP);
    let told = |line: &str| line.contains("certificate changed");
    assert!(proxy.stderr.find(told).is_some());
    assert_eq!(files.shown(proxy.address), *renewed.certificate.der());
}

#[test]
fn plain_http_on_a_port_of_https_is_told_so_and_closed() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let mut connection = proxy.connect();
    let answer = connection
        .send(post("/v1/videos/text2video", "{}"))
        .answer();
    assert_eq!(answer.status(), 400);
    assert_has(answer.text(), &["HTTPS"]);
    connection.half_close();
    assert_eq!(connection.rest(), b"");
    assert_eq!(upstream.first_lines(), [""; 0]);
}

#[test]
fn client_that_never_shakes_hands_holds_up_nobody() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let _silent: Vec<_> = (0..50).map(|_| proxy.connect()).collect();
    let answer = files.connect(proxy.address).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS);
}

#[test]
fn client_that_never_shakes_hands_is_closed_in_time() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let command = files.proxy(&upstream);
    let proxy = command.setting("limits.header_timeout", "300ms").start();
    assert_eq!(proxy.connect().rest(), b"", "silent");
    // A record of a handshake, whose 512 bytes take their time to come.
    proxy.connect().send([0x16, 3, 1, 2, 0]).dribble(0);
    for noise in [&b"\x00\x01\x02"[..], b"\x16\x03\x01\xff\xff", b"hello"] {
        let answer = proxy.connect().send(noise).rest();
        assert!(!answer.starts_with(b"HTTP"), "{}", answer.escape_ascii());
    }
}

#[test]
fn drain_over_tls_finishes_what_is_in_flight_and_waits_for_no_handshake() {
    let (upstream, files) = (Upstream::ok(), Files::new());
    let proxy = files.proxy(&upstream).start();
    let gate = upstream.hold();
    let mut idle = files.connect(proxy.address);
    let mut silent = proxy.connect();
    let mut slow = files.connect(proxy.address);
    slow.send(post("/v1/slow", "{}"));
    upstream.wait(|seen| !seen.requests.is_empty());
    proxy.signal(Signal::TERM);
    assert_eq!(silent.rest(), b"");
    assert_eq!(idle.rest(), b"", "closed as TLS has it");
    gate.open();
    assert_eq!(slow.answer().text(), SUCCESS);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn results_of_the_sandbox_are_fetched_by_https_too() {
    let files = Files::new();
    let proxy = Command::new(["serve", "--sandbox"])
        .setting("sandbox.task_time", "0s")
        .setting(
            "listen.tls.certificate_file",
            files.certificate.to_str().unwrap(),
        )
        .setting("listen.tls.key_file", files.key.to_str().unwrap())
        .start();
    let mut connection = files.connect(proxy.address);
    let create = post("/v1/videos/text2video", r#"{"prompt":"a cat"}"#);
    let created = connection.send(create).answer().json();
    let id = created["data"]["task_id"].as_str().expect("a task id");
    let path = format!("/v1/videos/text2video/{id}");
    let task = connection.send(get(&path)).answer().json();
    let url = task["data"]["task_result"]["videos"][0]["url"].as_str();
    let start = format!("https://{}/results/", proxy.address);
    let file = url.and_then(|url| url.strip_prefix(&start));
    let file = format!("/results/{}", file.expect("a URL of the proxy"));
    assert_eq!(connection.send(get(&file)).answer().status(), 200);
}

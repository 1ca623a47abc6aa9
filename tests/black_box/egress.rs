//! `upstream.proxy`: a tunnel is the only way out, and what leads there learns nothing.

use std::{
    io::{self, BufReader, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use serde_json::json;

use crate::support::{
    Command, Message, Proxy, SECRET_KEY, SUCCESS, Signal, Upstream, assert_has, closed, eventually,
    parse_headers, post,
};

const PASSWORD: &str = "canaryOfTheEgressProxy";

/// A proxy of the network. It answers CONNECT as it was told; a 200 is followed by the tunnel.
struct Egress {
    url: String,
    asked: Arc<Mutex<Vec<Message>>>,
}

// === impl Egress ===

impl Egress {
    fn answering(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::<Mutex<Vec<Message>>>::default();
        let noted = Arc::clone(&asked);
        thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                let noted = Arc::clone(&noted);
                thread::spawn(move || {
                    let request = Message::read_head(&mut BufReader::new(&near));
                    let request = request.unwrap().unwrap();
                    let target = request.target().to_owned();
                    noted.lock().unwrap().push(request);
                    (&near).write_all(answer.as_bytes()).unwrap();
                    if answer.starts_with("HTTP/1.1 200") {
                        splice(&near, &TcpStream::connect(target).unwrap());
                    }
                });
            }
        });
        Self {
            url: format!("http://user:{PASSWORD}@{address}"),
            asked,
        }
    }

    fn open() -> Self {
        Self::answering("HTTP/1.1 200 Connection established\r\n\r\n")
    }

    fn asked(&self) -> Vec<Message> {
        self.asked.lock().unwrap().clone()
    }
}

/// Passes bytes on, both ways, until both ends have said all.
fn splice(near: &TcpStream, far: &TcpStream) {
    let pass = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::scope(|scope| {
        scope.spawn(|| pass(near, far));
        pass(far, near);
    });
}

fn through(egress: &Egress, upstream: &Upstream) -> Command {
    Proxy::to(upstream).setting("upstream.proxy", &egress.url)
}

#[test]
fn requests_go_through_a_tunnel_and_the_egress_proxy_learns_the_name_only() {
    for protocol in ["http/1.1", "h2"] {
        let upstream = Upstream::tls(protocol);
        let egress = Egress::open();
        let proxy = through(&egress, &upstream).start();
        let answer = proxy.post("/v1/videos/text2video?a=b", "{\"prompt\":\"a\"}");
        assert_eq!(answer.text(), SUCCESS, "{protocol}");
        assert_eq!(upstream.last().target(), "/v1/videos/text2video?a=b");
        let asked = egress.asked();
        let (_, authority) = upstream.url.split_once("://").unwrap();
        let line = format!("CONNECT {authority} HTTP/1.1");
        let version = env!("CARGO_PKG_VERSION");
        let headers = format!(
            "host: {authority}\nuser-agent: kling-proxy/{version}\nproxy-authorization: Basic \
             dXNlcjpjYW5hcnlPZlRoZUVncmVzc1Byb3h5"
        );
        for request in &asked {
            assert_eq!(request.first_line(), line, "{protocol}");
            assert_eq!(request.headers(), parse_headers(&headers), "{protocol}");
        }
        assert!(!asked.is_empty(), "{protocol}");
        proxy.signal(Signal::TERM);
        let (_, log) = proxy.end();
        assert!(!log.contains(PASSWORD), "{log}");
    }
}

/// Each attempt may count against the user of the egress proxy.
#[test]
fn egress_proxy_that_refuses_is_not_asked_between_requests() {
    let upstream = Upstream::tls("http/1.1");
    let refusal = "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n";
    let egress = Egress::answering(refusal);
    let proxy = through(&egress, &upstream)
        .setting("upstream.warm_up", "true")
        .setting("upstream.keep_warm", "10m")
        .start();
    eventually("the start has asked", || egress.asked().len() == 1);
    for asked in 2..4 {
        assert_eq!(proxy.get("/v1/x").refusal(), (502, 9101));
        // Longer than the connection that is to stay ready is let alone.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(egress.asked().len(), asked);
    }
}

#[test]
fn without_a_tunnel_nothing_is_sent_and_the_client_may_try_again() {
    for (answer, attempts, hint) in [
        // It would say the same again, and count the attempts to guess a password.
        (
            "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n",
            1,
            "set user and password in `upstream.proxy`",
        ),
        (
            "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n",
            1,
            "must allow CONNECT",
        ),
        (
            "HTTP/1.1 405 Method Not Allowed\r\ncontent-length: 0\r\n\r\n",
            1,
            "must allow CONNECT",
        ),
        (
            "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n",
            3,
            "",
        ),
        (
            "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n",
            3,
            "",
        ),
        ("HTTP/1.1 200 OK\r\n\r\nmore than asked for", 3, ""),
        ("SSH-2.0-OpenSSH_9.2\r\n", 3, ""),
        ("", 3, ""),
    ] {
        let upstream = Upstream::tls("http/1.1");
        let egress = Egress::answering(answer);
        let proxy = through(&egress, &upstream).start();
        let refused = proxy.send(post("/v1/videos/text2video", "{\"prompt\":\"a\"}"));
        assert_eq!(refused.refusal(), (502, 9101), "{answer}");
        let told = refused.error(["retryable", "attempts"]);
        assert_eq!(told, [json!(true), json!(attempts)], "{answer}");
        assert_eq!(egress.asked().len(), attempts, "{answer}");
        let [told] = refused.error(["hint"]);
        assert!(told.as_str().unwrap_or_default().contains(hint), "{told}");
        assert_eq!(upstream.seen().requests.len(), 0, "{answer}");
        proxy.signal(Signal::TERM);
        let (_, log) = proxy.end();
        assert!(!log.contains(PASSWORD), "{log}");
        assert!(!log.contains("may exist"), "nothing was sent: {log}");
    }
}

#[test]
fn egress_proxy_that_says_nothing_is_given_up_in_time() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let upstream = Upstream::tls("http/1.1");
    let proxy = Proxy::to(&upstream)
        .setting("upstream.proxy", url)
        .setting("upstream.connect_timeout", "200ms")
        .setting("retry.attempts", "1")
        .start();
    assert_eq!(proxy.get("/v1/x").refusal(), (502, 9101));
}

#[test]
fn upstream_on_this_machine_is_asked_directly() {
    let upstream = Upstream::ok();
    let egress = Egress::open();
    let proxy = through(&egress, &upstream).start();
    assert_eq!(proxy.get("/v1/x").status(), 200);
    let sandboxed = Command::new(["--sandbox"])
        .setting("upstream.proxy", &egress.url)
        .start();
    assert_eq!(sandboxed.get("/v1/videos/text2video").status(), 200);
    assert_eq!(egress.asked().len(), 0);
}

#[test]
fn password_of_the_egress_proxy_is_never_shown() {
    let egress = Egress::open();
    let shown = Command::new(["settings"])
        .setting("upstream.proxy", &egress.url)
        .run();
    assert_has(&shown.stdout, &["upstream.proxy = [redacted]"]);
    for wrong in [
        format!("https://user:{PASSWORD}@proxy.test"),
        format!("user:{PASSWORD}@proxy.test:3128"),
        format!("http://user:{PASSWORD}@proxy.test/path"),
    ] {
        let told = Command::new(["settings"])
            .setting("upstream.proxy", wrong)
            .run();
        assert_eq!(told.code, Some(78), "{told:?}");
        assert!(!format!("{told:?}").contains(PASSWORD), "{told:?}");
        assert_has(&told.stderr, &["`upstream.proxy`: want a URL such as"]);
    }
}

#[test]
fn check_goes_the_same_way_and_says_where_it_ends() {
    let upstream = Upstream::tls("http/1.1");
    let (_closed, nobody) = closed();
    let nobody = format!("http://{nobody}");
    let unauthorized = Egress::answering(
        "HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n",
    );
    let refusing = Egress::answering("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n");
    let open = Egress::open();
    for (url, code, lines) in [
        (
            &nobody,
            69,
            &["FAILED   connection", "look at upstream.proxy"][..],
        ),
        (
            &unauthorized.url,
            69,
            &[
                "FAILED   tunnel         the egress proxy answered 407",
                "put user and password",
            ],
        ),
        (
            &refusing.url,
            69,
            &[
                "FAILED   tunnel         the egress proxy answered 403",
                "must allow CONNECT to https://localhost:",
            ],
        ),
        (
            &open.url,
            0,
            &[
                "ok       tunnel         through upstream.proxy",
                "ok       tls",
            ],
        ),
    ] {
        let check = Command::new(["check"])
            .upstream(&upstream)
            .keys()
            .setting("upstream.proxy", url)
            .run();
        assert_eq!(check.code, Some(code), "{check:?}");
        assert_has(&check.stdout, lines);
        for secret in [PASSWORD, SECRET_KEY] {
            assert!(!format!("{check:?}").contains(secret), "{check:?}");
        }
    }
}

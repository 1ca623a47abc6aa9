//! Keys change while requests go on: none fails, and none is signed by halves of two pairs.

use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::support::{
    Connection, Credential, Issued, KeyFiles, Proxy, Root, Signal, Upstream, Way, assert_has,
    eventually, get, keys, pair, shows,
};

const ROTATIONS: usize = 100;
/// Each sends its next request when it has the answer to the last.
const CLIENTS: usize = 4;
/// Requests that show the new key before the oldest one is refused.
const SETTLED: usize = 20;

/// Ends the clients, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn rotate(way: Way) {
    let upstream = Upstream::expecting(pair(0));
    let (files, proxy) = KeyFiles::start(way, &upstream);
    let (done, address) = (AtomicBool::new(false), proxy.address);
    let answers = [(); CLIENTS].map(|()| AtomicUsize::new(0));
    thread::scope(|scope| {
        let ask = |answers: &AtomicUsize| {
            let mut connection = Connection::to(address);
            while !done.load(Relaxed) {
                let answer = connection.send(get("/v1/x")).answer();
                assert_eq!(answer.status(), 200, "{way:?}: {}", answer.text());
                answers.fetch_add(1, Relaxed);
            }
        };
        let clients: Vec<_> = answers
            .iter()
            .map(|answers| scope.spawn(move || ask(answers)))
            .collect();
        let over = Over(&done);
        for generation in 1..=ROTATIONS {
            let known = generation.saturating_sub(2)..=generation;
            upstream.expect(known.map(pair).collect::<Vec<_>>());
            files.write(generation);
            proxy.signal(Signal::HUP);
            let before = answers.each_ref().map(|count| count.load(Relaxed));
            eventually("each client is answered meanwhile", || {
                let now = answers.each_ref().map(|count| count.load(Relaxed));
                now.iter().zip(&before).all(|(now, before)| now > before)
            });
            upstream.wait(|seen| {
                let mut last = seen.requests.iter().rev().take(SETTLED);
                seen.requests.len() >= SETTLED && last.all(|request| shows(request, generation))
            });
        }
        drop(over);
        for client in clients {
            client.join().unwrap();
        }
    });
}

#[test]
fn no_request_fails_while_keys_are_replaced_one_file_after_the_other() {
    rotate(Way::Rename);
}

#[test]
fn no_request_fails_while_keys_are_replaced_as_kubernetes_does() {
    rotate(Way::Swap);
}

#[test]
fn swapped_files_are_noticed_without_a_signal() {
    let upstream = Upstream::expecting(pair(0));
    let (files, proxy) = KeyFiles::start(Way::Swap, &upstream);
    upstream.expect([pair(0), pair(1)]);
    files.write(1);
    eventually("the new key is shown", || {
        proxy.get("/v1/x");
        shows(&upstream.last(), 1)
    });
}

#[test]
fn pair_of_which_one_half_is_new_waits_for_the_other() {
    let upstream = Upstream::expecting(pair(0));
    let (files, proxy) = KeyFiles::start(Way::Rename, &upstream);
    let logged = |part: &'static str| {
        assert!(
            proxy.stderr.find(|line| line.contains(part)).is_some(),
            "{part}"
        );
    };
    files.write_half(0, 1);
    proxy.signal(Signal::HUP);
    logged("only one half of the pair is new");
    assert_eq!(proxy.get("/v1/x").status(), 200, "by the old pair");

    upstream.expect([pair(1)]);
    files.write_half(1, 1);
    proxy.signal(Signal::HUP);
    logged("credential changed");
    assert_eq!(proxy.get("/v1/x").status(), 200, "by the new pair");
}

#[test]
fn half_of_a_pair_that_stays_alone_is_taken() {
    let upstream = Upstream::expecting(pair(0));
    let (files, proxy) = KeyFiles::start(Way::Rename, &upstream);
    let [access_key, _] = keys(0);
    let [_, secret_key] = keys(1);
    upstream.expect([Credential::Pair(access_key, secret_key)]);
    files.write_half(1, 1);
    let changed = |line: &str| line.contains("credential changed");
    assert!(proxy.stderr.find(changed).is_some());
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

/// Whoever reads a pipe whose writer is silent waits for ever, and would take over no change any more.
#[test]
fn certificate_that_is_a_pipe_holds_up_nothing() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let Issued { certificate, key } = Root::new().issue("localhost");
    let key = command.file("key.pem", &key.serialize_pem());
    let certificate = command.file("certificate.pem", &certificate.pem());
    let socket = command.home().join("socket");
    let proxy = command
        .setting("listen.tls.certificate_file", certificate.to_str().unwrap())
        .setting("listen.tls.key_file", key.to_str().unwrap())
        .setting("listen.unix_socket", socket.to_str().unwrap())
        .start();
    fs::remove_file(&certificate).unwrap();
    mknodat(
        CWD,
        &certificate,
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    let _silent = fs::File::options()
        .read(true)
        .write(true)
        .open(&certificate);
    proxy.signal(Signal::HUP);
    let told = proxy.stderr.find(|line| line.contains("regular file"));
    assert_has(&told.expect("a warning"), &["WARN", "certificate"]);
    for _ in 0..20 {
        let answer = Connection::unix(&socket).send(get("/v1/x")).answer();
        assert_eq!(answer.status(), 200);
        assert_eq!(proxy.admin("/health/ready").status(), 200);
    }
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
}

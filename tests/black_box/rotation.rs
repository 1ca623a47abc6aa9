//! Keys change while requests go on: none fails, and none is signed by halves of two pairs.

use std::{
    fs,
    os::unix::fs::symlink,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::time::Instant;

use crate::support::{
    Command, Connection, Credential, Message, Proxy, Signal, Upstream, claims, eventually, get,
    request,
};

const ROTATIONS: usize = 100;
/// Each sends its next request when it has the answer to the last.
const CLIENTS: usize = 4;
/// Requests that show the new key before the oldest one is refused.
const SETTLED: usize = 20;

/// How the files of a pair are replaced.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Each by a rename.
    Rename,
    /// Both at once, by a link to their folder, as Kubernetes has it.
    Swap,
}

/// The folder of a pair.
struct Files {
    folder: PathBuf,
    way: Way,
}

const NAMES: [&str; 2] = ["access_key", "secret_key"];

/// The pair of a generation.
fn keys(generation: usize) -> [&'static str; 2] {
    ["access", "secret"].map(|half| &*format!("{half}-key-{generation}").leak())
}

fn pair(generation: usize) -> Credential {
    let [access_key, secret_key] = keys(generation);
    Credential::Pair(access_key, secret_key)
}

/// Whether a request shows the access key of a generation.
fn shows(request: &Message, generation: usize) -> bool {
    let authorization = request.header("authorization").unwrap();
    claims(authorization)["iss"] == keys(generation)[0]
}

// === impl Files ===

impl Files {
    /// The files of generation 0, and a proxy that reads them.
    fn start(way: Way, upstream: &Upstream) -> (Self, Proxy) {
        let command = Command::new([]).upstream(upstream);
        let folder = command.home().join("keys");
        fs::create_dir(&folder).unwrap();
        let files = Self { folder, way };
        files.write(0);
        if let Way::Swap = way {
            for name in NAMES {
                symlink(format!("..data/{name}"), files.folder.join(name)).unwrap();
            }
        }
        let [access_key, secret_key] = NAMES.map(|name| files.folder.join(name));
        let proxy = command
            .env("KLING_ACCESS_KEY_FILE", access_key.to_str().unwrap())
            .env("KLING_SECRET_KEY_FILE", secret_key.to_str().unwrap())
            .start();
        (files, proxy)
    }

    fn write(&self, generation: usize) {
        match self.way {
            Way::Rename => (0..2).for_each(|half| self.write_half(half, generation)),
            Way::Swap => {
                let folder = format!("..{generation}");
                fs::create_dir(self.folder.join(&folder)).unwrap();
                for (name, key) in NAMES.into_iter().zip(keys(generation)) {
                    fs::write(self.folder.join(&folder).join(name), key).unwrap();
                }
                let link = self.folder.join("..data_tmp");
                symlink(folder, &link).unwrap();
                fs::rename(link, self.folder.join("..data")).unwrap();
            }
        }
    }

    /// One file of two.
    fn write_half(&self, half: usize, generation: usize) {
        let new = self.folder.join("new");
        fs::write(&new, keys(generation)[half]).unwrap();
        fs::rename(new, self.folder.join(NAMES[half])).unwrap();
    }
}

fn rotate(way: Way) {
    let upstream = Upstream::expecting(pair(0));
    let (files, proxy) = Files::start(way, &upstream);
    let (done, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let (address, begun) = (proxy.address, Instant::now());
    thread::scope(|scope| {
        let ask = || {
            let mut connection = Connection::to(address);
            while !done.load(Relaxed) {
                let answer = connection.send(get("/v1/x")).answer();
                assert_eq!(answer.status(), 200, "{way:?}: {}", answer.text());
                answers.fetch_add(1, Relaxed);
            }
        };
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
        for generation in 1..=ROTATIONS {
            let known = generation.saturating_sub(2)..=generation;
            upstream.expect(known.map(pair).collect::<Vec<_>>());
            files.write(generation);
            proxy.signal(Signal::HUP);
            upstream.wait(|seen| {
                let mut last = seen.requests.iter().rev().take(SETTLED);
                seen.requests.len() >= SETTLED && last.all(|request| shows(request, generation))
            });
        }
        done.store(true, Relaxed);
        for client in clients {
            client.join().unwrap();
        }
    });
    let (answers, took) = (answers.into_inner(), begun.elapsed());
    assert!(answers >= 200 * took.as_secs(), "{answers} in {took:?}");
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
    let (files, proxy) = Files::start(Way::Swap, &upstream);
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
    let (files, proxy) = Files::start(Way::Rename, &upstream);
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
    let (files, proxy) = Files::start(Way::Rename, &upstream);
    let [access_key, _] = keys(0);
    let [_, secret_key] = keys(1);
    upstream.expect([Credential::Pair(access_key, secret_key)]);
    files.write_half(1, 1);
    let changed = |line: &str| line.contains("credential changed");
    assert!(proxy.stderr.find(changed).is_some());
    assert_eq!(proxy.get("/v1/x").status(), 200);
}

/// A pipe whose writer is silent, as a file on a network that hangs.
#[test]
fn file_that_hangs_holds_up_neither_requests_nor_the_end() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let tokens = command.file("tokens", "first-token-01234\n");
    let proxy = command
        .setting("access.client_tokens_file", tokens.to_str().unwrap())
        .start();
    fs::remove_file(&tokens).unwrap();
    mknodat(CWD, &tokens, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let _silent = fs::File::options().read(true).write(true).open(&tokens);
    proxy.signal(Signal::HUP);
    let shown = request("GET /v1/x", "kling-proxy-token: first-token-01234", "");
    for _ in 0..20 {
        assert_eq!(proxy.send(&shown).status(), 200);
        assert_eq!(proxy.admin("/health/ready").status(), 200);
    }
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
}

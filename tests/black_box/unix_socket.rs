//! The Unix socket: who gets at it, what it replaces, and what it leaves behind.

use std::{
    fs,
    mem::MaybeUninit,
    os::unix::{
        fs::{FileTypeExt as _, MetadataExt as _, chown},
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

use crate::support::{
    Command, Connection, Proxy, SUCCESS, Signal, Step, Upstream, assert_has, closed, eventually,
    get, may_give_away, post, send,
};

/// A path for a Unix socket in a folder of its own.
struct Place {
    path: PathBuf,
    _folder: TempDir,
}

// === impl Place ===

impl Place {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        Self {
            path: folder.path().join("kling.sock"),
            _folder: folder,
        }
    }

    /// A proxy that is to listen here too.
    fn proxy(&self, upstream: &Upstream) -> Command {
        Proxy::to(upstream).setting("listen.unix_socket", self.path.to_str().unwrap())
    }

    fn is_socket(&self) -> bool {
        let found = fs::symlink_metadata(&self.path);
        found.is_ok_and(|found| found.file_type().is_socket())
    }
}

/// R16.
#[test]
fn client_that_stops_reading_is_given_up() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let start = "HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n";
    upstream.script(move |_| vec![send(start), send(vec![b'a'; 100_000_000]), Step::Hang]);
    let command = place.proxy(&upstream);
    let _proxy = command.setting("upstream.idle_timeout", "1s").start();
    let mut idle = Connection::unix(&place.path);
    idle.send(get("/video.mp4")).head();
    upstream.wait(|seen| seen.closed == 1);
}

#[test]
fn unix_socket_serves_beside_tcp_and_is_announced() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let proxy = place.proxy(&upstream).start();
    let mut connection = Connection::unix(&place.path);
    for _ in 0..2 {
        let answer = connection
            .send(post("/v1/videos/text2video", "{}"))
            .answer();
        assert_eq!(answer.text(), SUCCESS);
    }
    assert_eq!(proxy.get("/v1/x").text(), SUCCESS);
    let announced = format!("unix:{} -> {}", place.path.display(), upstream.url);
    assert!(
        proxy
            .stdout
            .find(|line| line.ends_with(&announced))
            .is_some()
    );
}

#[test]
fn unix_socket_can_be_the_only_listener() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let command = place.proxy(&upstream).setting("listen.address", "[]");
    let proxy = command.listening("admin");
    let answer = Connection::unix(&place.path).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS);
    proxy.signal(Signal::TERM);
    assert!(!proxy.stdout.to_end().contains("proxy    http"));
}

#[test]
fn proxy_without_any_listener_does_not_start() {
    let command = Command::new([]).keys();
    let finished = command.setting("listen.address", "[]").run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(&finished.stderr, &["listen.address", "listen.unix_socket"]);
}

/// R23.
#[test]
fn unix_socket_is_open_to_its_owner_only_from_the_first_moment() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let watch = inotify::init(CreateFlags::NONBLOCK).unwrap();
    let made_or_changed = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
    inotify::add_watch(&watch, place.path.parent().unwrap(), made_or_changed).unwrap();
    let _proxy = place.proxy(&upstream).after("umask 000;").start();
    let now = fs::symlink_metadata(&place.path).unwrap();
    assert_eq!(now.mode() & 0o777, 0o600);
    // It was made at its path, and its mode was never another.
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&watch, &mut buffer);
    let first = events.next().unwrap().events();
    assert_eq!(first, ReadFlags::CREATE);
    assert_eq!(events.next().map(|event| event.events()), Err(Errno::AGAIN));
}

#[test]
fn umask_is_what_it_was_after_the_socket_was_made() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let proxy = place.proxy(&upstream).after("umask 027;").start();
    assert_has(&proxy.proc("status"), &["Umask:\t0027"]);
}

/// R23.
#[test]
fn stale_socket_is_replaced() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    drop(UnixListener::bind(&place.path).unwrap());
    assert!(place.is_socket());
    let _proxy = place.proxy(&upstream).start();
    let answer = Connection::unix(&place.path).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS);
}

/// R23.
#[test]
fn socket_that_somebody_listens_to_is_left_alone() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let first = place.proxy(&upstream).start();
    let finished = place.proxy(&upstream).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    let path = place.path.to_str().unwrap();
    assert_has(&finished.stderr, &[path, "another process"]);
    let answer = Connection::unix(&place.path).send(get("/v1/x")).answer();
    assert_eq!(answer.text(), SUCCESS);
    drop(first);
}

#[test]
fn socket_whose_listener_is_too_busy_to_answer_is_left_alone() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    busy.bind(&SockAddr::unix(&place.path).unwrap()).unwrap();
    busy.listen(0).unwrap();
    let _queued = UnixStream::connect(&place.path).unwrap();
    let finished = place.proxy(&upstream).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(place.is_socket());
}

/// R23.
#[test]
fn file_in_the_place_of_the_socket_is_left_alone() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    fs::write(&place.path, "precious").unwrap();
    let finished = place.proxy(&upstream).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(
        &finished.stderr,
        &[place.path.to_str().unwrap(), "move it away"],
    );
    assert_eq!(fs::read_to_string(&place.path).unwrap(), "precious");
}

/// R23.
#[test]
fn stale_socket_of_another_user_is_left_alone() {
    if !may_give_away("unix_socket::stale_socket_of_another_user_is_left_alone") {
        return;
    }
    let (upstream, place) = (Upstream::ok(), Place::new());
    drop(UnixListener::bind(&place.path).unwrap());
    chown(&place.path, Some(65534), None).unwrap();
    let finished = place.proxy(&upstream).run();
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert_has(&finished.stderr, &["65534"]);
    assert!(place.is_socket());
}

#[test]
fn socket_is_removed_when_the_drain_begins() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let proxy = place.proxy(&upstream).start();
    let gate = upstream.hold();
    let mut slow = Connection::unix(&place.path);
    slow.send(post("/v1/slow", "{}"));
    upstream.wait(|seen| !seen.requests.is_empty());
    proxy.signal(Signal::TERM);
    eventually("socket removed", || !place.path.exists());
    gate.open();
    assert_eq!(slow.answer().text(), SUCCESS);
    assert_eq!(proxy.end().0, Some(0));
}

#[test]
fn what_has_taken_the_place_of_the_socket_is_kept() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let proxy = place.proxy(&upstream).start();
    fs::remove_file(&place.path).unwrap();
    let _other = UnixListener::bind(&place.path).unwrap();
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.end().0, Some(0));
    assert!(place.is_socket());
}

#[test]
fn socket_is_removed_by_a_start_that_fails_after_it() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let (_closed, address) = closed();
    let calls_itself = place
        .proxy(&upstream)
        .setting("listen.address", &address)
        .setting("upstream.url", format!("http://{address}"));
    let finished = calls_itself.run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert!(!place.path.exists());
}

#[test]
fn host_is_checked_on_a_unix_socket_too() {
    let (upstream, place) = (Upstream::ok(), Place::new());
    let _proxy = place.proxy(&upstream).start();
    for (host, status) in [("localhost", 200), ("evil.test", 421), ("", 421)] {
        let head = format!("GET /v1/x HTTP/1.1\r\nhost: {host}\r\n\r\n");
        let answer = Connection::unix(&place.path).send(head).answer();
        assert_eq!(answer.status(), status, "{host}");
    }
    assert_eq!(upstream.first_lines().len(), 1);
}

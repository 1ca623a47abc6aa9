//! Support for the tests: a client and an upstream written on sockets, and the proxy as a process.
#![expect(
    unreachable_pub,
    reason = "`pub` means for the tests, and all of them are one crate"
)]

mod client;
mod distance;
mod frame;
mod frame_upstream;
mod http;
mod key_files;
mod namespace;
mod process;
mod tls;
mod token;
mod upstream;

use std::{env, net::SocketAddr, thread, time::Duration};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Socket, Type};
use tokio::time::Instant;

pub use client::{Connection, raw};
pub use frame::{CANCEL, INTERNAL_ERROR, NO_ERROR, REFUSED_STREAM};
pub use frame_upstream::{Arrived, FrameUpstream, Id, Offer};
pub use http::{
    Message, documented, get, gzip, is_cut_off, kling, parse_headers, post, reply, request,
};
pub use key_files::{KeyFiles, Way, keys, pair, shows};
pub use namespace::{in_namespace, may_give_away};
pub use process::{Command, Finished, Proxy, unprivileged};
pub use rustix::process::Signal;
pub use tls::{Issued, Root};
pub use token::{ACCESS_KEY, Credential, SECRET_KEY, TOKEN, claims, mint, now, verify};
pub use upstream::{Gate, SUCCESS, Step, Upstream, send};

/// Longest wait for anything that should come. Only failing tests wait so long.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two checks for something that should come.
pub const PAUSE: Duration = Duration::from_millis(2);

/// Starts an upstream that responds with success, and a proxy in front of it.
pub fn started() -> (Upstream, Proxy) {
    started_with(&[])
}

/// Starts the same with some settings.
pub fn started_with(settings: &[(&str, &str)]) -> (Upstream, Proxy) {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let set = |command: Command, (key, value): &(&str, &str)| command.setting(key, value);
    let proxy = settings.iter().fold(command, set).start();
    (upstream, proxy)
}

/// Starts the same without retries, for tests about a single attempt.
pub fn started_without_retry() -> (Upstream, Proxy) {
    started_with(&[("retry.attempts", "1")])
}

/// Returns a socket that nobody can connect to before it listens, and its address. A proxy can listen
/// there, and no other process gets the port.
pub fn closed() -> (Socket, String) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    socket.bind(&any.into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address.to_string())
}

/// Reads a number from the environment, for longer or repeated runs.
pub fn given(variable: &str) -> Option<u64> {
    Some(env::var(variable).ok()?.parse().expect("a number"))
}

/// Raises the limit of descriptors of this process and its children as far as it is allowed to, and returns
/// the new limit. A connection takes a descriptor at each end, and the usual soft limit is 1024.
pub fn raise_descriptor_limit() -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    maximum.map_or(usize::MAX, |maximum| usize::try_from(maximum).unwrap())
}

/// Checks again and again until it happened, with pauses for other processes. Fails if it never happens.
pub fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(PAUSE);
    }
}

/// Fails if a part is missing in the text, and shows the text.
#[track_caller]
pub fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

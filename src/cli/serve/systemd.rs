//! Sockets that systemd hands over, and notifications to it. This works with any service manager that
//! uses its protocols (sd_listen_fds(3), sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
#[cfg(target_os = "linux")]
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;
use rustix::time::{ClockId, clock_gettime};
#[cfg(target_os = "linux")]
use socket2::SockRef;

use crate::cli::{Exit, Failure};
use crate::environment::Environment;
use crate::server::Listener;
use crate::settings::SettingProblem;

/// Variable with the number of sockets that are handed over. `LISTEN_PID` has our process id.
const SOCKETS: &str = "LISTEN_FDS";
/// Variable with the names of these sockets, separated by colons (`FileDescriptorName=`).
const NAMES: &str = "LISTEN_FDNAMES";
/// Variable with the address of the socket for notifications.
const NOTIFY: &str = "NOTIFY_SOCKET";
/// Longest time to wait until the manager has room for a message. A manager that works takes less.
const PATIENCE: Duration = Duration::from_secs(1);

/// The socket for notifications to the service manager that started us, if it wants any.
#[derive(Debug)]
pub(in crate::cli) struct SdNotify(Option<(UnixDatagram, SocketAddr)>);

/// Returns the listening sockets that were opened for us, with their names.
///
/// Call this once, before the first thread is started: it removes the variables from the environment.
pub(super) fn sockets(environment: &Environment) -> Result<Vec<(String, Listener)>, Failure> {
    let mut sockets = ListenFd::from_env();
    let names = environment.get(NAMES).map(OsStr::to_string_lossy);
    let mut names = names.iter().flat_map(|names| names.split(':'));
    let mut listeners = Vec::new();
    for index in 0..sockets.len() {
        let name = names.next().unwrap_or_default().to_owned();
        let listener = take(&mut sockets, index).map_err(|error| {
            let reason = format!("socket {} ({name}) cannot be used: {error}", index + 1);
            Failure::new(
                Exit::Settings,
                SettingProblem::new(SOCKETS, reason).to_string(),
            )
        })?;
        listeners.push((name, listener));
    }
    Ok(listeners)
}

fn take(sockets: &mut ListenFd, index: usize) -> io::Result<Listener> {
    let (listens, listener) = if let Ok(Some(socket)) = sockets.take_tcp_listener(index) {
        socket.set_nonblocking(true)?;
        (listens(&socket)?, Listener::Tcp(socket))
    } else if let Ok(Some(socket)) = sockets.take_unix_listener(index) {
        socket.set_nonblocking(true)?;
        (listens(&socket)?, Listener::Unix(socket))
    } else {
        return Err(io::Error::other("want a stream socket (ListenStream=)"));
    };
    if !listens {
        return Err(io::Error::other("want one that listens (Accept=no)"));
    }
    Ok(listener)
}

fn listens(socket: &impl AsFd) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    return SockRef::from(socket).is_listener();
    // Other systems do not show this; accepting a connection fails if the socket does not listen.
    #[cfg(not(target_os = "linux"))]
    Ok(true)
}

// === impl SdNotify ===

impl SdNotify {
    /// Opens a socket to the manager that the environment names, or logs a warning if that fails.
    pub(in crate::cli) fn new(environment: &Environment) -> Self {
        let connect = |name: &OsStr| {
            let socket = UnixDatagram::unbound()?;
            socket.set_write_timeout(Some(PATIENCE))?;
            Ok::<_, io::Error>((socket, address(name)?))
        };
        Self(environment.get(NOTIFY).and_then(|name| {
            let warn = |error: &_| tracing::warn!(%error, "{NOTIFY} cannot be used");
            connect(name).inspect_err(warn).ok()
        }))
    }

    /// Reports that requests are served, or that settings have been reloaded.
    pub(super) fn ready(&self) {
        self.tell("READY=1\nSTATUS=Serving");
    }

    /// Reports that settings are about to be reloaded; [`ready`](Self::ready) follows.
    pub(super) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        // Distinguishes this reload from earlier ones, for `Type=notify-reload`.
        let now = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.tell(&format!(
            "RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS=Reloading"
        ));
    }

    /// Reports that the shutdown has begun.
    pub(super) fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=Letting requests in flight end");
    }

    fn tell(&self, state: &str) {
        if let Some((socket, address)) = &self.0
            && let Err(error) = socket.send_to_addr(state.as_bytes(), address)
        {
            tracing::warn!(%error, "cannot tell the service manager how it goes");
        }
    }
}

/// Reads the address of a socket: a path, or after an `@` a name that is in no file system.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    #[cfg(target_os = "linux")]
    if let Some(name) = name.as_bytes().strip_prefix(b"@") {
        return SocketAddr::from_abstract_name(name);
    }
    SocketAddr::from_pathname(name)
}

//! Protection of the process's memory, and the number of its file descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Semaphore;

use crate::settings;

/// Descriptors that one connection to upstream takes in this process.
pub(in crate::cli) const FAR_UPSTREAM: u64 = 1;
/// The same if upstream is the embedded sandbox: both ends are in this process.
pub(in crate::cli) const EMBEDDED_SANDBOX: u64 = 2;
/// The same for the sandbox alone, which has no upstream.
pub(in crate::cli) const NO_UPSTREAM: u64 = 0;
/// Idle connections to upstream that are kept beside those in use: 256 by each of 4 threads.
const KEPT: u64 = 1024;
/// Descriptors for other uses than connections of clients and to upstream: the admin listener, threads,
/// files, name resolution.
const RESERVED: u64 = 384;

/// Turns core files off, and hides `/proc/PID/environ` and the memory from other processes of the same
/// user: both hold keys. Programs that we start are not protected; their environment holds none of our
/// keys.
#[cfg(target_os = "linux")]
pub(in crate::cli) fn hide_memory() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};

    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "other processes of this user may read this one's memory");
    }
}

/// Turns core files off, which would hold keys. On systems other than Linux, the limit of their size is the
/// means to do so.
#[cfg(not(target_os = "linux"))]
pub(in crate::cli) fn hide_memory() {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::debug!(%error, "cannot turn core files off");
    }
}

/// Raises the soft limit of descriptors to the hard limit.
///
/// A connection takes a descriptor on each side, and the usual soft limit of 1024 is below
/// `limits.connections`. Programs that do not use `select` may raise it. Programs that we start later
/// inherit the raised limit.
pub(in crate::cli) fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(descriptor_limit());
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

/// Returns `limits.connections`, or fewer with a warning if there are not enough descriptors.
pub(in crate::cli) fn limit_connections(limits: &settings::LimitSettings, upstream: u64) -> usize {
    let (wanted, fitting) = (limits.connections, fitting_connections(limits, upstream));
    if wanted > fitting {
        let to_upstream = upstream * wanted.min(limits.in_flight.saturating_add(KEPT));
        let needed = wanted.saturating_add(to_upstream).saturating_add(RESERVED);
        let limit = descriptor_limit();
        tracing::warn!(
            "limits.connections: {wanted} connections may need {needed} open files, and this process may have \
             {limit}: it takes {fitting} connections at once, and others wait. Raise the hard limit of open files \
             (LimitNOFILE of systemd, --ulimit of a container), or lower limits.connections"
        );
    }
    usize::try_from(wanted.min(fitting)).unwrap_or(usize::MAX)
}

/// Returns the number of client connections for which there are enough descriptors, at least 1.
///
/// Each may need a connection to upstream, but all together need at most `limits.in_flight` and [`KEPT`]
/// of these. If the limit is low, at most half of the descriptors are set aside for other uses.
pub(in crate::cli) fn fitting_connections(limits: &settings::LimitSettings, upstream: u64) -> u64 {
    let limit = descriptor_limit();
    let left = limit - RESERVED.min(limit / 2);
    let to_upstream = upstream.saturating_mul(limits.in_flight.saturating_add(KEPT));
    let fitting = (left / (1 + upstream)).max(left.saturating_sub(to_upstream));
    fitting.max(1)
}

/// Returns the number of connections for a share of the descriptors: a third of them if `divisor` is 3.
pub(super) fn share_of_descriptors(divisor: u64) -> usize {
    let share = usize::try_from(descriptor_limit() / divisor).unwrap_or(usize::MAX);
    share.min(Semaphore::MAX_PERMITS)
}

/// Returns the number of descriptors that this process can have once it has raised its limit.
fn descriptor_limit() -> u64 {
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if cfg!(target_os = "macos") {
        // macOS refuses more than `OPEN_MAX`, and therefore `unlimited` (setrlimit(2)).
        most.min(10_240)
    } else {
        most
    }
}

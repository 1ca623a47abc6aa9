//! What the process asks of its kernel before it holds a key.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Semaphore;

use crate::settings;

/// Descriptors that a connection to upstream takes in this process.
pub(in crate::cli) const FAR_UPSTREAM: u64 = 1;
/// The same where the embedded sandbox is the other end.
pub(in crate::cli) const EMBEDDED_SANDBOX: u64 = 2;
/// The same for the sandbox alone, which has no upstream.
pub(in crate::cli) const NO_UPSTREAM: u64 = 0;
/// Connections to upstream that are kept beside those in use: 256 by each of 4 threads.
const KEPT: u64 = 1024;
/// Descriptors for all that is no client: the admin listener, threads, files, name resolution.
const RESERVED: u64 = 384;

/// No core file, and no `/proc/PID/environ` or memory for other processes of the same user: both
/// hold keys. Programs that we start have neither.
#[cfg(target_os = "linux")]
pub(in crate::cli) fn hide_memory() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};

    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "other processes of this user may read this one's memory");
    }
}

/// No core file, which would hold keys: elsewhere the kernel cannot be told not to dump.
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

/// A connection takes a descriptor on each side; the usual soft limit of 1024 is below
/// `limits.connections`. Programs that do not use `select` may raise it to the hard limit;
/// those that we start inherit what it is by then.
pub(in crate::cli) fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(descriptor_limit());
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

/// `limits.connections`, or fewer where there are not enough descriptors, with a warning.
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

/// How many connections of clients there are enough descriptors for. Each may need one to upstream, but
/// all together no more than requests may be in flight. Where there are few, connections get half of them.
pub(in crate::cli) fn fitting_connections(limits: &settings::LimitSettings, upstream: u64) -> u64 {
    let limit = descriptor_limit();
    let left = limit - RESERVED.min(limit / 2);
    let to_upstream = upstream.saturating_mul(limits.in_flight.saturating_add(KEPT));
    let fitting = (left / (1 + upstream)).max(left.saturating_sub(to_upstream));
    fitting.max(1)
}

/// How many connections get by with a share of the descriptors: with a third, if `divisor` is 3.
pub(super) fn share_of_descriptors(divisor: u64) -> usize {
    let share = usize::try_from(descriptor_limit() / divisor).unwrap_or(usize::MAX);
    share.min(Semaphore::MAX_PERMITS)
}

/// How many descriptors this process can have, once it has raised its limit.
fn descriptor_limit() -> u64 {
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if cfg!(target_os = "macos") {
        // It refuses more than `OPEN_MAX`, and so `unlimited` (setrlimit(2)).
        most.min(10_240)
    } else {
        most
    }
}

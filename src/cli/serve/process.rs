//! What the process asks of its kernel before it holds a key.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::Semaphore;

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

/// How many connections get by with this part of the descriptors, such as a third.
pub(super) fn share_of_descriptors(part: u64) -> usize {
    let share = usize::try_from(descriptor_limit() / part).unwrap_or(usize::MAX);
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

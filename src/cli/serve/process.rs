//! What the process asks of its kernel before it holds a key.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
    let current = maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

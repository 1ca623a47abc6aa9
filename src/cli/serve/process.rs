//! What the process asks of its kernel before it holds a key.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// No core file, and no `/proc/PID/environ` or memory for other processes of the same user: both
/// hold keys.
pub(super) fn hide_memory() {
    // Where the kernel cannot be told not to dump, there is this.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        tracing::debug!(%error, "cannot turn core files off");
    }
    #[cfg(target_os = "linux")]
    if let Err(error) =
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
    {
        tracing::warn!(%error, "other processes of this user may read this one's memory");
    }
}

/// A connection takes a descriptor on each side; the usual soft limit of 1024 is below
/// `limits.connections`. Programs that do not use `select` may raise it to the hard limit.
pub(super) fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = maximum;
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current, maximum }) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

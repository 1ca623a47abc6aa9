//! What the process asks of its kernel before it holds a key.

/// No core file, and no `/proc/PID/environ` or memory for other processes of the same user: both
/// hold keys.
pub(super) fn hide_memory() {
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
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    ) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}

//! A Unix socket in the file system: created so that only this user can connect, and removed at the end.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::{geteuid, umask};
use socket2::{Domain, SockAddr, Socket, Type};

use super::listener::BACKLOG;

/// File of a listening socket. Dropping it removes the file, unless another file has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// Keeps the socket open: until it is closed, the kernel gives its inode to no other file.
    _open: UnixListener,
}

/// Reasons why a socket is not opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketFileError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("there is a file that is no socket: move it away, or choose another path")]
    NotASocket,
    #[error("the socket there belongs to user {0}: remove it as that user, or choose another path")]
    Foreign(u32),
    /// The socket is in use, or may be: connecting to it did not fail with "connection refused".
    #[error("another process listens there: stop it, or choose another path")]
    InUse,
    /// The file system, or a confinement of this process, did not apply the mode.
    #[error("it would be open to others (mode {0:03o}): choose a path where modes hold")]
    Open(u32),
}

/// Mode bits of users who must not connect.
const OTHERS: u32 = 0o077;

// === impl SocketFile ===

impl SocketFile {
    /// Opens a socket to which only this user can connect, from its creation on. Replaces a socket that an
    /// earlier run left behind.
    ///
    /// Call it before the first thread starts: for a moment it changes the umask, which belongs to the
    /// whole process. No other way to set the mode at creation works on every platform and also fails if
    /// the file exists.
    ///
    /// # Errors
    ///
    /// [`SocketFileError`]. The path is then as before, except that an abandoned socket of ours may be
    /// gone.
    pub fn bind(path: &Path) -> Result<(UnixListener, Self), SocketFileError> {
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        let before = umask(Mode::all() - (Mode::RUSR | Mode::WUSR));
        let bound = socket.bind(&SockAddr::unix(path)?);
        umask(before);
        bound?;
        let made = fs::symlink_metadata(path)?;
        let file = Self {
            path: path.to_owned(),
            identity: identity(&made),
            _open: socket.try_clone()?.into(),
        };
        // Nobody can connect before `listen`.
        if made.mode() & OTHERS != 0 {
            return Err(SocketFileError::Open(made.mode() & 0o777));
        }
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok((socket.into(), file))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| identity(&found) == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "cannot remove the socket");
        }
    }
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Removes a socket of this user if no process listens to it. Fails if anything else is at the path.
fn remove_stale(path: &Path) -> Result<(), SocketFileError> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Err(SocketFileError::NotASocket);
    }
    if found.uid() != geteuid().as_raw() {
        return Err(SocketFileError::Foreign(found.uid()));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A process that is too busy to accept must not make us wait. It counts as in use.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Ok(fs::remove_file(path)?)
        }
        _ => Err(SocketFileError::InUse),
    }
}

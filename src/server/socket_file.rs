//! A Unix socket in the file system: opened so that only this user gets at it, and removed again.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::{geteuid, umask};
use socket2::{Domain, SockAddr, Socket, Type};

use super::listener::BACKLOG;

/// The file of a listening socket. Dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// While the socket is open the kernel gives its inode to no other file.
    _open: UnixListener,
}

/// Why a socket is not opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketFileError {
    /// The kernel says no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Something that we did not make is there.
    #[error("there is a file that is no socket: move it away, or choose another path")]
    NotASocket,
    /// Somebody else's socket is there.
    #[error("the socket there belongs to user {0}: remove it as that user, or choose another path")]
    Foreign(u32),
    /// Another process serves it, or might.
    #[error("another process listens there: stop it, or choose another path")]
    InUse,
    /// The file system, or who confines us, has its own idea of modes.
    #[error("it would be open to others (mode {0:03o}): choose a path where modes hold")]
    Open(u32),
}

/// Those who must not connect.
const OTHERS: u32 = 0o077;

// === impl SocketFile ===

impl SocketFile {
    /// Opens a socket that only this user can connect to, from its first moment on. One that an
    /// earlier run has left behind is replaced.
    ///
    /// Call it before the first thread is started: for a moment it changes the umask, which
    /// belongs to the whole process. Of the ways to have a mode from creation on, this is the one
    /// that works on every platform and still fails where a file exists.
    ///
    /// # Errors
    ///
    /// [`SocketFileError`]; what is at the path is then as it was.
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

/// Removes a socket of ours that nobody listens to. Nothing else may be in the way.
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
    // A process that is too busy to answer must not make us wait; it is there.
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Ok(fs::remove_file(path)?)
        }
        _ => Err(SocketFileError::InUse),
    }
}

//! Reads a file that decides something or holds a secret, if nobody else could have written it.
//!
//! Settings, trust roots, client tokens and keys: who writes one of them can spend our key, send our
//! requests elsewhere, or have us run a command. One set of rules holds for them all.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, StatVfsMountFlags, fcntl_setfl, statvfs};
use rustix::process::geteuid;
use zeroize::Zeroizing;

/// Who else may read it: Docker and Kubernetes mount secrets so, hence no error.
const READ_BY_OTHERS: u32 = 0o004;
const WRITTEN_BY_GROUP: u32 = 0o020;
const WRITTEN_BY_ALL: u32 = 0o002;
/// In such a folder only the owner of a file can put another in its place.
const STICKY: u32 = 0o1000;
const ROOT: u32 = 0;
/// The largest file, in bytes: thousands of client tokens, or every trust root there is.
const LARGEST: u64 = 1 << 20;
/// As many links as the kernel follows (`path_resolution(7)`).
const MOST_LINKS: usize = 40;

/// A file that nobody else could have written.
#[derive(Debug)]
pub struct TrustedFile {
    /// All of it.
    pub bytes: Zeroizing<Vec<u8>>,
    /// Whether every user of this machine can read it.
    pub exposed: bool,
}

/// Why a file is not read. It shows nothing of the content.
#[derive(Debug, thiserror::Error)]
pub enum TrustedFileError {
    /// It cannot be.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a pipe, a folder or a device.
    #[error("it is not a regular file")]
    Irregular,
    /// It has more bytes than any such file.
    #[error("it is larger than {} MiB", LARGEST >> 20)]
    TooLarge,
    /// It is to be a text, and is none.
    #[error("it is not UTF-8")]
    NotText,
    /// Others may write it.
    #[error("others can write it (mode {0:03o}): chmod go-w")]
    Writable(u32),
    /// It, or a link that leads to it, is somebody else's.
    #[error("it belongs to user {0}, who is neither this process's user nor root")]
    Foreign(u32),
    /// Others may put another file in its place.
    #[error("others can write its folder {} (mode {mode:03o}): chmod go-w", .folder.display())]
    WritableFolder {
        /// The folder.
        folder: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else may put another file in its place.
    #[error(
        "its folder belongs to user {owner}, who is neither this process's user nor root: {}",
        .folder.display()
    )]
    ForeignFolder {
        /// The folder.
        folder: PathBuf,
        /// Whose it is.
        owner: u32,
    },
}

/// The number of the user who runs this process.
#[derive(Clone, Copy)]
struct User(u32);

/// Reads a file after looking at who may write it and its folder.
///
/// # Errors
///
/// [`TrustedFileError`]
pub fn read(path: &Path) -> Result<TrustedFile, TrustedFileError> {
    let (file, metadata) = open(path)?;
    let us = User::ours();
    let mode = metadata.mode() & 0o777;
    if mode & us.others(metadata.gid()) != 0 {
        return Err(TrustedFileError::Writable(mode));
    }
    us.check_owner(&metadata)
        .map_err(TrustedFileError::Foreign)?;
    check_places(path, us)?;
    Ok(TrustedFile {
        bytes: read_whole(file)?,
        exposed: mode & READ_BY_OTHERS != 0,
    })
}

/// Reads a file whoever could have written it: it decides nothing alone, and all may know it.
///
/// # Errors
///
/// [`TrustedFileError::Io`], [`TrustedFileError::Irregular`] and [`TrustedFileError::TooLarge`].
pub fn read_public(path: &Path) -> Result<Zeroizing<Vec<u8>>, TrustedFileError> {
    let (file, _) = open(path)?;
    read_whole(file)
}

// === impl TrustedFile ===

impl TrustedFile {
    /// The content as text.
    ///
    /// # Errors
    ///
    /// [`TrustedFileError::NotText`]
    pub fn text(&self) -> Result<&str, TrustedFileError> {
        str::from_utf8(&self.bytes).map_err(|_| TrustedFileError::NotText)
    }
}

// === impl User ===

impl User {
    fn ours() -> Self {
        Self(geteuid().as_raw())
    }

    /// Fails with the owner, if that is neither this process's user nor root.
    fn check_owner(self, metadata: &Metadata) -> Result<(), u32> {
        let owner = metadata.uid();
        if [ROOT, self.0].contains(&owner) {
            Ok(())
        } else {
            Err(owner)
        }
    }

    /// The bits of a mode by which others may write what belongs to this group.
    ///
    /// A group that has the number of its user is that user's own, and systems that give users such a
    /// group let it write all that they make (a umask of 002). OpenSSH takes such files and folders where
    /// it is patched for these systems.
    fn others(self, group: u32) -> u32 {
        let is_our_own = group == self.0 && group != ROOT;
        if is_our_own {
            WRITTEN_BY_ALL
        } else {
            WRITTEN_BY_GROUP | WRITTEN_BY_ALL
        }
    }

    /// Returns true if others can put another file in the place of one of ours in a folder.
    fn is_open(self, mode: u32, group: u32) -> bool {
        mode & self.others(group) != 0 && mode & STICKY == 0
    }
}

/// Opens a regular file for reading, without waiting for what may never come.
fn open(path: &Path) -> Result<(File, Metadata), TrustedFileError> {
    // A named pipe that nobody writes to would keep us here for ever.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    fcntl_setfl(&file, OFlags::empty()).map_err(io::Error::from)?;
    // Of the open file: the path may lead elsewhere a moment later.
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((file, metadata))
    } else {
        Err(TrustedFileError::Irregular)
    }
}

fn read_whole(file: File) -> Result<Zeroizing<Vec<u8>>, TrustedFileError> {
    let mut bytes = Zeroizing::new(Vec::new());
    // One more than fits: what is cut off must not look whole.
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(TrustedFileError::TooLarge);
    }
    Ok(bytes)
}

/// Checks the folder of a file and, where the name is that of a link, those of what it leads to.
fn check_places(path: &Path, us: User) -> Result<(), TrustedFileError> {
    let mut name = path.to_owned();
    for _ in 0..MOST_LINKS {
        let folder = match name.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        check_folder(folder, us)?;
        let metadata = fs::symlink_metadata(&name)?;
        if !metadata.is_symlink() {
            break;
        }
        us.check_owner(&metadata)
            .map_err(TrustedFileError::Foreign)?;
        name = folder.join(fs::read_link(&name)?);
    }
    Ok(())
}

fn check_folder(folder: &Path, us: User) -> Result<(), TrustedFileError> {
    let metadata = fs::metadata(folder)?;
    us.check_owner(&metadata)
        .map_err(|owner| TrustedFileError::ForeignFolder {
            folder: folder.to_owned(),
            owner,
        })?;
    // Kubernetes lets all write the folder of a ConfigMap, and mounts it so that nobody can.
    if us.is_open(metadata.mode(), metadata.gid()) && !is_read_only(folder)? {
        return Err(TrustedFileError::WritableFolder {
            folder: folder.to_owned(),
            mode: metadata.mode() & 0o777,
        });
    }
    Ok(())
}

fn is_read_only(folder: &Path) -> io::Result<bool> {
    let flags = statvfs(folder)?.f_flag;
    Ok(flags.contains(StatVfsMountFlags::RDONLY))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_pipe_that_nobody_writes_to_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(read(&pipe), Err(TrustedFileError::Irregular)));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused_and_one_they_can_read_is_marked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        write(&file, "canary").unwrap();
        for (mode, outcome) in [
            (0o600, Ok(false)),
            (0o400, Ok(false)),
            (0o440, Ok(false)),
            (0o444, Ok(true)),
            (
                0o602,
                Err("others can write it (mode 602): chmod go-w".to_owned()),
            ),
        ] {
            set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            let read = read(file.path())
                .map(|file| file.exposed)
                .map_err(|e| e.to_string());
            assert_eq!(read, outcome, "{mode:o}");
        }
    }

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let largest = usize::try_from(LARGEST).unwrap();
        write(&file, vec![b'\n'; largest]).unwrap();
        assert_eq!(read(file.path()).unwrap().bytes.len(), largest);
        write(&file, vec![b'\n'; largest + 1]).unwrap();
        assert!(matches!(read(file.path()), Err(TrustedFileError::TooLarge)));
    }

    #[test]
    fn others_are_all_but_the_group_of_a_users_own() {
        const USER: u32 = 1000;
        const STAFF: u32 = 20;
        for (user, mode, group, open) in [
            (USER, 0o700, USER, false),
            (USER, 0o755, STAFF, false),
            (USER, 0o775, USER, false),
            (USER, 0o2775, USER, false),
            (USER, 0o777, USER, true),
            (USER, 0o775, STAFF, true),
            (USER, 0o775, ROOT, true),
            (ROOT, 0o775, ROOT, true),
            (USER, 0o1777, ROOT, false),
            (USER, 0o3777, STAFF, false),
            (USER, 0o1775, STAFF, false),
        ] {
            let us = User(user);
            let what = format!("{user}, {mode:o} of {group}");
            assert_eq!(us.is_open(mode, group), open, "{what}");
            // Who can write a file need not replace it.
            let is_written = mode & us.others(group) != 0;
            assert_eq!(is_written, open || mode & STICKY != 0, "{what}");
        }
    }
}

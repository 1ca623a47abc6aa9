//! Reads a file that decides something or holds a secret, if no other user could have written it.
//!
//! Such files are settings, trust roots, client tokens and keys. A user who can write one of them can use our
//! key, send our requests to another server, or make us run a command. The same rules hold for all of them.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, StatVfsMountFlags, fcntl_setfl, statvfs};
use rustix::process::geteuid;
use zeroize::Zeroizing;

/// Permission of all users to read. It is no error, because Docker and Kubernetes mount secrets with it.
const READ_BY_OTHERS: u32 = 0o004;
const WRITTEN_BY_GROUP: u32 = 0o020;
const WRITTEN_BY_ALL: u32 = 0o002;
/// Sticky bit: in a folder that has it, only the owner of a file can put another file in its place.
const STICKY: u32 = 0o1000;
const ROOT: u32 = 0;
/// Largest file, in bytes. Thousands of client tokens fit, or all public trust roots.
const LARGEST: u64 = 1 << 20;
/// Largest number of symbolic links that are followed, the same as in the kernel (`path_resolution(7)`).
const MOST_LINKS: usize = 40;

/// Content of a file that no other user could have written.
#[derive(Debug)]
pub struct TrustedFile {
    /// Whole content, wiped from memory when dropped.
    pub bytes: Zeroizing<Vec<u8>>,
    /// True if every user of this machine can read the file.
    pub exposed: bool,
}

/// Reason why a file is not read. Its text contains nothing of the content.
#[derive(Debug, thiserror::Error)]
pub enum TrustedFileError {
    /// The system cannot open, read or inspect the file or its folder.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is a pipe, a folder or a device.
    #[error("it is not a regular file")]
    Irregular,
    /// The file is larger than any such file needs to be.
    #[error("it is larger than {} MiB", LARGEST >> 20)]
    TooLarge,
    /// The file must be a text, but is not UTF-8.
    #[error("it is not UTF-8")]
    NotText,
    /// Other users can write the file. The value is its mode.
    #[error("others can write it (mode {0:03o}): chmod go-w")]
    Writable(u32),
    /// The file, or a symbolic link that leads to it, belongs to another user, whose number is the value.
    #[error("it belongs to user {0}, who is neither this process's user nor root")]
    Foreign(u32),
    /// The mode of the folder lets other users put another file in its place.
    #[error("others can write its folder {} (mode {mode:03o}): chmod go-w", .folder.display())]
    WritableFolder {
        folder: PathBuf,
        /// Permission bits of the folder.
        mode: u32,
    },
    /// The folder belongs to another user, who can put another file in its place.
    #[error(
        "its folder belongs to user {owner}, who is neither this process's user nor root: {}",
        .folder.display()
    )]
    ForeignFolder {
        folder: PathBuf,
        /// Number of the folder's user.
        owner: u32,
    },
}

/// Number of the user who runs this process.
#[derive(Clone, Copy)]
struct User(u32);

/// Reads a file, after checks of its owner and mode and of those of its folder.
///
/// # Errors
///
/// [`TrustedFileError`], except [`TrustedFileError::NotText`].
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

/// Reads a file without a check of its owner and mode. The file must be one that decides nothing alone and
/// that all users may read.
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
    /// Returns the content as text.
    ///
    /// # Errors
    ///
    /// [`TrustedFileError::NotText`] if the content is not UTF-8.
    pub fn text(&self) -> Result<&str, TrustedFileError> {
        str::from_utf8(&self.bytes).map_err(|_| TrustedFileError::NotText)
    }
}

// === impl User ===

impl User {
    fn ours() -> Self {
        Self(geteuid().as_raw())
    }

    /// Fails with the owner's number, if the owner is neither this process's user nor root.
    fn check_owner(self, metadata: &Metadata) -> Result<(), u32> {
        let owner = metadata.uid();
        if [ROOT, self.0].contains(&owner) {
            Ok(())
        } else {
            Err(owner)
        }
    }

    /// Returns the bits of a mode that let other users write a file or folder of this group.
    ///
    /// A group with the same number as a user is that user's private group. Systems with such groups let the
    /// group write all files of its user (a umask of 002), so the group's bit does not count there. The
    /// OpenSSH packages of these systems are patched to accept such files and folders too.
    fn others(self, group: u32) -> u32 {
        let is_our_own = group == self.0 && group != ROOT;
        if is_our_own {
            WRITTEN_BY_ALL
        } else {
            WRITTEN_BY_GROUP | WRITTEN_BY_ALL
        }
    }

    /// Returns true if other users can replace a file of ours in a folder of this mode and group.
    fn is_open(self, mode: u32, group: u32) -> bool {
        mode & self.others(group) != 0 && mode & STICKY == 0
    }
}

/// Opens a regular file for reading, and never blocks while it opens the file.
fn open(path: &Path) -> Result<(File, Metadata), TrustedFileError> {
    // Without this flag, opening a named pipe without a writer would block for ever.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    fcntl_setfl(&file, OFlags::empty()).map_err(io::Error::from)?;
    // Reads the metadata of the open file, because the path may lead to another file a moment later.
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((file, metadata))
    } else {
        Err(TrustedFileError::Irregular)
    }
}

fn read_whole(file: File) -> Result<Zeroizing<Vec<u8>>, TrustedFileError> {
    let mut bytes = Zeroizing::new(Vec::new());
    // Reads one byte more than the limit, so that a file that is too large is not taken for a whole one.
    file.take(LARGEST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST {
        return Err(TrustedFileError::TooLarge);
    }
    Ok(bytes)
}

/// Checks the folder of a file. If the file is a symbolic link, also checks the owner of the link and the
/// folder of its target, link by link.
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
    // The folder of a Kubernetes ConfigMap has a mode that lets all users write, but its mount is read-only.
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
            // With the sticky bit, users who have the permission to write still cannot replace a file.
            let is_written = mode & us.others(group) != 0;
            assert_eq!(is_written, open || mode & STICKY != 0, "{what}");
        }
    }
}

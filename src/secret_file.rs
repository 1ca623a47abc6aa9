//! Reads a file that holds a secret, if nobody else could have written it.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{OFlags, fcntl_setfl};
use zeroize::Zeroizing;

/// Who else may read it: Docker and Kubernetes mount secrets so, hence no error.
const READ_BY_OTHERS: u32 = 0o004;
/// Who else may write it: they could make us spend with a key of theirs, or lock us out.
const WRITTEN_BY_OTHERS: u32 = 0o022;
const ROOT: u32 = 0;
/// As much as is read, in bytes: thousands of client tokens.
const LARGEST: u64 = 1 << 20;

/// The content of a file.
#[derive(Debug)]
pub struct SecretFile {
    /// All of it, as text.
    pub text: Zeroizing<String>,
    /// Whether every user of this machine can read it.
    pub exposed: bool,
}

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Others may write it.
    #[error("others can write it (mode {0:03o}): chmod 600")]
    Writable(u32),
    /// It is somebody else's.
    #[error("it belongs to user {0}, who is neither this process's user nor root")]
    Foreign(u32),
}

/// Reads a file after looking at who may write it.
///
/// # Errors
///
/// [`SecretFileError`], none of which shows the content.
pub fn read(path: &Path) -> Result<SecretFile, SecretFileError> {
    // A named pipe that nobody writes to would keep us here for ever; so it is empty.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    fcntl_setfl(&file, OFlags::empty()).map_err(io::Error::from)?;
    // Of the open file: the path may lead elsewhere a moment later.
    let metadata = file.metadata()?;
    let mode = metadata.mode() & 0o777;
    if mode & WRITTEN_BY_OTHERS != 0 {
        return Err(SecretFileError::Writable(mode));
    }
    let owner = metadata.uid();
    if ![ROOT, rustix::process::geteuid().as_raw()].contains(&owner) {
        return Err(SecretFileError::Foreign(owner));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(LARGEST).read_to_string(&mut text)?;
    Ok(SecretFile {
        text,
        exposed: mode & READ_BY_OTHERS != 0,
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_pipe_that_nobody_writes_to_is_empty() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(*read(&pipe).unwrap().text, "");
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
                0o620,
                Err("others can write it (mode 620): chmod 600".to_owned()),
            ),
            (
                0o602,
                Err("others can write it (mode 602): chmod 600".to_owned()),
            ),
        ] {
            set_permissions(&file, Permissions::from_mode(mode)).unwrap();
            let read = read(file.path())
                .map(|file| file.exposed)
                .map_err(|e| e.to_string());
            assert_eq!(read, outcome, "{mode:o}");
        }
    }
}

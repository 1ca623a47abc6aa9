//! The place of the task store: reads `state.url`, and opens what it names.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::OFlags;
use rustix::process::geteuid;

use super::record::TaskRef;
use super::sqlite::Sqlite;
use super::store::{Store, StoreError};
use crate::clock::{Clock, SystemClock};
use crate::environment::Environment;

/// The value of `state.url`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateUrl {
    /// A file in the state folder of this user, or memory if there can be none.
    Auto,
    /// The memory of this process.
    Memory,
    /// This SQLite file.
    File(PathBuf),
}

/// A store that was opened.
pub struct OpenedStore {
    pub store: Box<dyn Store>,
    /// The file; `None` for memory.
    pub file: Option<PathBuf>,
    /// Reason for which the store is not the one that was wanted.
    pub warning: Option<String>,
}

/// Error for a text that names no store.
#[derive(Debug, thiserror::Error)]
pub enum NoStateUrl {
    #[error("want \"auto\", \"memory\" or \"sqlite:FILE\"")]
    Form,
    #[error("PostgreSQL is not supported yet: use \"auto\" or \"sqlite:FILE\"")]
    PostgreSql,
}

/// Permissions of other users than the owner.
const OTHERS: u32 = 0o077;
/// Name of the file in the state folder.
const FILE: &str = "tasks.db";
/// Name of our folder among those of other programs.
const FOLDER: &str = "kling-proxy";
/// Endings of the files that SQLite keeps, or looks for, beside the store.
const BESIDE: [&str; 3] = ["-wal", "-shm", "-journal"];
/// The guarantees that need a file.
const LOST_GUARANTEES: &str =
    "tasks are in memory only: a restart forgets them, and other processes do not see them";

impl FromStr for StateUrl {
    type Err = NoStateUrl;

    fn from_str(text: &str) -> Result<Self, NoStateUrl> {
        match text {
            "auto" => Ok(Self::Auto),
            "memory" => Ok(Self::Memory),
            _ => match text.split_once(':') {
                Some(("sqlite", file)) if !file.is_empty() => Ok(Self::File(file.into())),
                Some(("postgres" | "postgresql", _)) => Err(NoStateUrl::PostgreSql),
                _ => Err(NoStateUrl::Form),
            },
        }
    }
}

// === impl StateUrl ===

impl StateUrl {
    /// Keeps tasks in memory, unless the settings name a store. For the sandbox, and for one command.
    pub fn prefer_memory(&mut self) {
        if *self == Self::Auto {
            *self = Self::Memory;
        }
    }
}

/// Opens the store that `url` names, and makes it if there is none.
///
/// With [`StateUrl::Auto`], a store in memory takes the place of a file that cannot be used, with a warning.
///
/// # Errors
///
/// A file that was named cannot be opened, is damaged, is too new, or belongs to somebody else.
pub fn open(url: &StateUrl, environment: &Environment) -> Result<OpenedStore, StoreError> {
    // The owner of creates: a name that no other process has.
    let owner = TaskRef::random().as_str().to_owned();
    match url {
        StateUrl::Memory => in_memory(owner, None),
        StateUrl::File(file) => open_file(file, owner),
        StateUrl::Auto => {
            let mut reasons = Vec::new();
            for folder in folders(environment) {
                let file = folder.join(FILE);
                let opened = make_own_folder(&folder).and_then(|()| {
                    refuse_network(&folder)?;
                    open_file(&file, owner.clone())
                });
                match opened {
                    Ok(opened) => return Ok(opened),
                    Err(error) => {
                        let is_final = error.is_about_the_file();
                        reasons.push(error.to_string());
                        if is_final {
                            break;
                        }
                    }
                }
            }
            let reasons = match reasons.as_slice() {
                [] => "neither STATE_DIRECTORY, XDG_STATE_HOME nor HOME is set".to_owned(),
                reasons => reasons.join("; "),
            };
            in_memory(owner, Some(format!("{LOST_GUARANTEES}. {reasons}")))
        }
    }
}

/// Returns the file that [`open`] would use, if it is there already.
pub fn existing_file(url: &StateUrl, environment: &Environment) -> Option<PathBuf> {
    match url {
        StateUrl::Memory => None,
        StateUrl::File(file) => file.exists().then(|| file.clone()),
        StateUrl::Auto => {
            let files = folders(environment)
                .into_iter()
                .map(|folder| folder.join(FILE));
            files.into_iter().find(|file| file.exists())
        }
    }
}

fn in_memory(owner: String, warning: Option<String>) -> Result<OpenedStore, StoreError> {
    Ok(OpenedStore {
        store: Box::new(Sqlite::in_memory(owner, SystemClock.now())?),
        file: None,
        warning,
    })
}

/// Returns the folders that may hold the store, the preferred one first.
fn folders(environment: &Environment) -> Vec<PathBuf> {
    let path = |name| environment.get(name).map(PathBuf::from);
    // systemd separates several folders by colons.
    let service = environment.get("STATE_DIRECTORY").and_then(|folders| {
        let first = folders.to_str()?.split(':').next()?;
        Some(PathBuf::from(first))
    });
    let state = path("XDG_STATE_HOME").map(|state| state.join(FOLDER));
    let home = path("HOME").map(|home| {
        if cfg!(target_os = "macos") {
            home.join("Library/Application Support").join(FOLDER)
        } else {
            home.join(".local/state").join(FOLDER)
        }
    });
    // A relative path would name another folder in each working directory.
    let folders = [service, state, home].into_iter().flatten();
    folders.filter(|folder| folder.is_absolute()).collect()
}

/// Makes the folder of the store, and closes it to other users.
fn make_own_folder(folder: &Path) -> Result<(), StoreError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| closed(folder, &error))?;
    let metadata = fs::metadata(folder).map_err(|error| closed(folder, &error))?;
    if metadata.uid() == geteuid().as_raw() && metadata.mode() & OTHERS != 0 {
        let ours_alone = Permissions::from_mode(0o700);
        fs::set_permissions(folder, ours_alone).map_err(|error| closed(folder, &error))?;
    }
    Ok(())
}

/// Refuses a folder of another machine: the processes that use a file there share no memory, which a
/// write-ahead log needs.
fn refuse_network(folder: &Path) -> Result<(), StoreError> {
    if is_on_network(folder).map_err(|error| closed(folder, &error))? {
        let place = folder.display();
        return Err(StoreError::Untrusted(format!(
            "{place} is on a network file system"
        )));
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn is_on_network(folder: &Path) -> io::Result<bool> {
    /// Numbers of NFS, SMB, CIFS, SMB2, 9P, Ceph, AFS and Lustre (`statfs(2)`).
    const NETWORK: [i64; 8] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x0bd0_0bd0,
    ];
    let kind = rustix::fs::statfs(folder)?.f_type & 0xffff_ffff;
    Ok(NETWORK.contains(&kind))
}

/// Other systems do not tell the kind of a file system in one way.
#[cfg(not(target_os = "linux"))]
#[expect(clippy::unnecessary_wraps, reason = "fails on Linux")]
fn is_on_network(_: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Opens an SQLite file, and makes it and its folder if they are missing.
fn open_file(file: &Path, owner: String) -> Result<OpenedStore, StoreError> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| closed(folder, &error))?;
    // SQLite follows no link in the whole path, so links in the folder are resolved here.
    let folder = folder
        .canonicalize()
        .map_err(|error| closed(folder, &error))?;
    check_folder(&folder)?;
    let name = file.file_name().unwrap_or(file.as_os_str());
    let file = folder.join(name);
    check_file(&file, true)?;
    for ending in BESIDE {
        let mut beside = file.clone().into_os_string();
        beside.push(ending);
        check_file(Path::new(&beside), false)?;
    }
    Ok(OpenedStore {
        store: Box::new(Sqlite::open(&file, owner)?),
        file: Some(file),
        warning: None,
    })
}

/// Refuses a folder of another user, who could put another file in the place of the store.
fn check_folder(folder: &Path) -> Result<(), StoreError> {
    let metadata = fs::metadata(folder).map_err(|error| closed(folder, &error))?;
    let owner = metadata.uid();
    if owner == geteuid().as_raw() || owner == 0 {
        return Ok(());
    }
    let place = folder.display();
    Err(StoreError::Untrusted(format!(
        "{place} belongs to user {owner}"
    )))
}

/// Closes a file of the store to other users. Refuses a link, and a file of another user. With `make`, makes
/// the file if it is missing.
fn check_file(path: &Path, make: bool) -> Result<(), StoreError> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(make)
        .truncate(false)
        .mode(0o600)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !make => return Ok(()),
        Err(error) => return Err(closed(path, &error)),
    };
    let metadata = file.metadata().map_err(|error| closed(path, &error))?;
    let refuse = |reason: &str| {
        let place = path.display();
        Err(StoreError::Untrusted(format!("{place} {reason}")))
    };
    if !metadata.is_file() {
        return refuse("is not a regular file");
    }
    if metadata.uid() != geteuid().as_raw() {
        return refuse(&format!("belongs to user {}", metadata.uid()));
    }
    if metadata.nlink() > 1 {
        return refuse("has a second name (hard link)");
    }
    close_to_others(&file, &metadata).map_err(|error| closed(path, &error))
}

fn close_to_others(file: &File, metadata: &Metadata) -> io::Result<()> {
    if metadata.mode() & OTHERS == 0 {
        return Ok(());
    }
    file.set_permissions(Permissions::from_mode(0o600))
}

fn closed(place: &Path, error: &io::Error) -> StoreError {
    StoreError::Closed {
        place: place.display().to_string(),
        cause: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::tasks::store::ListQuery;

    fn environment(pairs: &[(&str, &Path)]) -> Environment {
        let pairs = pairs.iter().map(|(name, value)| (*name, value.as_os_str()));
        pairs.collect()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn value_of_the_setting_is_read() {
        for (text, url) in [
            ("auto", Some(StateUrl::Auto)),
            ("memory", Some(StateUrl::Memory)),
            (
                "sqlite:/var/lib/x.db",
                Some(StateUrl::File("/var/lib/x.db".into())),
            ),
            ("sqlite:x.db", Some(StateUrl::File("x.db".into()))),
            ("sqlite:", None),
            ("postgres://h/d", None),
            ("file", None),
            ("", None),
        ] {
            assert_eq!(text.parse::<StateUrl>().ok(), url, "{text}");
        }
    }

    #[test]
    fn file_is_in_the_first_folder_that_can_be_written() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let not_a_folder = home.join("file");
        fs::write(&not_a_folder, "").unwrap();
        let state = home.join("state");
        for (pairs, file) in [
            (vec![("HOME", &*home)], ".local/state/kling-proxy/tasks.db"),
            (
                vec![("HOME", &*home), ("XDG_STATE_HOME", &*state)],
                "state/kling-proxy/tasks.db",
            ),
            (
                vec![("XDG_STATE_HOME", &*home), ("STATE_DIRECTORY", &*state)],
                "state/tasks.db",
            ),
            (
                vec![
                    ("XDG_STATE_HOME", &*home),
                    ("STATE_DIRECTORY", &*not_a_folder),
                ],
                "kling-proxy/tasks.db",
            ),
            (
                vec![("HOME", &*home), ("XDG_STATE_HOME", Path::new("relative"))],
                ".local/state/kling-proxy/tasks.db",
            ),
        ] {
            let environment = environment(&pairs);
            let opened = open(&StateUrl::Auto, &environment).unwrap();
            let file = home.join(file);
            assert_eq!(opened.file.as_deref(), Some(&*file), "{pairs:?}");
            assert_eq!(opened.warning, None);
            assert_eq!(
                existing_file(&StateUrl::Auto, &environment),
                Some(file.clone())
            );
            assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));
            let mut wal = file.into_os_string();
            wal.push("-wal");
            assert_eq!(mode(Path::new(&wal)), 0o600);
        }
    }

    #[test]
    fn memory_takes_the_place_of_a_file_that_cannot_be_used() {
        let none = open(&StateUrl::Auto, &environment(&[])).unwrap();
        assert_eq!(none.file, None);
        assert!(none.warning.unwrap().contains("HOME is set"));

        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let environment = environment(&[("STATE_DIRECTORY", &state), ("HOME", folder.path())]);
        fs::create_dir(&state).unwrap();
        fs::write(
            state.join(FILE),
            "this is a text and no SQLite file, to be sure",
        )
        .unwrap();
        let mut broken = open(&StateUrl::Auto, &environment).unwrap();
        assert_eq!(broken.file, None);
        assert!(broken.warning.unwrap().contains("damaged"));
        let page = broken.store.list(&ListQuery {
            limit: 1,
            ..ListQuery::default()
        });
        assert!(page.unwrap().tasks.is_empty());
        // The same file, named, is an error.
        let named = StateUrl::File(state.join(FILE));
        assert!(open(&named, &environment).is_err());
    }

    #[test]
    fn file_that_others_could_read_or_replace_is_closed_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let none = environment(&[]);
        let open = |name: &str| {
            let opened = open(&StateUrl::File(folder.path().join(name)), &none);
            opened
                .map(|opened| opened.file)
                .map_err(|error| error.to_string())
        };
        let [readable, linked, target] =
            ["readable", "linked", "target"].map(|n| folder.path().join(n));
        fs::write(&readable, "").unwrap();
        fs::set_permissions(&readable, Permissions::from_mode(0o666)).unwrap();
        open("readable").unwrap();
        assert_eq!(mode(&readable), 0o600);

        fs::write(&target, "").unwrap();
        symlink(&target, &linked).unwrap();
        assert!(open("linked").unwrap_err().contains("cannot be opened"));
        fs::remove_file(&linked).unwrap();
        fs::hard_link(&target, &linked).unwrap();
        assert!(open("linked").unwrap_err().contains("second name"));
        fs::remove_file(&linked).unwrap();

        symlink(&readable, folder.path().join("target-wal")).unwrap();
        assert!(
            open("target")
                .unwrap_err()
                .contains("target-wal cannot be opened")
        );
        assert!(open("new/folder/x.db").is_ok());
        assert_eq!(mode(&folder.path().join("new")), 0o700);
    }
}

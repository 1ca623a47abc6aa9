//! Files that choose upstream, trust roots, clients or a command: none is used that others could have
//! written.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::{PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    process,
};

use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    process::geteuid,
};

use crate::support::{
    ACCESS_KEY, Command, Proxy, Root, SECRET_KEY, Signal, Upstream, assert_has, in_namespace,
};

/// A file that decides something.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Settings,
    TrustRoot,
    ClientTokens,
    SecretKey,
}

/// Something that others could have done to a file: what, how, and how it is told.
type Attack = (&'static str, fn(&Path), &'static str);

const KINDS: [Kind; 4] = [
    Kind::Settings,
    Kind::TrustRoot,
    Kind::ClientTokens,
    Kind::SecretKey,
];

const ATTACKS: [Attack; 8] = [
    (
        "all can write it",
        |file| chmod(file, 0o666),
        "others can write it (mode 666)",
    ),
    (
        "strangers of a group can write it",
        |file| {
            chown(file, None, Some(12345)).unwrap();
            chmod(file, 0o664);
        },
        "others can write it (mode 664)",
    ),
    (
        "all can write its folder",
        |file| chmod(folder(file), 0o777),
        "others can write its folder",
    ),
    (
        "all can write the folder of what it links to",
        |file| {
            let other = folder(file).join("other");
            fs::create_dir(&other).unwrap();
            chmod(&other, 0o777);
            fs::rename(file, other.join("file")).unwrap();
            symlink("other/file", file).unwrap();
        },
        "others can write its folder",
    ),
    (
        "it is a pipe",
        |file| {
            fs::remove_file(file).unwrap();
            mknodat(CWD, file, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        },
        "it is not a regular file",
    ),
    (
        "it is a folder",
        |file| {
            fs::remove_file(file).unwrap();
            fs::create_dir(file).unwrap();
        },
        "it is not a regular file",
    ),
    (
        "it is too large",
        |file| {
            // White space, which all of them may end with: cut off there it would look whole.
            let text = fs::read_to_string(file).unwrap() + &"\n".repeat(1 << 20);
            fs::write(file, text).unwrap();
        },
        "it is larger than 1 MiB",
    ),
    (
        "it is a link to a device",
        |file| {
            fs::remove_file(file).unwrap();
            symlink("/dev/zero", file).unwrap();
        },
        "it is not a regular file",
    ),
];

/// What only root can do.
const ATTACKS_BY_ROOT: [Attack; 3] = [
    (
        "it is somebody else's",
        |file| chown(file, Some(12345), None).unwrap(),
        "it belongs to user 12345",
    ),
    (
        "its folder is somebody else's",
        |file| chown(folder(file), Some(12345), None).unwrap(),
        "its folder belongs to user 12345",
    ),
    (
        "its folder is one that strangers of a group can write",
        |file| {
            chown(folder(file), None, Some(12345)).unwrap();
            chmod(folder(file), 0o775);
        },
        "others can write its folder",
    ),
];

// === impl Kind ===

impl Kind {
    /// A good one, and the command that uses it.
    fn of(self, command: Command) -> (PathBuf, Command) {
        let content = match self {
            // It prints no credential, but leaves a trace.
            Self::Settings => {
                let trace = trace(&command);
                let trace = trace.display();
                format!("[credentials]\ncommand = [\"/usr/bin/touch\", \"{trace}\"]\n")
            }
            Self::TrustRoot => Root::new().pem(),
            Self::ClientTokens => "first-token-01234\n".to_owned(),
            Self::SecretKey => SECRET_KEY.to_owned(),
        };
        let file = command.file("folder/file", &content);
        chmod(&file, 0o600);
        let command = self.named(command, &file);
        (file, command)
    }

    /// A command that is told of a file.
    fn named(self, command: Command, file: &Path) -> Command {
        let path = file.to_str().unwrap();
        match self {
            Self::Settings => command.env("KLING_PROXY_CONFIG", path),
            Self::TrustRoot => command.keys().setting("upstream.ca_file", path),
            Self::ClientTokens => command.keys().setting("access.client_tokens_file", path),
            Self::SecretKey => command
                .env("KLING_ACCESS_KEY", ACCESS_KEY)
                .env("KLING_SECRET_KEY_FILE", path),
        }
    }
}

fn folder(file: &Path) -> &Path {
    file.parent().unwrap()
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// What the command of the settings file leaves behind.
fn trace(command: &Command) -> PathBuf {
    command.home().join("ran")
}

fn attacks() -> impl Iterator<Item = Attack> {
    let by_root = geteuid().is_root().then_some(ATTACKS_BY_ROOT);
    ATTACKS.into_iter().chain(by_root.into_iter().flatten())
}

/// R31.
#[test]
fn file_that_others_could_have_written_is_not_used() {
    for kind in KINDS {
        for (what, attack, told) in attacks() {
            let (file, command) = kind.of(Command::new([]));
            let trace = trace(&command);
            attack(&file);
            let finished = command.run();
            let what = format!("{kind:?}: {what}");
            assert_eq!(finished.code, Some(78), "{what}: {finished:?}");
            assert_has(&finished.stderr, &[file.to_str().unwrap(), told]);
            assert!(!trace.exists(), "{what}: its command ran");
        }
    }
}

/// R31.
#[test]
fn check_runs_no_command_of_a_settings_file_that_others_could_have_written() {
    for (what, attack, told) in attacks() {
        for arguments in [["check", "--offline"], ["check", "--output=json"]] {
            let (file, command) = Kind::Settings.of(Command::new(arguments));
            let trace = trace(&command);
            attack(&file);
            let finished = command.run();
            assert_eq!(finished.code, Some(78), "{what}: {finished:?}");
            assert_has(&format!("{finished:?}"), &[told]);
            assert!(!trace.exists(), "{what}: its command ran");
        }
    }
}

/// R31, later.
#[test]
fn settings_that_others_could_have_written_are_not_taken_over() {
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let trace = trace(&command);
    let file = command.file("folder/settings.toml", "");
    let proxy = command
        .env("KLING_PROXY_CONFIG", file.to_str().unwrap())
        .start();
    fs::write(&file, "[access]\nallowed_methods = [\"GET\"]\n").unwrap();
    chmod(folder(&file), 0o777);
    proxy.signal(Signal::HUP);
    let kept = |line: &str| {
        ["WARN", "others can write its folder", "keeping the old"]
            .iter()
            .all(|part| line.contains(part))
    };
    assert!(proxy.stderr.find(kept).is_some());
    assert_eq!(proxy.post("/v1/x", "{}").status(), 200);
    assert!(!trace.exists());
}

/// A place where files of that kind are, which is as good as a folder of our own.
fn mounted_as_kubernetes_does(command: &Command, content: &str, mode: u32) -> PathBuf {
    let folder = command.home().join("mounted");
    let file = command.file("mounted/..2026_12_01/file", content);
    chmod(&file, 0o644);
    symlink("..2026_12_01", folder.join("..data")).unwrap();
    symlink("..data/file", folder.join("file")).unwrap();
    chmod(&folder, mode);
    folder.join("file")
}

/// A Secret in memory is mounted so, and others can write `/tmp` too.
#[test]
fn file_of_ours_in_a_sticky_folder_is_used() {
    let upstream = Upstream::ok();
    for mode in [0o1777, 0o3777] {
        let command = Proxy::to(&upstream);
        let content = "[access]\nallowed_methods = [\"GET\"]\n";
        let settings = mounted_as_kubernetes_does(&command, content, mode);
        let tokens = command.file("mounted/tokens", "first-token-01234\n");
        let proxy = command
            .env("KLING_PROXY_CONFIG", settings.to_str().unwrap())
            .setting("access.client_tokens_file", tokens.to_str().unwrap())
            .start();
        assert_eq!(proxy.post("/v1/x", "{}").refusal(), (405, 9005));
        assert_eq!(proxy.get("/v1/x").refusal(), (401, 9003));
    }
}

/// R31: in a sticky folder others can make a link before us, which leads to a file of ours.
#[test]
fn link_of_somebody_else_is_not_followed() {
    // Only root can give a link away.
    if !geteuid().is_root() {
        return;
    }
    let (file, command) = Kind::Settings.of(Command::new([]));
    let trace = trace(&command);
    let link = command.home().join("shared/link");
    fs::create_dir(folder(&link)).unwrap();
    chmod(folder(&link), 0o1777);
    symlink(&file, &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(12345), None).unwrap();
    let finished = Kind::Settings.named(command, &link).run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(&finished.stderr, &["it belongs to user 12345"]);
    assert!(!trace.exists());
}

/// A `ConfigMap` is mounted so: all could write its folder, if it were not mounted read-only.
#[test]
fn file_that_is_mounted_read_only_is_used() {
    let test = "trusted_files::file_that_is_mounted_read_only_is_used";
    if in_namespace(test, "127.0.0.1 localhost\n") {
        return;
    }
    let mount = |arguments: &[&str], folder: &Path| {
        let mut mount = process::Command::new("mount");
        let status = mount.args(arguments).arg(folder).status().unwrap();
        assert!(status.success());
    };
    let upstream = Upstream::ok();
    let command = Proxy::to(&upstream);
    let folder = command.home().join("mounted");
    fs::create_dir(&folder).unwrap();
    mount(&["-t", "tmpfs", "tmpfs"], &folder);
    let content = "[access]\nallowed_methods = [\"GET\"]\n";
    let settings = mounted_as_kubernetes_does(&command, content, 0o777);
    mount(&["-o", "remount,ro"], &folder);
    assert!(File::create(folder.join("new")).is_err(), "it is read-only");
    let proxy = command
        .env("KLING_PROXY_CONFIG", settings.to_str().unwrap())
        .start();
    assert_eq!(proxy.post("/v1/x", "{}").refusal(), (405, 9005));
}

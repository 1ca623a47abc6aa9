//! A key pair in files that can be replaced.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use super::{Command, Credential, Message, Proxy, Upstream, claims};

/// Methods to replace the files of a pair.
#[derive(Clone, Copy, Debug)]
pub enum Way {
    /// Each file is replaced by a rename.
    Rename,
    /// Both files are replaced at once, by a link to their folder, as in Kubernetes.
    Swap,
}

/// Folder with the files of a pair.
pub struct KeyFiles {
    folder: PathBuf,
    way: Way,
}

const NAMES: [&str; 2] = ["access_key", "secret_key"];

/// Returns the pair of a generation.
pub fn keys(generation: usize) -> [&'static str; 2] {
    ["access", "secret"].map(|half| &*format!("{half}-key-{generation}").leak())
}

pub fn pair(generation: usize) -> Credential {
    let [access_key, secret_key] = keys(generation);
    Credential::Pair(access_key, secret_key)
}

/// Returns true if a request was signed with the access key of a generation.
pub fn shows(request: &Message, generation: usize) -> bool {
    let authorization = request.header("authorization").unwrap();
    claims(authorization)["iss"] == keys(generation)[0]
}

// === impl KeyFiles ===

impl KeyFiles {
    /// Writes the files of generation 0, and starts a proxy that reads them.
    pub fn start(way: Way, upstream: &Upstream) -> (Self, Proxy) {
        let (files, command) = Self::of(way, Command::new([]).upstream(upstream));
        (files, command.start())
    }

    /// Writes the files of generation 0, and adds them to the command.
    pub fn of(way: Way, command: Command) -> (Self, Command) {
        let folder = command.home().join("keys");
        fs::create_dir(&folder).unwrap();
        let files = Self { folder, way };
        files.write(0);
        if let Way::Swap = way {
            for name in NAMES {
                symlink(format!("..data/{name}"), files.folder.join(name)).unwrap();
            }
        }
        let [access_key, secret_key] = NAMES.map(|name| files.folder.join(name));
        let command = command
            .env("KLING_ACCESS_KEY_FILE", access_key.to_str().unwrap())
            .env("KLING_SECRET_KEY_FILE", secret_key.to_str().unwrap());
        (files, command)
    }

    pub fn write(&self, generation: usize) {
        match self.way {
            Way::Rename => (0..2).for_each(|half| self.write_half(half, generation)),
            Way::Swap => {
                let folder = format!("..{generation}");
                fs::create_dir(self.folder.join(&folder)).unwrap();
                for (name, key) in NAMES.into_iter().zip(keys(generation)) {
                    fs::write(self.folder.join(&folder).join(name), key).unwrap();
                }
                let link = self.folder.join("..data_tmp");
                symlink(folder, &link).unwrap();
                fs::rename(link, self.folder.join("..data")).unwrap();
            }
        }
    }

    /// Replaces one of the two files.
    pub fn write_half(&self, half: usize, generation: usize) {
        let new = self.folder.join("new");
        fs::write(&new, keys(generation)[half]).unwrap();
        fs::rename(new, self.folder.join(NAMES[half])).unwrap();
    }
}

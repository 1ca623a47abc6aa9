//! Finds the credential for upstream. The first place that has a key wins; a place that has only half a key
//! pair is an error.

mod command;
mod environment;

use std::path::{Path, PathBuf};
use std::{fs, io};

pub use self::command::{CommandError, CredentialCommand};
pub use self::environment::without_secrets;
use crate::auth::secret::Secret;
use crate::auth::token::Credential;
use crate::auth::trusted_file::{self, TrustedFileError};
use crate::environment::Environment;

/// Section `credentials` of the settings.
#[derive(Clone, Debug, Default)]
pub struct Configured {
    pub access_key: Option<Secret>,
    pub secret_key: Option<Secret>,
    /// File that contains the AccessKey.
    pub access_key_file: Option<PathBuf>,
    /// File that contains the SecretKey.
    pub secret_key_file: Option<PathBuf>,
    /// File that contains an API key.
    pub api_key_file: Option<PathBuf>,
    /// Command that prints a credential, as program and arguments; empty if no command is set.
    pub command: Vec<String>,
}

/// Places in which a credential is looked for.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// Variables of the process, as they were at its start.
    pub environment: &'a Environment,
    /// Settings, which are searched after the environment.
    pub configured: &'a Configured,
}

/// Credential with the place in which it was found.
#[derive(Debug)]
pub struct Found {
    pub credential: Credential,
    /// Names of the variables, files or settings that the credential came from.
    pub source: String,
    /// Warnings to show to the user, such as a file that others can read.
    pub warnings: Vec<String>,
}

/// Reason why no credential can be used. Its text contains no part of a key.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place has a credential.
    #[error(
        "no credential: set KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY \
         (or name files: KLING_API_KEY_FILE, KLING_ACCESS_KEY_FILE, KLING_SECRET_KEY_FILE)"
    )]
    Missing,
    /// Only one half of a key pair is set.
    #[error("half a credential: {found} is set, {missing} is not")]
    Half {
        /// Place that has the one half.
        found: String,
        /// Variable or setting that is missing.
        missing: String,
    },
    /// A file, or the folder of the service manager's credentials, cannot be read.
    #[error("cannot read {place} ({})", .path.display())]
    Unreadable {
        /// What names the file or folder.
        place: String,
        /// The file or folder.
        path: PathBuf,
        #[source]
        cause: TrustedFileError,
    },
    /// The command failed, or printed no credential.
    #[error("{}", command::PLACE)]
    Command(#[from] CommandError),
    /// A key is empty, or contains characters that no key has.
    #[error("{0} is empty, or not a key: want visible characters only")]
    Malformed(String),
}

/// Half of a key pair, or an API key, with the place in which it was found.
struct Key {
    secret: Secret,
    place: String,
    warning: Option<String>,
}

/// Variables that hold a key, or name its file with the suffix `_FILE`.
const VARIABLES: [&str; 5] = [
    "KLING_API_KEY",
    "KLING_ACCESS_KEY",
    "KLING_SECRET_KEY",
    "KLINGAI_ACCESS_KEY",
    "KLINGAI_SECRET_KEY",
];
/// Variable that names the folder of systemd's `LoadCredential` files.
const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

// === impl Places ===

impl Places<'_> {
    /// Returns the command to run if [`find`](Self::find) finds nothing. It is the last place; `None` if no
    /// command is set.
    pub fn command(&self) -> Option<CredentialCommand<'_>> {
        let words = &self.configured.command[..];
        let environment = self.environment;
        (!words.is_empty()).then_some(CredentialCommand { words, environment })
    }

    /// Returns the names of the places in which a credential is set, without reading a file or running the
    /// command.
    pub fn occupied(&self) -> Vec<String> {
        let variables = VARIABLES.map(|name| [name.to_owned(), format!("{name}_FILE")]);
        let mut places: Vec<_> = variables
            .into_iter()
            .flatten()
            .filter(|name| self.environment.get(name).is_some())
            .collect();
        let folder = self.environment.get(DIRECTORY).map(Path::new);
        for name in ["kling_api_key", "kling_access_key", "kling_secret_key"] {
            if folder.is_some_and(|folder| folder.join(name).exists()) {
                places.push(format!("${DIRECTORY}/{name}"));
            }
        }
        let Configured {
            access_key,
            secret_key,
            access_key_file,
            secret_key_file,
            api_key_file,
            command,
        } = self.configured;
        for (setting, is_set) in [
            ("access_key", access_key.is_some()),
            ("secret_key", secret_key.is_some()),
            ("access_key_file", access_key_file.is_some()),
            ("secret_key_file", secret_key_file.is_some()),
            ("api_key_file", api_key_file.is_some()),
            ("command", !command.is_empty()),
        ] {
            if is_set {
                places.push(format!("credentials.{setting}"));
            }
        }
        places
    }

    /// Looks for a credential in each place except the command, in the order given in docs/configuration.md.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] if no place has a credential; [`Error::Half`], [`Error::Unreadable`] or
    /// [`Error::Malformed`] if a place has one that cannot be used. The text names the variable or setting to
    /// correct.
    pub fn find(&self) -> Result<Found, Error> {
        if let Some(key) = self.variable("KLING_API_KEY")? {
            return api_key(key);
        }
        for [access, secret] in [
            ["KLING_ACCESS_KEY", "KLING_SECRET_KEY"],
            ["KLINGAI_ACCESS_KEY", "KLINGAI_SECRET_KEY"],
        ] {
            let [access_key, secret_key] = [self.variable(access)?, self.variable(secret)?];
            if let Some(found) = pair((access, access_key), (secret, secret_key))? {
                return Ok(found);
            }
        }
        if let Some(key) = self.in_directory("kling_api_key")? {
            return api_key(key);
        }
        let [access, secret] = ["kling_access_key", "kling_secret_key"];
        let [access_key, secret_key] = [self.in_directory(access)?, self.in_directory(secret)?];
        if let Some(found) = pair((access, access_key), (secret, secret_key))? {
            return Ok(found);
        }
        let Configured {
            access_key,
            secret_key,
            access_key_file,
            secret_key_file,
            api_key_file,
            command: _,
        } = self.configured;
        if let Some(path) = api_key_file {
            return api_key(from_file("credentials.api_key_file", path)?);
        }
        let found = pair(
            (
                "credentials.access_key",
                configured(
                    "credentials.access_key",
                    access_key.as_ref(),
                    access_key_file.as_ref(),
                )?,
            ),
            (
                "credentials.secret_key",
                configured(
                    "credentials.secret_key",
                    secret_key.as_ref(),
                    secret_key_file.as_ref(),
                )?,
            ),
        );
        found?.ok_or_else(|| self.missing())
    }

    /// Reads a key from a variable, or from the file that the variable with the suffix `_FILE` names.
    fn variable(&self, name: &str) -> Result<Option<Key>, Error> {
        if let Some(value) = self.environment.get(name) {
            let text = value.to_str().unwrap_or_default();
            return key(name.to_owned(), text).map(Some);
        }
        let file = format!("{name}_FILE");
        self.environment
            .get(&file)
            .map(Path::new)
            .map(|path| from_file(&file, path))
            .transpose()
    }

    /// Reads a key from a file of systemd's `LoadCredential`.
    fn in_directory(&self, name: &str) -> Result<Option<Key>, Error> {
        let Some(folder) = self.environment.get(DIRECTORY).map(Path::new) else {
            return Ok(None);
        };
        let path = folder.join(name);
        match fs::symlink_metadata(&path) {
            Ok(_) => from_file(&format!("${DIRECTORY}/{name}"), &path).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable_folder(folder, error)),
        }
    }

    /// No place has a credential. Says so of the folder if it is not there, unless a command comes next.
    fn missing(&self) -> Error {
        let folder = self.environment.get(DIRECTORY).map(Path::new);
        match folder {
            Some(folder) if self.configured.command.is_empty() => match fs::metadata(folder) {
                Ok(_) => Error::Missing,
                Err(error) => unreadable_folder(folder, error),
            },
            _ => Error::Missing,
        }
    }
}

/// The folder of `LoadCredential` cannot be read.
fn unreadable_folder(folder: &Path, error: io::Error) -> Error {
    Error::Unreadable {
        place: format!("${DIRECTORY}"),
        path: folder.to_owned(),
        cause: error.into(),
    }
}

/// Reads a key from a setting, or from the file that the setting with the suffix `_file` names.
fn configured(
    place: &str,
    value: Option<&Secret>,
    file: Option<&PathBuf>,
) -> Result<Option<Key>, Error> {
    match (value, file) {
        (Some(value), _) => key(place.to_owned(), value.expose()).map(Some),
        (None, Some(path)) => from_file(&format!("{place}_file"), path).map(Some),
        (None, None) => Ok(None),
    }
}

fn from_file(place: &str, path: &Path) -> Result<Key, Error> {
    let unreadable = |cause| Error::Unreadable {
        place: place.to_owned(),
        path: path.to_owned(),
        cause,
    };
    let file = trusted_file::read(path).map_err(unreadable)?;
    let text = file.text().map_err(unreadable)?;
    let warning = format!("{place}: every user can read {}: chmod 600", path.display());
    let key = key(place.to_owned(), text)?;
    Ok(Key {
        warning: file.exposed.then_some(warning),
        ..key
    })
}

/// Checks the text of a key. White space around it is ignored.
fn key(place: String, text: &str) -> Result<Key, Error> {
    let text = text.trim();
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::Malformed(place));
    }
    let secret = Secret::from(text.to_owned());
    Ok(Key {
        secret,
        place,
        warning: None,
    })
}

fn pair(
    (access_name, access): (&str, Option<Key>),
    (secret_name, secret): (&str, Option<Key>),
) -> Result<Option<Found>, Error> {
    match (access, secret) {
        (None, None) => Ok(None),
        (Some(found), None) => Err(Error::Half {
            found: found.place,
            missing: secret_name.to_owned(),
        }),
        (None, Some(found)) => Err(Error::Half {
            found: found.place,
            missing: access_name.to_owned(),
        }),
        (Some(access), Some(secret)) => Ok(Some(Found {
            source: format!("{} and {}", access.place, secret.place),
            warnings: access.warning.into_iter().chain(secret.warning).collect(),
            credential: Credential::Pair {
                access_key: access.secret,
                secret_key: secret.secret,
            },
        })),
    }
}

/// Makes a credential of an API key. `AK:SK` and `AK|SK` are read as a key pair, because some tools write a
/// pair in that form.
fn api_key(key: Key) -> Result<Found, Error> {
    let Key {
        secret,
        place,
        warning,
    } = key;
    let mut warnings = Vec::from_iter(warning);
    let credential = match secret.expose().split_once([':', '|']) {
        Some(("", _) | (_, "")) => return Err(Error::Malformed(place)),
        Some((access, secret)) => {
            warnings.push(format!(
                "{place} was read as access key and secret key: set KLING_ACCESS_KEY and \
                 KLING_SECRET_KEY instead"
            ));
            let [access_key, secret_key] = [access, secret].map(|key| Secret::from(key.to_owned()));
            Credential::Pair {
                access_key,
                secret_key,
            }
        }
        None => Credential::ApiKey(secret),
    };
    Ok(Found {
        credential,
        source: place,
        warnings,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the keys found with their source, or the text of the error.
    fn find(variables: &[(&str, &str)]) -> String {
        let places = Places {
            environment: &variables.iter().copied().collect(),
            configured: &Configured::default(),
        };
        match places.find() {
            Ok(Found {
                credential: Credential::ApiKey(key),
                source,
                ..
            }) => {
                format!("{} from {source}", key.expose())
            }
            Ok(Found {
                credential:
                    Credential::Pair {
                        access_key,
                        secret_key,
                    },
                source,
                ..
            }) => {
                format!(
                    "{}+{} from {source}",
                    access_key.expose(),
                    secret_key.expose()
                )
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_first_place_that_has_a_key_wins() {
        let mut variables = vec![("KLINGAI_ACCESS_KEY", "a2"), ("KLINGAI_SECRET_KEY", "s2")];
        assert_eq!(
            find(&variables),
            "a2+s2 from KLINGAI_ACCESS_KEY and KLINGAI_SECRET_KEY"
        );
        variables.extend([("KLING_ACCESS_KEY", " a1\n"), ("KLING_SECRET_KEY", "s1")]);
        assert_eq!(
            find(&variables),
            "a1+s1 from KLING_ACCESS_KEY and KLING_SECRET_KEY"
        );
        variables.push(("KLING_API_KEY", "k"));
        assert_eq!(find(&variables), "k from KLING_API_KEY");
        // A place after the first that has a key is not read.
        variables.push(("KLINGAI_ACCESS_KEY_FILE", "/does/not/exist"));
        variables.push(("KLING_ACCESS_KEY_FILE", "/does/not/exist"));
        assert_eq!(find(&variables), "k from KLING_API_KEY");
    }

    #[test]
    fn an_api_key_with_a_separator_is_a_pair() {
        for (value, found) in [
            ("AK:SK", "AK+SK from KLING_API_KEY"),
            ("AK|SK", "AK+SK from KLING_API_KEY"),
            (
                ":SK",
                "KLING_API_KEY is empty, or not a key: want visible characters only",
            ),
            (
                "AK|",
                "KLING_API_KEY is empty, or not a key: want visible characters only",
            ),
            (
                "two words",
                "KLING_API_KEY is empty, or not a key: want visible characters only",
            ),
        ] {
            assert_eq!(find(&[("KLING_API_KEY", value)]), found, "{value:?}");
        }
    }

    #[test]
    fn half_a_pair_names_the_other_half() {
        for (name, missing) in [
            ("KLING_ACCESS_KEY", "KLING_SECRET_KEY"),
            ("KLING_SECRET_KEY", "KLING_ACCESS_KEY"),
            ("KLINGAI_SECRET_KEY", "KLINGAI_ACCESS_KEY"),
        ] {
            let told = format!("half a credential: {name} is set, {missing} is not");
            assert_eq!(find(&[(name, "x")]), told);
        }
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        assert!(find(&[("KLING_API_KEY", "")]).starts_with("no credential"));
    }
}

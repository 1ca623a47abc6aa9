//! Where keys come from. The first place that has one wins; half a pair there is an error.

mod command;
mod environment;

use std::path::{Path, PathBuf};

pub use self::command::{CommandError, CredentialCommand};
pub use self::environment::without_secrets;
use crate::auth::secret::Secret;
use crate::auth::token::Credential;
use crate::auth::trusted_file::{self, TrustedFileError};
use crate::environment::Environment;

/// What `credentials.*` of the settings say.
#[derive(Clone, Debug, Default)]
pub struct Configured {
    /// The AccessKey.
    pub access_key: Option<Secret>,
    /// The SecretKey.
    pub secret_key: Option<Secret>,
    /// A file of the AccessKey.
    pub access_key_file: Option<PathBuf>,
    /// A file of the SecretKey.
    pub secret_key_file: Option<PathBuf>,
    /// A file of an API key.
    pub api_key_file: Option<PathBuf>,
    /// A command that prints a credential, in words; none if empty.
    pub command: Vec<String>,
}

/// All places where a credential may be.
#[derive(Clone, Copy)]
pub struct Places<'a> {
    /// The variables of the process, as they were at its start.
    pub environment: &'a Environment,
    /// The lowest place.
    pub configured: &'a Configured,
}

/// A credential and where it was found.
#[derive(Debug)]
pub struct Found {
    /// The credential.
    pub credential: Credential,
    /// The variables, files or keys it came from.
    pub source: String,
    /// What its owner should know.
    pub warnings: Vec<String>,
}

/// Why there is no credential. It shows no part of one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place has one.
    #[error(
        "no credential: set KLING_ACCESS_KEY and KLING_SECRET_KEY, or KLING_API_KEY \
         (or name files: KLING_ACCESS_KEY_FILE, KLING_SECRET_KEY_FILE, KLING_API_KEY_FILE); \
         to try without an account, run `kling-proxy --sandbox`"
    )]
    Missing,
    /// One half of a pair is there.
    #[error("half a credential: {found} is set, {missing} is not")]
    Half {
        /// The half that is there.
        found: String,
        /// What to set.
        missing: String,
    },
    /// A file cannot be read.
    #[error("cannot read {place} ({})", .path.display())]
    Unreadable {
        /// What names the file.
        place: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: TrustedFileError,
    },
    /// The command does not do what it should.
    #[error("{}", command::PLACE)]
    Command(#[from] CommandError),
    /// A key is empty or has characters that no key has.
    #[error("{0} is empty, or not a key: want visible characters only")]
    Malformed(String),
}

/// A key and where it was found.
struct Key {
    secret: Secret,
    place: String,
    warning: Option<String>,
}

/// Where a file of systemd's `LoadCredential` is.
const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

// === impl Places ===

impl Places<'_> {
    /// What to run where [`find`](Self::find) finds nothing: the last place.
    pub fn command(&self) -> Option<CredentialCommand<'_>> {
        let words = &self.configured.command[..];
        let environment = self.environment;
        (!words.is_empty()).then_some(CredentialCommand { words, environment })
    }

    /// Looks for a credential, in the order that docs/configuration.md gives.
    ///
    /// # Errors
    ///
    /// [`Error`] says what to set; [`Error::Missing`] if no place has one.
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
        found?.ok_or(Error::Missing)
    }

    /// A variable, or the file that its `_FILE` twin names.
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

    /// A file of systemd's `LoadCredential`.
    fn in_directory(&self, name: &str) -> Result<Option<Key>, Error> {
        let path = self
            .environment
            .get(DIRECTORY)
            .map(|directory| PathBuf::from(directory).join(name));
        let path = path.filter(|path| path.exists());
        path.map(|path| from_file(&format!("${DIRECTORY}/{name}"), &path))
            .transpose()
    }
}

/// A value of the settings, or the file that they name.
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

/// White space around a key does not count.
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

/// An API key; `AK:SK` and `AK|SK`, as some tools write a pair, are read as one.
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

    /// What is found: the kind, or the error.
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
        // What stands behind the first is not even looked at.
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

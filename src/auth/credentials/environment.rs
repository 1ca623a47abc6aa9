//! Removes our secrets from the environment that is passed to programs which we start.

use std::ffi::{OsStr, OsString};

use crate::environment::Environment;

/// Variables that a service manager sets for this process alone (`systemd.exec(5)`, `sd_listen_fds(3)`,
/// `sd_notify(3)`).
const HANDED_OVER: [&str; 7] = [
    super::DIRECTORY,
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];
/// Prefix of the variables that hold our settings.
const SETTINGS: &str = "KLING_PROXY_";
/// Prefix of all variables about Kling, also of those that other programs read.
const KLING: &str = "KLING";
/// Parts of such a name that mark a secret at any position: `KLINGSECRET` counts like `KLING_SECRET`.
const SECRETIVE: [&str; 12] = [
    "AUTH", "BEARER", "COOKIE", "CRED", "JWT", "KEY", "PASS", "PRIVATE", "PWD", "SECRET",
    "SESSION", "TOKEN",
];
/// Parts that mark a secret only as a whole word, because they are short: `KLING_PATH` is no secret, although
/// it contains `PAT`.
const SECRETIVE_WORDS: [&str; 5] = ["AK", "AKSK", "PAT", "PW", "SK"];
/// Words of video makers that contain `KEY` and do not mark a secret.
const HARMLESS: [&str; 2] = ["KEYFRAME", "KEYWORD"];

/// Returns the variables without our settings, and without those that hold a secret of ours or name a file
/// of one.
pub fn without_secrets(environment: &Environment) -> impl Iterator<Item = &(OsString, OsString)> {
    environment.variables().filter(|(name, _)| !is_ours(name))
}

fn is_ours(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_ascii_uppercase();
    HANDED_OVER.contains(&&*name)
        || name.starts_with(SETTINGS)
        || name.strip_prefix(KLING).is_some_and(is_secretive)
}

/// Returns true if a name marks a secret or a file. `rest` is the part of the name after `KLING`.
fn is_secretive(rest: &str) -> bool {
    let rest = rest.strip_prefix("AI").unwrap_or(rest);
    let mut words = rest.split(|c: char| !c.is_ascii_alphabetic());
    let plain = HARMLESS
        .iter()
        .fold(rest.to_owned(), |rest, word| rest.replace(word, ""));
    rest.ends_with("_FILE")
        || words.any(|word| SECRETIVE_WORDS.contains(&word))
        || SECRETIVE.iter().any(|part| plain.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ours_or_speaks_of_a_secret_stays_here() {
        for (name, ours) in [
            ("KLING_API_KEY", true),
            ("KLINGAI_SECRET_KEY", true),
            ("KLING_ACCESS_KEY_FILE", true),
            ("kling_secret_key", true),
            ("KLING_APIKEY", true),
            ("KLING_SK", true),
            ("KLING_JWT_TOKEN", true),
            ("KLING_TOKEN", true),
            ("KLING_PAT", true),
            ("kling_pat", true),
            ("KLINGPAT", true),
            ("KLINGAISK", true),
            ("KLING_SK2", true),
            ("KLINGSECRET", true),
            ("Kling_Token", true),
            ("KLINGAPIKEY", true),
            ("KLING_KEYS", true),
            ("KLING_KEY_2", true),
            ("KLING_ACCESSKEYID", true),
            ("KLING_PASSPHRASE", true),
            ("KLING-PWD", true),
            ("KLING_CREDS", true),
            ("KLING_OAUTH", true),
            ("KLING_KEYFRAMES_TOKEN", true),
            ("KLING_PROXY_credentials__secret_key", true),
            ("KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE", true),
            ("KLING_PROXY_LISTEN__ADDRESS", true),
            ("CREDENTIALS_DIRECTORY", true),
            ("LISTEN_FDS", true),
            ("NOTIFY_SOCKET", true),
            ("KLING_MODEL", false),
            ("KLING_KEYFRAMES", false),
            ("KLING_NEGATIVE_KEYWORDS", false),
            ("KLING_BASE_URL", false),
            ("KLINGAI_BASE_URL", false),
            ("KLING_PATH", false),
            ("KLING_TASK", false),
            ("KLINGON_PATTERN", false),
            ("LISTEN_ADDRESS", false),
            ("VAULT_TOKEN", false),
            ("AWS_SHARED_CREDENTIALS_FILE", false),
            ("PATH", false),
        ] {
            assert_eq!(is_ours(name.as_ref()), ours, "{name}");
        }
    }
}

//! What programs that we start see of our environment.

use std::ffi::{OsStr, OsString};

/// What a service manager hands to us alone (`systemd.exec(5)`, `sd_listen_fds(3)`, `sd_notify(3)`).
const HANDED_OVER: [&str; 7] = [
    super::DIRECTORY,
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
];
/// What the names of our settings begin with.
const SETTINGS: &str = "KLING_PROXY_";
/// What the names of variables about Kling begin with, whoever reads them.
const KLING: &str = "KLING";
/// A word in such a name that speaks of a secret; so does one that ends with `KEY`.
const SECRETIVE: [&str; 11] = [
    "AK",
    "AUTH",
    "AUTHORIZATION",
    "BEARER",
    "CREDENTIAL",
    "CREDENTIALS",
    "JWT",
    "PASSWORD",
    "SECRET",
    "SK",
    "TOKEN",
];

/// The variables without our settings, and without those that hold or lead to a secret of ours.
pub fn harmless(
    environment: &[(OsString, OsString)],
) -> impl Iterator<Item = &(OsString, OsString)> {
    environment.iter().filter(|(name, _)| !is_ours(name))
}

fn is_ours(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_ascii_uppercase();
    let secretive = |word: &str| word.ends_with("KEY") || SECRETIVE.contains(&word);
    let secret = || name.ends_with("_FILE") || name.split('_').any(secretive);
    HANDED_OVER.contains(&&*name)
        || name.starts_with(SETTINGS)
        || name.starts_with(KLING) && secret()
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
            ("KLING_PROXY_credentials__secret_key", true),
            ("KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE", true),
            ("KLING_PROXY_LISTEN__ADDRESS", true),
            ("CREDENTIALS_DIRECTORY", true),
            ("LISTEN_FDS", true),
            ("NOTIFY_SOCKET", true),
            ("KLING_MODEL", false),
            ("KLING_KEYFRAMES", false),
            ("LISTEN_ADDRESS", false),
            ("VAULT_TOKEN", false),
            ("AWS_SHARED_CREDENTIALS_FILE", false),
            ("PATH", false),
        ] {
            assert_eq!(is_ours(name.as_ref()), ours, "{name}");
        }
    }
}

//! Runs a test in network and mount namespaces of its own (namespaces(7)).

use std::{env, fs, process::Command};

use rustix::process::geteuid;

/// Set inside.
const INSIDE: &str = "BLACK_BOX_NAMESPACE";

/// Runs the named test again, in namespaces of its own in which only these names have addresses, and fails
/// if it does. Returns true once that is done, and false inside.
pub fn in_namespace(test: &str, hosts: &str) -> bool {
    if env::var_os(INSIDE).is_some() {
        return false;
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), hosts).unwrap();
    let script = r#"ip link set lo up && mount --bind "$0" /etc/hosts && exec "$@""#;
    let mut unshare = Command::new("unshare");
    if !geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let status = unshare
        .args(["--net", "--mount", "/bin/sh", "-c", script])
        .arg(file.path())
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.expect("unshare is installed").success(), "{test}");
    true
}

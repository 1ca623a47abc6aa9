//! Runs a test in namespaces of its own (namespaces(7)).

use std::{
    env, fs,
    io::{self, Write as _},
    process::Command,
};

use rustix::process::geteuid;

/// Variable that is set inside the namespaces.
const INSIDE: &str = "BLACK_BOX_NAMESPACE";

/// Runs the named test again, in namespaces of its own in which only these names have addresses, and fails
/// if it fails. Then returns true. Inside the namespaces it returns false.
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

/// Returns true if this process may give its files to other users. If not, root of a user namespace with
/// other users runs the named test again, and this fails if that fails. If there can be no such namespace,
/// a line reports that the test is skipped.
pub fn may_give_away(test: &str) -> bool {
    if geteuid().is_root() {
        return true;
    }
    let as_root = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--map-auto"]);
        unshare
    };
    let tried = as_root().arg("true").output();
    if !tried.is_ok_and(|tried| tried.status.success()) {
        let skipped = format!(
            "test {test} ... SKIPPED: it gives a file to another user, for which it has to run as root, or \
             with newuidmap and a range of users in /etc/subuid\n"
        );
        // Not a macro, because the output of macros is shown for failing tests only.
        io::stderr().write_all(skipped.as_bytes()).unwrap();
        return false;
    }
    let status = as_root()
        .arg(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .status();
    assert!(status.unwrap().success(), "{test}");
    false
}

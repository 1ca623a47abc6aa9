//! Whom the proxy believes that they are upstream, and who may decide that.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use crate::support::{Command, Upstream, assert_has};

/// A command whose trust roots stand in a variable, not in `upstream.ca_file`.
fn trusting(upstream: &Upstream, command: Command, variable: &str, value: &Path) -> Command {
    command
        .origin(&upstream.url, None)
        .keys()
        .env(variable, value.to_str().unwrap())
}

/// A root in a folder of its own, by the names that `openssl rehash` gives.
fn rehashed(upstream: &Upstream, command: &Command) -> [std::path::PathBuf; 2] {
    let pem = fs::read_to_string(upstream.ca_file.as_ref().unwrap()).unwrap();
    let file = command.file("roots/root.pem", &pem);
    let folder = file.parent().unwrap().to_owned();
    std::os::unix::fs::symlink("root.pem", folder.join("0123abcd.0")).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.join("0123abcd.1")).unwrap();
    fs::create_dir(folder.join("java")).unwrap();
    command.file("roots/README", "no certificate");
    [file, folder]
}

#[test]
fn roots_of_the_environment_replace_those_of_the_platform() {
    let upstream = Upstream::tls("http/1.1");
    let command = Command::new([]);
    let [file, folder] = rehashed(&upstream, &command);
    let list = format!("/nowhere/certs:{}", folder.display());
    for (variable, value) in [("SSL_CERT_FILE", &*file), ("SSL_CERT_DIR", list.as_ref())] {
        let proxy = trusting(&upstream, Command::new([]), variable, value).start();
        assert_eq!(proxy.get("/v1/x").status(), 200, "{variable}");
        let told = |line: &str| line.contains("trust roots") && line.contains(variable);
        assert!(proxy.stderr.find(told).is_some(), "{variable}");

        let check = Command::new(["check", "--offline"]);
        let finished = trusting(&upstream, check, variable, value).run();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        let told = format!("1 root certificates: 1 of {variable} ({})", value.display());
        assert_has(&finished.stdout, &[&told]);
    }
}

/// R31: a file that swaps the trust roots is worth as much as a secret.
#[test]
fn roots_of_the_environment_that_others_could_have_written_are_refused() {
    let upstream = Upstream::tls("http/1.1");
    for (name, mode, told) in [
        ("root.pem", 0o666, "others can write it (mode 666)"),
        ("", 0o777, "others can write its folder"),
    ] {
        for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            for command in [Command::new([]), Command::new(["check"])] {
                let [file, folder] = rehashed(&upstream, &command);
                fs::set_permissions(folder.join(name), Permissions::from_mode(mode)).unwrap();
                let value = if variable == "SSL_CERT_FILE" {
                    &file
                } else {
                    &folder
                };
                let finished = trusting(&upstream, command, variable, value).run();
                assert_eq!(finished.code, Some(78), "{finished:?}");
                assert_has(&format!("{finished:?}"), &[variable, told]);
            }
        }
    }
    assert_eq!(upstream.seen().connections, 0);
}

#[test]
fn roots_of_the_environment_that_are_not_there_are_an_error() {
    let upstream = Upstream::tls("http/1.1");
    for (variable, value) in [
        ("SSL_CERT_FILE", "/nowhere/root.pem"),
        ("SSL_CERT_DIR", "/nowhere"),
    ] {
        let command = trusting(&upstream, Command::new([]), variable, value.as_ref());
        let finished = command.run();
        assert_eq!(finished.code, Some(78), "{finished:?}");
        assert_has(&finished.stderr, &[variable]);
    }
    let command = trusting(&upstream, Command::new([]), "SSL_CERT_FILE", "".as_ref());
    let finished = command.empty_env("SSL_CERT_FILE").run();
    assert_eq!(finished.code, Some(78), "{finished:?}");
    assert_has(&finished.stderr, &["SSL_CERT_FILE", "unset it"]);
}

#[test]
fn check_says_how_many_roots_come_from_where() {
    let upstream = Upstream::tls("http/1.1");
    let check = Command::new(["check", "--offline"]).upstream(&upstream);
    let finished = check.keys().run();
    assert_eq!(finished.code, Some(0), "{finished:?}");
    let file = upstream.ca_file.as_ref().unwrap();
    let ours = format!(", 1 of upstream.ca_file ({})", file.display());
    assert_has(&finished.stdout, &[" root certificates: ", &ours]);
    let others = ["of this platform", "bundled with this program"];
    let others = others
        .iter()
        .filter(|part| finished.stdout.contains(**part));
    assert_eq!(others.count(), 1, "{finished:?}");
}

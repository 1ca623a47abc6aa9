//! The real binary as a child process. Its environment holds only the variables that the test gives.

use std::{
    cell::RefCell,
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Read},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;
use tokio::time::Instant;

use super::{
    ACCESS_KEY, Connection, Gate, Message, PATIENCE, SECRET_KEY, TOKEN, Upstream, get, post,
};

/// Variable of the tests that sets the log filter of every proxy without a filter of its own.
const LOG_FILTER: &str = "BLACK_BOX_LOG_FILTER";

/// Command line with its environment, ready to start. It uses free ports and a new home folder.
pub struct Command {
    process: std::process::Command,
    home: TempDir,
    /// Opened before the log is read.
    gate: Gate,
}

/// Running proxy. Dropping it kills it.
pub struct Proxy {
    pub address: SocketAddr,
    pub stdout: Lines,
    /// Lines of the log, from standard error.
    pub stderr: Lines,
    child: Child,
    _home: TempDir,
}

/// Exit code and output of a command that has ended by itself.
#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Lines of a pipe, as they arrive.
pub struct Lines {
    coming: Receiver<String>,
    seen: RefCell<Vec<String>>,
}

// === impl Command ===

impl Command {
    pub fn new<const N: usize>(arguments: [&str; N]) -> Self {
        let home = TempDir::new().unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kling-proxy"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", home.path())
            .current_dir(home.path());
        let gate = Gate::opened();
        Self {
            process: command,
            home,
            gate,
        }
        .setting("listen.address", "127.0.0.1:0")
        .setting("admin.address", "127.0.0.1:0")
        .setting("log.format", "json")
        // Upstream counts requests and connections. Only those of clients count, unless a test wants
        // others.
        .setting("upstream.warm_up", "false")
        .setting("upstream.keep_warm", "0s")
        .setting("state.watch", "false")
    }

    /// Sets a setting by its variable. An empty value removes the variable.
    pub fn setting(self, key: &str, value: impl AsRef<str>) -> Self {
        let name = format!("KLING_PROXY_{}", key.to_uppercase().replace('.', "__"));
        self.env(&name, value)
    }

    pub fn env(mut self, name: &str, value: impl AsRef<str>) -> Self {
        match value.as_ref() {
            "" => self.process.env_remove(name),
            value => self.process.env(name, value),
        };
        self
    }

    /// Sets a variable to an empty text, which is not the same as removing it.
    pub fn empty_env(mut self, name: &str) -> Self {
        self.process.env(name, "");
        self
    }

    pub fn upstream(self, upstream: &Upstream) -> Self {
        self.origin(&upstream.url, upstream.ca_file.as_deref())
    }

    /// Sets the URL for requests, and the trust root if it speaks TLS.
    pub fn origin(self, url: &str, ca_file: Option<&Path>) -> Self {
        let ca_file = ca_file.map_or("", |path| path.to_str().unwrap());
        self.setting("upstream.url", url)
            .setting("upstream.ca_file", ca_file)
    }

    pub fn keys(self) -> Self {
        self.env("KLING_ACCESS_KEY", ACCESS_KEY)
            .env("KLING_SECRET_KEY", SECRET_KEY)
    }

    pub fn argument(mut self, argument: impl AsRef<str>) -> Self {
        self.process.arg(argument.as_ref());
        self
    }

    /// Runs the command by a shell that runs `first` before it, in the same process.
    pub fn after(mut self, first: &str) -> Self {
        let script = format!(r#"{first} exec "$0" "$@""#);
        let mut shell = std::process::Command::new("/bin/sh");
        let variables = self.process.get_envs();
        shell
            .args(["-c", &script])
            .arg(self.process.get_program())
            .args(self.process.get_args())
            .env_clear()
            .envs(variables.filter_map(|(name, value)| Some((name, value?))))
            .current_dir(self.home.path());
        self.process = shell;
        self
    }

    /// Hands over listening sockets with their names, as systemd does.
    pub fn sockets(self, sockets: Vec<(&str, OwnedFd)>) -> Self {
        let (names, sockets): (Vec<_>, Vec<_>) = sockets.into_iter().unzip();
        let mut command = self
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .after("export LISTEN_PID=$$;");
        let mapping = |(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        };
        let mappings = sockets.into_iter().zip(3..).map(mapping);
        command.process.fd_mappings(mappings.collect()).unwrap();
        command
    }

    /// Returns the home folder, which is also the working directory.
    pub fn home(&self) -> PathBuf {
        self.home.path().to_owned()
    }

    /// Writes a file below the home folder, and returns its path.
    pub fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.home.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// Writes the settings file in the user's configuration folder.
    pub fn config(self, content: &str) -> Self {
        self.file(".config/kling-proxy/config.toml", content);
        self
    }

    /// Takes the special rights of root from the command.
    pub fn unprivileged(mut self) -> Self {
        let variables = self.process.get_envs();
        let variables = variables.filter_map(|(name, value)| Some((name, value?)));
        let mut command = unprivileged(self.process.get_program());
        command
            .args(self.process.get_args())
            .env_clear()
            .envs(variables)
            .current_dir(self.home.path());
        self.process = command;
        self
    }

    /// Starts the command outside the foreground of a terminal that the tests may have.
    pub fn in_background(mut self) -> Self {
        self.process.process_group(0);
        self
    }

    /// Leaves the log unread until the gate is open.
    pub fn unread_log(mut self, gate: &Gate) -> Self {
        self.gate = gate.clone();
        self
    }

    /// Starts a proxy and waits until it listens.
    pub fn start(self) -> Proxy {
        self.listening("proxy")
    }

    /// Starts a proxy that sends a request to upstream at its start, and waits until it is connected.
    pub fn start_warm(self) -> Proxy {
        let proxy = self
            .setting("upstream.warm_up", "true")
            .setting("log.filter", "kling_proxy=debug")
            .start();
        let asked = |line: &str| line.contains("connected to upstream");
        assert!(proxy.stderr.find(asked).is_some(), "upstream was not asked");
        proxy
    }

    /// Starts a process whose main listener is announced by this name.
    pub fn listening(mut self, name: &str) -> Proxy {
        let set = |name: &str| self.process.get_envs().any(|(known, _)| known == name);
        if let Ok(filter) = std::env::var(LOG_FILTER)
            && !set("KLING_PROXY_LOG__FILTER")
        {
            self = self.setting("log.filter", filter);
        }
        let mut child = self.spawn();
        let (stdout, stderr) = lines(&mut child, self.gate.clone());
        let Some(address) = stdout.listener(name) else {
            child.kill().unwrap();
            panic!("no {name} listens: {}{}", stdout.to_end(), stderr.to_end());
        };
        Proxy {
            address,
            stdout,
            stderr,
            child,
            _home: self.home,
        }
    }

    /// Starts a command that goes on without a listener. Its address is none.
    pub fn begin(mut self) -> Proxy {
        let mut child = self.spawn();
        let (stdout, stderr) = lines(&mut child, self.gate.clone());
        Proxy {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            stdout,
            stderr,
            child,
            _home: self.home,
        }
    }

    /// Runs a command to its end.
    pub fn run(mut self) -> Finished {
        let mut child = self.spawn();
        let (stdout, stderr) = lines(&mut child, self.gate.clone());
        stdout.find(|_| false);
        // A process that has not ended by now never will. The missing exit code shows that.
        child.kill().unwrap();
        let (stdout, stderr) = (stdout.to_end(), stderr.to_end());
        Finished {
            code: child.wait().unwrap().code(),
            stdout,
            stderr,
        }
    }

    fn spawn(&mut self) -> Child {
        self.process
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

// === impl Proxy ===

impl Proxy {
    /// Returns a command for a proxy to this upstream, with its keys.
    pub fn to(upstream: &Upstream) -> Command {
        Command::new([]).upstream(upstream).keys()
    }

    pub fn connect(&self) -> Connection {
        Connection::to(self.address)
    }

    /// Sends a request on a connection of its own.
    pub fn send(&self, request: impl AsRef<[u8]>) -> Message {
        self.connect().send(request).answer()
    }

    pub fn get(&self, path: &str) -> Message {
        self.send(get(path))
    }

    pub fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Message {
        self.send(post(path, body))
    }

    /// Returns the address of another listener: `admin` or `sandbox`.
    pub fn listener(&self, name: &str) -> SocketAddr {
        self.stdout
            .listener(name)
            .unwrap_or_else(|| panic!("no {name} listener"))
    }

    /// Sends a request to the admin listener.
    pub fn admin(&self, path: &str) -> Message {
        Connection::to(self.listener("admin"))
            .send(get(path))
            .answer()
    }

    /// Returns the value of a metric that has no labels.
    pub fn metric(&self, name: &str) -> f64 {
        let answer = self.admin("/metrics");
        let mut samples = answer
            .text()
            .lines()
            .filter_map(|line| line.split_once(' '));
        let sample = samples.find(|(known, _)| *known == name);
        sample.expect("a sample").1.parse().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the end. Returns the exit code and all log lines.
    pub fn end(mut self) -> (Option<i32>, String) {
        self.stdout.to_end();
        (self.child.wait().unwrap().code(), self.stderr.to_end())
    }

    /// Reads a file of `/proc/PID`.
    pub fn proc(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Returns the path of a file of `/proc/PID`.
    pub fn path(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    /// Returns the CPU time of the first thread, and of all threads, in ticks (proc(5)).
    pub fn cpu_times(&self) -> [u64; 2] {
        let own = format!("task/{}/stat", self.child.id());
        [&own, "stat"].map(|file| {
            let stat = self.proc(file);
            let (_, fields) = stat.rsplit_once(')').unwrap();
            let fields: Vec<_> = fields.split_whitespace().collect();
            let ticks = |index: usize| fields[index].parse::<u64>().unwrap();
            ticks(11) + ticks(12)
        })
    }

    /// Returns a line of `/proc/PID/status` in bytes, such as `VmRSS` or `VmHWM`.
    pub fn memory(&self, line: &str) -> usize {
        let status = self.proc("status");
        let line = status
            .lines()
            .find_map(|found| found.strip_prefix(line))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
            << 10
    }
}

/// R21, in every test: no output of a proxy shows its secret key or a token.
impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !thread::panicking() {
            let output = self.stdout.to_end() + &self.stderr.to_end();
            for secret in [SECRET_KEY, TOKEN] {
                assert!(!output.contains(secret), "{secret} in: {output}");
            }
        }
    }
}

// === impl Lines ===

impl Lines {
    fn of(pipe: impl Read + Send + 'static, gate: Gate) -> Self {
        let (sender, coming) = mpsc::channel();
        thread::spawn(move || {
            gate.wait();
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self {
            coming,
            seen: RefCell::default(),
        }
    }

    /// Returns the first matching line, past or future, or `None` if the pipe ends or it takes too long.
    pub fn find(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = self.seen.borrow_mut();
        if let Some(line) = seen.iter().find(|line| wanted(line)) {
            return Some(line.clone());
        }
        while let Ok(line) = self.coming.recv_timeout(deadline - Instant::now()) {
            seen.push(line);
            if let Some(line) = seen.last().filter(|line| wanted(line)) {
                return Some(line.clone());
            }
        }
        None
    }

    /// Returns true if a matching line has arrived.
    pub fn has(&self, wanted: impl Fn(&str) -> bool) -> bool {
        let mut seen = self.seen.borrow_mut();
        seen.extend(self.coming.try_iter());
        seen.iter().any(|line| wanted(line))
    }

    /// Returns all lines, after the process has closed the pipe.
    pub fn to_end(&self) -> String {
        self.find(|_| false);
        self.seen.borrow().join("\n")
    }

    /// Returns the address in a line such as `proxy  http://127.0.0.1:41234 -> …`.
    fn listener(&self, name: &str) -> Option<SocketAddr> {
        let line = self.find(|line| line.split_whitespace().next() == Some(name))?;
        let url = line.split_whitespace().nth(1)?;
        url.split_once("://")?.1.parse().ok()
    }
}

/// Returns a command that runs without the special rights of root, even if root runs the tests.
pub fn unprivileged(program: impl AsRef<OsStr>) -> std::process::Command {
    let (runner, flags) = if geteuid().is_root() {
        (
            "/usr/bin/setpriv",
            &["--bounding-set=-all", "--inh-caps=-all"][..],
        )
    } else {
        ("/usr/bin/env", &[][..])
    };
    let mut command = std::process::Command::new(runner);
    command.args(flags).arg(program);
    command
}

fn lines(child: &mut Child, gate: Gate) -> (Lines, Lines) {
    (
        Lines::of(child.stdout.take().unwrap(), Gate::opened()),
        Lines::of(child.stderr.take().unwrap(), gate),
    )
}

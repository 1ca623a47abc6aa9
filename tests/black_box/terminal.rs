//! Output for people: the log and the commands on a terminal.

use std::{
    fs::File,
    io::Read as _,
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex},
    thread,
};

use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use tempfile::TempDir;

use crate::support::{Command, Proxy, Signal, Upstream, assert_has, eventually, kling, now, post};

const TASK: &str = r#"{"code":0,"data":{"task_id":"104454366743201459"}}"#;

/// Pseudo terminal with all that was written to it.
struct Terminal {
    /// Path of the end for commands.
    path: String,
    /// The end for commands, so that the terminal stays open between two of them.
    _end: OwnedFd,
    text: Arc<Mutex<String>>,
}

// === impl Terminal ===

impl Terminal {
    /// Opens a terminal of this width, in columns.
    fn open(columns: u16) -> Self {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let path = ptsname(&controller, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY;
        let end = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        let size = Winsize {
            ws_row: 24,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(end.as_fd(), size).unwrap();
        let text = Arc::<Mutex<String>>::default();
        let written = Arc::clone(&text);
        thread::spawn(move || {
            let (mut controller, mut all) = (File::from(controller), Vec::new());
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = controller.read(&mut bytes) {
                all.extend_from_slice(&bytes[..count]);
                *written.lock().unwrap() = String::from_utf8_lossy(&all).replace("\r\n", "\n");
            }
        });
        Self {
            path: path.into_string().unwrap(),
            _end: end,
            text,
        }
    }

    /// Returns all text, once it has this part.
    fn with(&self, part: &str) -> String {
        eventually(part, || self.text.lock().unwrap().contains(part));
        self.text.lock().unwrap().clone()
    }

    /// Returns the lines about requests, without the times and ids that differ from run to run.
    fn requests(&self, last: &str) -> Vec<String> {
        let text = self.with(last);
        let is_request = |line: &&str| line.contains("GET  ") || line.contains("POST ");
        text.lines().filter(is_request).map(anonymous).collect()
    }
}

/// Starts a proxy whose log is on a terminal.
fn started(upstream: &Upstream, terminal: &Terminal) -> Proxy {
    Proxy::to(upstream)
        .setting("log.format", "auto")
        .env("TERM", "xterm")
        .env("NO_COLOR", "1")
        .env("TZ", "JST-9")
        .after(&format!("exec 2>{};", terminal.path))
        .start()
}

/// Replaces the time of day, the duration and the request id of a line.
fn anonymous(line: &str) -> String {
    let parts = line.split("  ").map(|part| {
        let is_id = part.len() == 8 && part.chars().all(|c| c.is_ascii_hexdigit());
        match part {
            part if part.len() == 8 && part.matches(':').count() == 2 => "TIME",
            part if part.ends_with(" ms") || part.ends_with(" s") => "DURATION",
            _ if is_id => "ID",
            part => part,
        }
    });
    parts.collect::<Vec<_>>().join("  ")
}

#[test]
fn each_request_is_one_line_on_a_terminal() {
    let (upstream, terminal) = (Upstream::ok(), Terminal::open(200));
    let proxy = started(&upstream, &terminal);
    proxy.get("/v1/videos/text2video/1");
    upstream.answer(kling(200, TASK));
    proxy.post("/v1/videos/text2video", "{}");
    upstream.answer(kling(
        429,
        r#"{"code":1102,"message":"Account balance not enough"}"#,
    ));
    proxy.post("/v1/videos/text2video", "{}");
    upstream.answer(kling(500, r#"{"code":5000,"message":"no"}"#));
    proxy.post("/v1/videos/image2video", "{}");
    upstream.answer(kling(200, TASK));
    proxy.get("/v1/last");
    assert_eq!(
        terminal.requests("/v1/last"),
        [
            "TIME  200  GET  /v1/videos/text2video/1  DURATION  ID",
            "TIME  200  POST /v1/videos/text2video  DURATION  task 104454366743201459  ID",
            "TIME  429  POST /v1/videos/text2video  DURATION  1102 resource_pack_depleted: buy a resource pack  ID",
            "TIME  500  POST /v1/videos/image2video  DURATION  5000 internal_error: no  ID",
            "TIME  200  GET  /v1/last  DURATION  ID",
        ]
    );
}

/// The debug line about the client, which the terminal shows for reads, has no news for a create.
#[test]
fn create_whose_client_has_gone_is_one_line_too() {
    let (upstream, terminal) = (Upstream::ok(), Terminal::open(110));
    let proxy = started(&upstream, &terminal);
    let gate = upstream.hold();
    let mut client = proxy.connect();
    client.send(post("/v1/videos/text2video", "{}"));
    upstream.wait(|seen| seen.requests.len() == 1);
    drop(client);
    gate.open();
    terminal.with("carried through");
    proxy.get("/v1/last");
    let text = terminal.with("/v1/last");
    let lines: Vec<_> = text
        .lines()
        .filter(|line| line.contains("text2video"))
        .map(anonymous)
        .collect();
    assert_eq!(
        lines,
        [
            "TIME  200  …/text2video  the client has gone; its create was carried through  task 829836802793406551"
        ]
    );
}

/// An unset `log.filter` stays unset when the settings are read again.
#[test]
fn reads_stay_on_the_terminal_after_a_reload() {
    let (upstream, terminal) = (Upstream::ok(), Terminal::open(110));
    let proxy = started(&upstream, &terminal);
    eventually("ready", || proxy.admin("/health/ready").status() == 200);
    proxy.signal(Signal::HUP);
    terminal.with("settings reloaded");
    proxy.get("/v1/x");
    terminal.with("200  GET  /v1/x");
}

#[test]
fn line_fits_the_terminal() {
    let (upstream, terminal) = (Upstream::ok(), Terminal::open(60));
    let proxy = started(&upstream, &terminal);
    upstream.answer(kling(
        400,
        r#"{"code":1201,"message":"the duration has to be 5 or 10"}"#,
    ));
    proxy.post("/v1/videos/text2video", "{}");
    let text = terminal.with("1201");
    let line = text.lines().find(|line| line.contains("1201")).unwrap();
    assert_has(
        line,
        &["400  POST …/text2video", "1201 invalid_parameter_va…"],
    );
    assert!(line.chars().count() <= 60, "{line}");
}

#[test]
fn time_of_a_line_is_local() {
    const DAY: u64 = 24 * 60 * 60;
    let (upstream, terminal) = (Upstream::ok(), Terminal::open(110));
    let proxy = started(&upstream, &terminal);
    proxy.get("/v1/x");
    let text = terminal.with("/v1/x");
    let line = text.lines().find(|line| line.contains("/v1/x")).unwrap();
    let parts = line[..8]
        .split(':')
        .map(|part| part.parse::<u64>().unwrap());
    let shown = parts.fold(0, |seconds, part| 60 * seconds + part);
    // Nine hours ahead of UTC.
    let ago = (now() + 9 * 60 * 60 + DAY - shown) % DAY;
    assert!(ago < 60, "{line}");
}

#[test]
fn colours_are_for_terminals_whose_user_wants_them() {
    let explain = || Command::new(["explain", "1102"]);
    let check = || Command::new(["check", "--sandbox", "--offline"]);
    for (command, last, coloured) in [
        (
            &explain as &dyn Fn() -> Command,
            "errors.status",
            "\u{1b}[1m1102 resource_pack_depleted\u{1b}[0m\n",
        ),
        (&check, "trust", "\u{1b}[32mok      \u{1b}[0m trust"),
    ] {
        for (term, no_color, is_coloured) in [
            ("xterm-256color", "", true),
            ("xterm-256color", "1", false),
            ("dumb", "", false),
        ] {
            let terminal = Terminal::open(110);
            let command = command().env("TERM", term).env("NO_COLOR", no_color);
            // The test waits until nobody holds its pipe any more.
            let finished = command
                .after(&format!("exec 3>&1 >{};", terminal.path))
                .run();
            assert_eq!(finished.code, Some(0), "{finished:?}");
            let text = terminal.with(last);
            assert_eq!(
                text.contains(coloured),
                is_coloured,
                "{term} {no_color}: {text:?}"
            );
            assert_eq!(
                text.contains('\u{1b}'),
                is_coloured,
                "{term} {no_color}: {text:?}"
            );
        }
        let piped = command().env("TERM", "xterm-256color").run().stdout;
        assert!(
            piped.contains(last) && !piped.contains('\u{1b}'),
            "{piped:?}"
        );
    }
}

#[test]
fn table_of_tasks_fits_the_terminal_and_has_a_summary() {
    let (upstream, folder) = (Upstream::ok(), TempDir::new().unwrap());
    let url = format!("sqlite:{}", folder.path().join("tasks.db").display());
    let proxy = Proxy::to(&upstream).setting("state.url", &url).start();
    upstream.answer(kling(200, TASK));
    for _ in 0..50 {
        proxy.post("/v1/videos/text2video", "{}");
    }
    upstream.answer(kling(
        429,
        r#"{"code":1102,"message":"Account balance not enough"}"#,
    ));
    proxy.post("/v1/videos/text2video", "{}");
    let tasks = |arguments: &[&str], no_color: &str, last: &str| {
        let terminal = Terminal::open(84);
        let command = Command::new(["tasks"])
            .setting("state.url", &url)
            .env("TERM", "xterm")
            .env("NO_COLOR", no_color);
        let command = arguments.iter().fold(command, Command::argument);
        let finished = command
            .after(&format!("exec 3>&1 >{};", terminal.path))
            .run();
        assert_eq!(finished.code, Some(0), "{finished:?}");
        terminal.with(last)
    };
    let note = "the newest 50 are shown";
    let plain = tasks(&[], "1", note);
    let lines: Vec<_> = plain.lines().collect();
    assert!(
        lines.iter().all(|line| line.chars().count() <= 84),
        "{plain}"
    );
    assert!(lines[1].ends_with("1102 resource_…"), "{plain}");
    assert_eq!(
        lines[52..54],
        [
            "51 tasks: 50 submitted, 1 rejected; 0 units",
            "the newest 50 are shown; `--since 30d` shows more"
        ]
    );
    let coloured = tasks(&[], "", note);
    assert_has(&coloured, &["\u{1b}[1mage", "\u{1b}[1m\u{1b}[31mrejected"]);
    // Whoever says since when wants all.
    let summary = "51 tasks:";
    let all = tasks(&["--since", "1h"], "1", summary);
    assert_eq!(all.lines().count(), 1 + 51 + 2, "{all}");
}

//! The command line: what it takes, what it prints, and the code it ends with.

#![expect(
    clippy::doc_markdown,
    reason = "clap shows these doc comments in a terminal, where Markdown is noise"
)]

mod check;
mod documents;
mod explain;
mod flags;
mod health;
mod http_client;
mod run;
mod sandbox;
mod serve;
mod settings;
mod signal;
mod token;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{FromArgMatches, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use tokio::runtime::Runtime;

use self::flags::{SettingsArgs, WithSandbox, command_line, refuse_idle};
use crate::auth::credentials::{self, CommandError, Found, Places};
use crate::environment::Environment;
use crate::error::chain;
use crate::telemetry;

/// Local authenticating reverse proxy for the Kling AI API.
///
/// Point a tool at `http://127.0.0.1:5546` instead of the API and drop its keys: the proxy adds a
/// valid token to each request and turns whatever goes wrong into one kind of error.
#[derive(Parser)]
#[command(
    version,
    after_help = EXAMPLES,
    after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}")
)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    sandbox: WithSandbox,
    #[command(flatten)]
    settings: SettingsArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy (the default)
    Serve(WithSandbox),
    /// Run a command with a proxy of its own, and end as it ends
    ///
    /// The proxy listens on a free port and serves this command alone. The command finds it in
    /// KLING_BASE_URL, KLING_API_BASE_URL, KLING_API_BASE and KLINGAI_BASE_URL, and in
    /// KLING_API_KEY, KLING_ACCESS_KEY, KLING_SECRET_KEY and their KLINGAI_ twins keys that are good
    /// for this proxy only. The real ones are not in its environment.
    #[command(after_help = RUN_EXAMPLES)]
    Run {
        #[command(flatten)]
        with: WithSandbox,
        /// What to run, with its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Run the embedded Kling API alone, for tests
    Sandbox {
        /// Where to listen
        #[arg(long, default_value = "127.0.0.1:5548")]
        address: SocketAddr,
    },
    /// Find out what is wrong: settings, files, credential, network, account
    Check {
        /// Stop where the network begins
        #[arg(long)]
        offline: bool,
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print a fresh token, or what it says
    Token {
        /// Say what the token claims instead of printing it
        #[arg(long)]
        decode: bool,
    },
    /// Explain a service code, or list all
    Explain {
        /// The code, such as 1303
        #[arg(allow_negative_numbers = true)]
        code: Option<i64>,
        /// How to print
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show the effective settings and where each comes from
    Settings,
    /// Ask a running proxy whether it is ready; exit 0 if so
    Health,
    /// Wait until a proxy is ready; exit 1 if that takes too long
    Wait {
        /// How long to wait at most
        #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Print the completions of a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Write the manual pages, one a command
    #[command(hide = true)] // for packages, once a release
    Man {
        /// The folder to write to
        folder: PathBuf,
    },
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

const EXAMPLES: &str = "\
Credentials come from variables, never from the command line:
  KLING_ACCESS_KEY and KLING_SECRET_KEY, or KLING_API_KEY (or …_FILE)

Examples:
  kling-proxy --sandbox      try it without an account
  kling-proxy                http://127.0.0.1:5546 -> https://api-singapore.klingai.com
  kling-proxy run -- make    a command with a proxy of its own, and without your keys
  kling-proxy check          what is wrong, and what to do about it
  kling-proxy explain 1303   what a code means and what to do";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed while running
  2    wrong command line
  69   upstream cannot be reached (check)
  77   upstream refuses the credential (check)
  78   wrong settings, or no or half a credential
  126  the command cannot be run, 127 there is none (run)";

const RUN_EXAMPLES: &str = "\
Examples:
  kling-proxy run -- python make_video.py
  kling-proxy run --sandbox -- npm test

The exit code is that of the command, or 128 and the number of the signal that ended it; 126 if it
cannot be run, 127 if there is none, 78 for wrong settings or no credential.";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  kling-proxy completions bash > ~/.local/share/bash-completion/completions/kling-proxy
  kling-proxy completions fish > ~/.config/fish/completions/kling-proxy.fish
  kling-proxy completions zsh > ~/.zfunc/_kling-proxy    with ~/.zfunc in $fpath, before compinit";

/// A command that did not do what it should.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    lines: Vec<String>,
}

/// The exit codes, as the README lists them.
#[derive(Clone, Copy, Debug)]
enum Exit {
    /// Failed while running.
    Failed = 1,
    /// Wrong command line; clap uses it too.
    Usage = 2,
    /// Upstream cannot be reached.
    Unavailable = 69,
    /// Upstream refuses the credential.
    Refused = 77,
    /// Wrong settings, or no or half a credential.
    Settings = 78,
    /// The command of `run` cannot be run; so do shells say it, and env(1).
    NotExecutable = 126,
    /// There is no such command.
    NotFound = 127,
}

/// Runs the command of this process.
pub fn run() -> ExitCode {
    let matches = command_line().get_matches();
    let done = match CommandLine::from_arg_matches(&matches) {
        Ok(command_line) => refuse_idle(&matches).and_then(|()| command_line.run()),
        Err(error) => error.exit(),
    };
    let code = match done {
        Ok(code) => code,
        Err(Failure { exit, lines }) => {
            lines.iter().for_each(complain);
            ExitCode::from(exit as u8)
        }
    };
    telemetry::finish();
    code
}

// === impl CommandLine ===

impl CommandLine {
    fn run(self) -> Result<ExitCode, Failure> {
        let Self {
            command,
            sandbox: WithSandbox { sandbox },
            settings,
        } = self;
        let environment: Environment = std::env::vars_os().collect();
        match command {
            None => serve::run(sandbox, settings, environment)?,
            Some(Command::Serve(with)) => {
                serve::run(sandbox || with.sandbox, settings, environment)?;
            }
            Some(Command::Run { with, command }) => {
                let sandbox = sandbox || with.sandbox;
                return run::run(sandbox, &command, settings, &environment);
            }
            Some(Command::Sandbox { address }) => sandbox::run(address, &settings, &environment)?,
            Some(Command::Check { offline, output }) => {
                check::run(offline, output, &settings, &environment)?;
            }
            Some(Command::Token { decode }) => token::run(decode, &settings, &environment)?,
            Some(Command::Explain { code, output }) => explain::run(code, output)?,
            Some(Command::Settings) => settings::run(&settings, &environment)?,
            Some(Command::Health) => health::run(&settings, &environment)?,
            Some(Command::Wait { timeout }) => health::wait(timeout, &settings, &environment)?,
            Some(Command::Completions { shell }) => documents::completions(shell),
            Some(Command::Man { folder }) => documents::man(&folder)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

// === impl Failure ===

impl Failure {
    fn new(exit: Exit, line: impl Into<String>) -> Self {
        Self {
            exit,
            lines: vec![line.into()],
        }
    }

    fn because(exit: Exit, error: &dyn std::error::Error) -> Self {
        Self::new(exit, chain(error))
    }
}

impl From<credentials::Error> for Failure {
    fn from(error: credentials::Error) -> Self {
        Self::because(Exit::Settings, &error)
    }
}

/// Looks everywhere, and runs the command if there is one and nothing else.
fn find_credential(places: &Places) -> Result<Found, credentials::Error> {
    match (places.find(), places.command()) {
        (Err(credentials::Error::Missing), Some(command)) => {
            let runtime = runtime();
            runtime.map_err(CommandError::Run)?.block_on(command.run())
        }
        (found, _) => found,
    }
}

/// A runtime for one thread: each thread here has its own.
fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Prints a line. A reader that has gone, such as `head`, is no failure.
fn say(line: impl fmt::Display) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Tells the person at the terminal what goes wrong.
fn complain(line: impl fmt::Display) {
    telemetry::print(&format!("kling-proxy: {line}\n"));
}

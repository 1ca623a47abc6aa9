//! The command line: its commands, their output, and the exit codes.

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
mod taken_port;
mod tasks;
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

use self::explain::CodeOrType;
use self::flags::{SettingsArgs, WithSandbox, command_line, refuse_idle};
use self::tasks::TasksArgs;
use crate::auth::credentials::{self, CommandError, Found, Places};
use crate::environment::Environment;
use crate::error::chain;
use crate::telemetry;

/// Local authenticating reverse proxy for the Kling AI API.
///
/// Point a tool at `http://127.0.0.1:5546` instead of the API and drop its keys: the proxy adds a
/// valid token to each request and reports all failures in one error format.
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
    /// Run a command with its own proxy, and exit with the command's exit code
    ///
    /// The proxy listens on a free port and serves this command alone. The command's environment
    /// holds the proxy's address in KLING_BASE_URL, KLING_API_BASE_URL, KLING_API_BASE and
    /// KLINGAI_BASE_URL. KLING_API_KEY, KLING_ACCESS_KEY, KLING_SECRET_KEY, KLINGAI_API_KEY,
    /// KLINGAI_ACCESS_KEY and KLINGAI_SECRET_KEY hold keys that only this proxy accepts. The real
    /// keys are not in the environment.
    #[command(after_help = RUN_EXAMPLES)]
    Run {
        #[command(flatten)]
        with: WithSandbox,
        /// Command to run, with its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Run the embedded Kling API alone, for tests
    Sandbox {
        /// Address for the sandbox to listen on
        #[arg(long, default_value = "127.0.0.1:5548")]
        address: SocketAddr,
    },
    /// Find out what is wrong: settings, files, credential, network, account
    Check {
        #[command(flatten)]
        with: WithSandbox,
        /// Skip all steps that need the network
        #[arg(long)]
        offline: bool,
        /// Format of the command's output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Print a fresh token, or its claims
    Token {
        /// Print the claims of the token instead of the token
        #[arg(long)]
        decode: bool,
    },
    /// Explain a service code, or list all
    Explain {
        /// The code or its type, such as 1303 or concurrency_limited
        #[arg(allow_negative_numbers = true)]
        code: Option<CodeOrType>,
        /// Format of the command's output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Show the effective settings and the source of each
    Settings,
    /// Show the tasks that the proxy remembers, newest first
    ///
    /// Reads the file of the store, whether a proxy runs or not. If the store is in memory, asks the
    /// running proxy on its admin listener.
    #[command(after_help = TASKS_EXAMPLES)]
    Tasks(TasksArgs),
    /// Ask a running proxy whether it is ready; exit 0 if so
    Health,
    /// Wait until a proxy is ready; exit 1 if that takes too long
    Wait {
        /// Longest time to wait for the proxy; a number alone is in seconds
        #[arg(long, default_value = "30s", value_parser = health::duration)]
        timeout: Duration,
    },
    /// Print the completions of a shell
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// Shell to print the completions for
        shell: Shell,
    },
    /// Write the manual pages, one per command
    Man {
        /// The folder to write to; it is made if it is missing
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
  KLING_API_KEY, or KLING_ACCESS_KEY and KLING_SECRET_KEY (or …_FILE)

Examples:
  kling-proxy --sandbox      try it without an account
  kling-proxy                http://127.0.0.1:5546 -> https://api-singapore.klingai.com
  kling-proxy run -- make    run a command with its own proxy and without your keys
  kling-proxy tasks          the tasks that were made, and what became of them
  kling-proxy check          find problems and how to correct them
  kling-proxy explain 1303   what a code means and what to do";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed while running
  2    wrong command line
  69   upstream cannot be reached (check)
  77   upstream refuses the credential (check)
  78   wrong settings, or no or half a credential
  126  the command cannot be run (run)
  127  the command does not exist (run)";

const RUN_EXAMPLES: &str = "\
Examples:
  kling-proxy run -- python make_video.py
  kling-proxy run --sandbox -- npm test

The exit code is that of the command, or 128 plus the number of the signal that ended it; 126 if the
command cannot be run, 127 if it does not exist, 78 for wrong settings or no credential.";

const TASKS_EXAMPLES: &str = "\
Examples:
  kling-proxy tasks --since 24h            the tasks of the last day
  kling-proxy tasks --status failed        tasks that failed, each with its reason
  kling-proxy tasks 830495112309           all about one task, with the addresses of its results
  kling-proxy tasks --follow               go on with each change, until Ctrl-C
  kling-proxy tasks --output json | jq .units";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  mkdir -p ~/.local/share/bash-completion/completions
  kling-proxy completions bash > ~/.local/share/bash-completion/completions/kling-proxy
  mkdir -p ~/.config/fish/completions
  kling-proxy completions fish > ~/.config/fish/completions/kling-proxy.fish
  mkdir -p ~/.zfunc
  kling-proxy completions zsh > ~/.zfunc/_kling-proxy

zsh needs ~/.zfunc in $fpath, before compinit.";

/// The command line that needs no account.
const TRIAL: &str = "kling-proxy --sandbox";

/// Failure of a command: its exit code, and the lines for standard error.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    lines: Vec<String>,
}

/// Exit codes. The README lists them too.
#[derive(Clone, Copy, Debug)]
enum Exit {
    /// A command failed while it was running.
    Failed = 1,
    /// Wrong command line. clap exits with this code too.
    Usage = 2,
    /// Upstream cannot be reached, as found by `check`.
    Unavailable = 69,
    /// Upstream refuses the credential, as found by `check`.
    Refused = 77,
    /// Wrong settings, or no or half a credential.
    Settings = 78,
    /// The command of `run` cannot be run. Shells and env(1) use the same code.
    NotExecutable = 126,
    /// The command of `run` does not exist.
    NotFound = 127,
}

/// Runs the command that the arguments of this process name, and returns the exit code.
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
            Some(Command::Check {
                with,
                offline,
                output,
            }) => {
                let sandbox = sandbox || with.sandbox;
                check::run(sandbox, offline, output, &settings, &environment)?;
            }
            Some(Command::Token { decode }) => token::run(decode, &settings, &environment)?,
            Some(Command::Explain { code, output }) => explain::run(code, output)?,
            Some(Command::Settings) => settings::run(&settings, &environment)?,
            Some(Command::Tasks(args)) => tasks::run(&args, &settings, &environment)?,
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

    /// There is no usable credential, which the command line `trial` does not need.
    fn without_credential(error: &credentials::Error, trial: &str) -> Self {
        Self::new(Exit::Settings, with_trial(error, trial))
    }
}

impl From<credentials::Error> for Failure {
    fn from(error: credentials::Error) -> Self {
        Self::without_credential(&error, TRIAL)
    }
}

/// Describes an error. If no place has a credential, recommends the command line `trial`.
fn with_trial(error: &credentials::Error, trial: &str) -> String {
    let text = chain(error);
    match error {
        credentials::Error::Missing => {
            format!("{text}; to try without an account, run `{trial}`")
        }
        _ => text,
    }
}

/// Finds a credential. Runs `credentials.command`, if it is set, only if no other place has a credential.
fn find_credential(places: &Places) -> Result<Found, credentials::Error> {
    match (places.find(), places.command()) {
        (Err(credentials::Error::Missing), Some(command)) => {
            let runtime = runtime();
            runtime.map_err(CommandError::Run)?.block_on(command.run())
        }
        (found, _) => found,
    }
}

/// Builds a runtime for one thread. Each thread of the proxy has its own.
fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Prints a line to standard output. A pipe that its reader has closed, such as `head`, is no failure.
fn say(line: impl fmt::Display) {
    let mut out = io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Prints a problem to standard error, for the person at the terminal.
fn complain(line: impl fmt::Display) {
    telemetry::print(&format!("kling-proxy: {line}\n"));
}

//! `kling-proxy tasks`: shows the tasks that the store remembers, once or with each change.

mod source;
mod table;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use tokio::time::sleep;

use self::source::{Filter, ShownTask, Source};
use self::table::Table;
use super::{Exit, Failure, SettingsArgs, runtime};
use crate::clock::{Clock, SystemClock};
use crate::environment::Environment;
use crate::tasks::record::Timestamp;
use crate::tasks::state::TaskState;
use crate::tasks::view;

/// Arguments of `kling-proxy tasks`: filters, format and the task.
#[derive(Args)]
pub(super) struct TasksArgs {
    /// The task to show: the proxy's own id of it, Kling's task id or the external id
    #[arg(value_name = "REF", conflicts_with_all = ["status", "client", "since"])]
    reference: Option<String>,
    /// Show only tasks in this state
    #[arg(long, value_name = "STATUS", value_parser = states())]
    status: Option<TaskState>,
    /// Show only tasks of the client with this name
    #[arg(long)]
    client: Option<String>,
    /// Show only tasks that were made since then: an age such as 24h, or a time such as
    /// 2026-11-30T20:00:00Z
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Timestamp>,
    /// Format of the command's output; JSON is one object per line
    #[arg(long, value_enum, default_value_t)]
    output: TaskOutput,
    /// Go on, and show each task that changes, until Ctrl-C or the end of REF
    #[arg(long)]
    follow: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum TaskOutput {
    #[default]
    Table,
    Json,
}

/// Standard output, in the form that the arguments ask for.
struct Screen {
    output: TaskOutput,
    is_terminal: bool,
    follow: bool,
}

/// Time between two looks at a file.
const FILE_PAUSE: Duration = Duration::from_secs(1);
/// Time between two requests to a running proxy.
const PROXY_PAUSE: Duration = Duration::from_secs(2);
/// Most tasks that a terminal shows, unless `--since` asks for more.
const ON_TERMINAL: usize = 50;

/// Shows one task or a list.
pub(super) fn run(
    args: &TasksArgs,
    settings: &SettingsArgs,
    environment: &Environment,
) -> Result<(), Failure> {
    let (settings, _) = settings.load(environment)?;
    let mut source = Source::find(&settings, environment)?;
    let screen = Screen {
        output: args.output,
        is_terminal: io::stdout().is_terminal(),
        follow: args.follow,
    };
    let runtime = runtime().map_err(|error| Failure::because(Exit::Failed, &error))?;
    runtime.block_on(async {
        match &args.reference {
            Some(reference) => show_one(reference, &mut source, &screen).await,
            None => show_list(args, &mut source, &screen).await,
        }
    })
}

/// Shows one task, and with `--follow` each of its changes until it ends.
async fn show_one(reference: &str, source: &mut Source, screen: &Screen) -> Result<(), Failure> {
    let mut task = find(reference, source).await?;
    if !screen.follow {
        let shown = match screen.output {
            TaskOutput::Table => table::details(&task, now()),
            TaskOutput::Json => source::pretty(task.json()) + "\n",
        };
        return screen.print(&shown);
    }
    let table = Table::of(std::slice::from_ref(&task), now());
    screen.print(&screen.lines(&table, std::slice::from_ref(&task)))?;
    while !task.is_ended() {
        sleep(source.pause()).await;
        let newer = find(reference, source).await?;
        if newer.json() != task.json() {
            task = newer;
            screen.print(&screen.rows(&table, std::slice::from_ref(&task)))?;
        }
    }
    Ok(())
}

async fn find(reference: &str, source: &mut Source) -> Result<ShownTask, Failure> {
    let found = source.task(reference).await?;
    found.ok_or_else(|| {
        let place = source.place();
        let reason = format!("{place} knows no task {reference}: `kling-proxy tasks` lists all");
        Failure::new(Exit::Failed, reason)
    })
}

/// Shows the list of tasks, and with `--follow` each change.
async fn show_list(args: &TasksArgs, source: &mut Source, screen: &Screen) -> Result<(), Failure> {
    let filter = Filter {
        state: args.status,
        client: args.client.clone(),
        since: args.since,
    };
    let mut tasks = source.list(&filter).await?;
    let mut summary = screen.is_terminal.then(|| table::summary(&tasks));
    if screen.is_terminal && args.since.is_none() && tasks.len() > ON_TERMINAL {
        tasks.truncate(ON_TERMINAL);
        if let Some(summary) = &mut summary {
            let more = format!("the newest {ON_TERMINAL} are shown; `--since 30d` shows more\n");
            summary.push_str(&more);
        }
    }
    if screen.follow {
        // The changes that follow are newer than all that.
        tasks.reverse();
        summary = None;
    }
    let table = Table::of(&tasks, now());
    let mut shown = screen.lines(&table, &tasks);
    if screen.output == TaskOutput::Table {
        shown.push_str(&summary.unwrap_or_default());
    }
    screen.print(&shown)?;
    drop(tasks);
    if !screen.follow {
        return Ok(());
    }
    loop {
        sleep(source.pause()).await;
        let changed = source.changes(&filter).await?;
        screen.print(&screen.rows(&table, &changed))?;
    }
}

// === impl Screen ===

impl Screen {
    /// Writes tasks with the heading of the table.
    fn lines(&self, table: &Table, tasks: &[ShownTask]) -> String {
        let heading = match self.output {
            TaskOutput::Table => table.heading(),
            TaskOutput::Json => String::new(),
        };
        heading + &self.rows(table, tasks)
    }

    /// Writes tasks, one a line.
    fn rows(&self, table: &Table, tasks: &[ShownTask]) -> String {
        let line = |task: &ShownTask| match self.output {
            TaskOutput::Table => table.row(task, now()),
            TaskOutput::Json => task.json().to_owned() + "\n",
        };
        tasks.iter().map(line).collect()
    }

    /// Prints text. A pipe that its reader has closed ends the command without a complaint.
    fn print(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe && self.follow => {
                Err(Failure {
                    exit: Exit::Failed,
                    lines: Vec::new(),
                })
            }
            _ => Ok(()),
        }
    }
}

fn now() -> Timestamp {
    SystemClock.now().into()
}

/// Reads the time of `--since`.
fn since(text: &str) -> Result<Timestamp, &'static str> {
    view::time(text, now()).ok_or("want an age such as 24h, or a time such as 2026-11-30T20:00:00Z")
}

/// Reads the word of a state.
fn states() -> impl TypedValueParser<Value = TaskState> {
    let words = TaskState::ALL.map(TaskState::as_str);
    PossibleValuesParser::new(words)
        .map(|word| TaskState::from_word(&word).unwrap_or(TaskState::Unknown))
}

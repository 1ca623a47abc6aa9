//! Tasks as text for people: the table, its summary, and all about one task.

use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use rustix::termios::tcgetwinsize;

use super::source::{ErrorMembers, Members, ShownTask};
use crate::style::{Palette, Tone};
use crate::tasks::record::Timestamp;
use crate::tasks::state::TaskState;
use crate::tasks::units::{ONE, Units};
use crate::telemetry::{columns, cut, printable};

/// The layout of a table: its columns, their widths and its colours.
pub(super) struct Table {
    palette: Palette,
    /// Columns of the terminal; `None` in a pipe, where nothing is cut off.
    width: Option<usize>,
    /// Width of each column; `None` if the column is left out.
    widths: [Option<usize>; COLUMNS],
}

/// Number of columns.
const COLUMNS: usize = 8;
const HEADING: [&str; COLUMNS] = [
    "age", "status", "model", "units", "took", "client", "id", "error",
];
const AGE: usize = 0;
const STATUS: usize = 1;
const CLIENT: usize = 5;
/// The last column, which has all the room that is left.
const ERROR: usize = 7;
/// Spaces between two columns.
const GAP: &str = "  ";
/// Characters of a part that [`printable`] does not cut off.
const PART: usize = 128;
/// Stands for a value that a task does not have.
const NONE: &str = "-";

// === impl Table ===

impl Table {
    /// Lays out a table for these tasks on standard output.
    pub(super) fn of(tasks: &[ShownTask], now: Timestamp) -> Self {
        let out = io::stdout();
        let size = tcgetwinsize(&out).ok();
        let width = size.map(|size| usize::from(size.ws_col));
        let width = width.filter(|width| *width > 0);
        Self::new(Palette::of(&out), width, tasks, now)
    }

    fn new(palette: Palette, width: Option<usize>, tasks: &[ShownTask], now: Timestamp) -> Self {
        let mut widths = HEADING.map(|name| Some(name.len()));
        // So that the columns of `--follow` need not grow.
        widths[AGE] = Some("59 min".len());
        widths[STATUS] = Some("processing".len());
        for task in tasks {
            for (width, cell) in widths.iter_mut().zip(cells(&task.members, now)) {
                *width = (*width).max(Some(columns(&cell)));
            }
        }
        if !tasks.iter().any(|task| task.members.client.is_some()) {
            widths[CLIENT] = None;
        }
        Self {
            palette,
            width,
            widths,
        }
    }

    /// Writes the names of the columns.
    pub(super) fn heading(&self) -> String {
        let cells = HEADING.map(str::to_owned);
        let line = self.line(&cells, [Tone::Strong; COLUMNS]);
        line + "\n"
    }

    /// Writes the row of one task.
    pub(super) fn row(&self, task: &ShownTask, now: Timestamp) -> String {
        let mut tones = [Tone::Normal; COLUMNS];
        tones[AGE] = Tone::Faint;
        tones[STATUS] = tone(&task.members.status);
        if task.members.error.is_some() {
            tones[ERROR] = tones[STATUS];
        }
        let line = self.line(&cells(&task.members, now), tones);
        line + "\n"
    }

    fn line(&self, cells: &[String; COLUMNS], tones: [Tone; COLUMNS]) -> String {
        let mut line = String::new();
        let mut room = self.width.unwrap_or(usize::MAX);
        for ((cell, width), (column, tone)) in cells
            .iter()
            .zip(self.widths)
            .zip(tones.into_iter().enumerate())
        {
            let Some(width) = width else {
                continue;
            };
            let cell = self.palette.paint(tone, cut(cell, room));
            // Writing to a string cannot fail.
            let _ = if column == ERROR {
                write!(line, "{cell}")
            } else {
                write!(line, "{cell:<width$}{GAP}")
            };
            room = room.saturating_sub(width + GAP.len());
        }
        line
    }
}

/// Returns the cells of a task's row.
fn cells(task: &Members, now: Timestamp) -> [String; COLUMNS] {
    let age = time(Some(&task.created_at)).map(|created| span(now.since(created)));
    let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    [
        or_none(age),
        text(&task.status),
        text(kind(task)),
        or_none(units(task)),
        or_none(took(task, now)),
        text(task.client.as_deref().unwrap_or(NONE)),
        text(task.id.as_ref().unwrap_or(&task.r#ref)),
        or_none(task.error.as_ref().map(reason)),
    ]
}

/// Returns the model of a task, else the last part of its path.
fn kind(task: &Members) -> &str {
    let last = || task.path.rsplit('/').find(|part| !part.is_empty());
    task.model.as_deref().or_else(last).unwrap_or(NONE)
}

/// Writes the units of a task. An estimate has a `~` before it.
fn units(task: &Members) -> Option<String> {
    let estimate = || {
        task.estimated_units
            .as_ref()
            .map(|units| format!("~{units}"))
    };
    task.units
        .clone()
        .or_else(estimate)
        .map(|units| text(&units))
}

/// Writes the time from the sending of a create to the end of its task, or until now.
fn took(task: &Members, now: Timestamp) -> Option<String> {
    let begun = time(task.sent_at.as_ref())?;
    let end = time(task.ended_at.as_ref()).unwrap_or(now);
    Some(span(end.since(begun)))
}

/// Writes the code with its type; only the message, if there is no code.
fn reason(error: &ErrorMembers) -> String {
    let words = error.r#type.as_ref().or(error.message.as_ref());
    let words = words.map(|words| text(words)).unwrap_or_default();
    match error.code {
        Some(code) => format!("{code} {words}").trim_end().to_owned(),
        None => words,
    }
}

/// Counts tasks by their states, and adds up their units.
pub(super) fn summary(tasks: &[ShownTask]) -> String {
    let count = |word: &str| {
        tasks
            .iter()
            .filter(|task| task.members.status == word)
            .count()
    };
    let known = TaskState::ALL.map(TaskState::as_str);
    let counts = known.into_iter().map(|word| (count(word), word));
    let counts: Vec<_> = counts
        .filter(|(count, _)| *count > 0)
        .map(|(count, word)| format!("{count} {word}"))
        .collect();
    let spent = tasks
        .iter()
        .filter_map(|task| task.members.units.as_ref()?.parse().ok());
    let spent = Units(spent.map(|Units(units)| units).sum());
    let unit = if spent == Units(ONE) { "unit" } else { "units" };
    let noun = if tasks.len() == 1 { "task" } else { "tasks" };
    match tasks.len() {
        0 => "no tasks\n".to_owned(),
        all => format!("\n{all} {noun}: {}; {spent} {unit}\n", counts.join(", ")),
    }
}

/// Writes all about one task, one member a line. Members without a value are left out.
pub(super) fn details(task: &ShownTask, now: Timestamp) -> String {
    let palette = Palette::of(&io::stdout());
    let task = &task.members;
    let maybe = |text: &Option<String>| text.clone();
    let ago = |at: &Option<String>| {
        let age = time(at.as_ref()).map(|at| span(now.since(at)));
        Some(format!("{} ({} ago)", at.as_ref()?, age?))
    };
    let mut lines = vec![
        ("status", Some(task.status.clone())),
        ("error", task.error.as_ref().map(reason)),
        (
            "message",
            task.error.as_ref().and_then(|error| error.message.clone()),
        ),
        (
            "solution",
            task.error.as_ref().and_then(|error| error.solution.clone()),
        ),
        ("id", maybe(&task.id)),
        ("ref", Some(task.r#ref.clone())),
        ("external id", maybe(&task.external_id)),
        ("request id", Some(task.request_id.clone())),
        ("account", Some(task.account.clone())),
        ("client", maybe(&task.client)),
        ("path", Some(task.path.clone())),
        ("model", maybe(&task.model)),
        ("units", units(task)),
        ("created", ago(&Some(task.created_at.clone()))),
        ("sent", ago(&task.sent_at)),
        ("ended", ago(&task.ended_at)),
        ("took", took(task, now)),
    ];
    let results = task.results.iter();
    lines.extend(results.map(|result| (&*result.kind, Some(result.url.clone()))));
    let mut all = String::new();
    for (name, value) in lines {
        let Some(value) = value else {
            continue;
        };
        let tone = match name {
            "status" | "error" => tone(&task.status),
            _ => Tone::Normal,
        };
        let (name, value) = (printable(name), long_text(&value));
        let (name, value) = (palette.paint(Tone::Faint, name), palette.paint(tone, value));
        // Writing to a string cannot fail.
        let _ = writeln!(all, "{name:<11}  {value}");
    }
    all
}

/// Returns the tone of a state. A newer proxy may have further states.
fn tone(status: &str) -> Tone {
    match TaskState::from_word(status) {
        Some(TaskState::Succeeded) => Tone::Good,
        Some(TaskState::Failed | TaskState::Rejected) => Tone::Bad,
        Some(TaskState::Unknown) => Tone::Warning,
        Some(TaskState::Canceled) => Tone::Faint,
        _ => Tone::Normal,
    }
}

/// Writes a duration in its largest fitting unit, so that at least two of them have passed, or seconds.
fn span(duration: Duration) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    match duration.as_secs() {
        seconds if seconds < 2 * MINUTE => format!("{seconds} s"),
        seconds if seconds < 2 * HOUR => format!("{} min", seconds / MINUTE),
        seconds if seconds < 2 * DAY => format!("{} h", seconds / HOUR),
        seconds => format!("{} d", seconds / DAY),
    }
}

fn time(text: Option<&String>) -> Option<Timestamp> {
    let time = humantime::parse_rfc3339_weak(text?).ok()?;
    Some(Timestamp::from(time))
}

/// Returns a foreign text without characters that would change the screen.
fn text(foreign: &str) -> String {
    printable(foreign).into_owned()
}

/// Returns the same for a text of any length: an address that is cut off opens nothing.
fn long_text(foreign: &str) -> String {
    let characters: Vec<char> = foreign.chars().collect();
    let parts = characters.chunks(PART);
    parts.map(|part| text(&String::from_iter(part))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn task(id: &str, status: &str, more: &serde_json::Value) -> ShownTask {
        let mut task = json!({
            "ref": "t_1", "id": id, "external_id": null, "request_id": "r", "account": "default", "client": null,
            "path": "/v1/videos/lip-sync", "model": null, "status": status, "error": null, "units": null,
            "estimated_units": null, "created_at": "2027-01-15T07:57:00Z", "sent_at": "2027-01-15T07:57:01Z",
            "ended_at": null, "results": [],
        });
        for (name, value) in more.as_object().unwrap() {
            task[name] = value.clone();
        }
        ShownTask::of_json(task.to_string()).unwrap()
    }

    fn shown(palette: Palette, width: Option<usize>, tasks: &[ShownTask]) -> String {
        let table = Table::new(palette, width, tasks, NOW);
        let rows = tasks.iter().map(|task| table.row(task, NOW));
        table.heading() + &rows.collect::<String>()
    }

    fn refused() -> ShownTask {
        let error = json!({ "code": 1102, "type": "resource_pack_depleted", "message": "no", "solution": "pay" });
        task("8", "rejected", &json!({ "id": null, "error": error }))
    }

    #[test]
    fn table_has_a_row_for_each_task() {
        let ended =
            json!({ "model": "kling-v2-6", "units": "2.5", "ended_at": "2027-01-15T07:57:43Z" });
        let failed = json!({ "client": "app", "error": { "message": "risk\u{1b}[2J" }, "estimated_units": "1" });
        let tasks = [
            task("7", "succeeded", &ended),
            task("9", "failed", &failed),
            refused(),
        ];
        let expected = [
            "age     status      model       units  took   client  id   error",
            "3 min   succeeded   kling-v2-6  2.5    42 s   -       7    -",
            r"3 min   failed      lip-sync    ~1     2 min  app     9    risk\u{1b}[2J",
            "3 min   rejected    lip-sync    -      2 min  -       t_1  1102 resource_pack_depleted",
            "",
        ];
        let shown = shown(Palette::Plain, None, &tasks);
        assert_eq!(shown, expected.join("\n"));
    }

    #[test]
    fn terminal_gets_colours_and_lines_that_fit() {
        let shown = shown(Palette::Colours, Some(60), &[refused()]);
        let row = shown.lines().nth(1).unwrap();
        assert!(row.contains("\u{1b}[1m\u{1b}[31mrejected"), "{row:?}");
        assert!(row.contains("1102 resou…"), "{row:?}");
        assert!(!row.contains("1102 resour"), "{row:?}");
    }

    #[test]
    fn duration_has_one_unit() {
        for (seconds, expected) in [
            (0, "0 s"),
            (119, "119 s"),
            (120, "2 min"),
            (7199, "119 min"),
            (7200, "2 h"),
            (172_800, "2 d"),
        ] {
            assert_eq!(span(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn summary_counts_states_and_adds_up_units() {
        assert_eq!(summary(&[]), "no tasks\n");
        let one = task("1", "succeeded", &json!({ "units": "1" }));
        assert_eq!(summary(&[one]), "\n1 task: 1 succeeded; 1 unit\n");
        let cost = |units: &str| json!({ "units": units });
        let tasks = [
            task("1", "succeeded", &cost("2.5")),
            task("2", "processing", &json!({})),
            task("3", "succeeded", &cost("1")),
        ];
        assert_eq!(
            summary(&tasks),
            "\n3 tasks: 1 processing, 2 succeeded; 3.5 units\n"
        );
    }

    #[test]
    fn address_of_a_result_is_shown_in_full() {
        let url = format!("https://a/{}", "x".repeat(3000));
        let result = json!({ "kind": "video", "url": url });
        let task = task("7", "succeeded", &json!({ "results": [result] }));
        let shown = details(&task, NOW);
        assert!(shown.contains(&url), "{shown}");
    }
}

//! `kling-proxy explain`: the meaning of service codes, and their treatment by the proxy.

use std::io;
use std::str::FromStr;

use serde::Serialize;

use super::{Exit, Failure, Output, say};
use crate::kling::idempotency::Effect;
use crate::kling::service_code::{
    self, Class, Needs, Phrase, Resend, Row, TABLE, UNKNOWN, WITH_RETRY_AFTER,
};
use crate::style::{Palette, Tone};

/// The argument of `explain`.
#[derive(Clone, Copy)]
pub(super) enum CodeOrType {
    /// A number, which the table may not have.
    Code(i64),
    /// The row of a type.
    Type(&'static Row),
}

/// A row of the table, in the form of the JSON output.
#[derive(Serialize)]
struct ShownCode {
    /// `None` for the row of all codes that the table does not have.
    code: Option<u16>,
    status: u16,
    actionable_status: u16,
    r#type: &'static str,
    source: &'static str,
    class: &'static str,
    definition: &'static str,
    explanation: &'static str,
    solution: &'static str,
    hint: Option<&'static str>,
    retryable: &'static str,
    resent: &'static str,
    retry_after: Option<u64>,
    closes_connection: bool,
    phrases: Vec<ShownPhrase>,
}

/// A phrase of a message, in the form of the JSON output.
#[derive(Serialize)]
struct ShownPhrase {
    text: &'static str,
    needs: &'static str,
}

pub(super) fn run(code: Option<CodeOrType>, output: Output) -> Result<(), Failure> {
    let row = match code {
        None => None,
        Some(CodeOrType::Type(row)) => Some(row),
        Some(CodeOrType::Code(code)) => Some(service_code::find(code).ok_or_else(|| {
            Failure::new(
                Exit::Failed,
                format!("{code} is not in the table; `explain` lists all"),
            )
        })?),
    };
    match (output, row) {
        (Output::Json, None) => say(json(&TABLE.iter().map(ShownCode::from).collect::<Vec<_>>())),
        (Output::Json, Some(row)) => say(json(&ShownCode::from(row))),
        (Output::Text, None) => say_table(Palette::of(&io::stdout())),
        (Output::Text, Some(row)) => say_row(row, Palette::of(&io::stdout())),
    }
    Ok(())
}

/// Prints all rows of the table, one line each.
fn say_table(palette: Palette) {
    let heading = format!(
        "{:<5} {:<7} {:<28} {:<10} {:<7} meaning",
        "code", "status", "type", "retryable", "resent"
    );
    say(palette.paint(Tone::Strong, heading));
    for row in TABLE {
        let Row {
            code, kind, resend, ..
        } = row;
        let status = row.status.as_u16();
        let status = palette.paint(Tone::of_status(status), status);
        let texts = [row.explanation, row.definition];
        let meaning = texts.into_iter().find(|text| *text != NONE);
        say(format_args!(
            "{code:<5} {status:<7} {kind:<28} {:<10} {:<7} {}",
            retryable(*resend).0,
            resent(*resend).0,
            meaning.unwrap_or_default()
        ));
    }
}

/// Prints one row of the table, one line per column.
fn say_row(row: &Row, palette: Palette) {
    let title = match shown_code(row) {
        Some(code) => format!("{code} {}", row.kind),
        None => row.kind.to_owned(),
    };
    say(palette.paint(Tone::Strong, title));
    for (name, text) in columns(row) {
        let tone = match name {
            "status" => Tone::of_status(row.status.as_u16()),
            _ => Tone::Normal,
        };
        let (name, text) = (palette.paint(Tone::Faint, name), palette.paint(tone, text));
        say(format_args!("  {name:<12} {text}"));
    }
}

/// The vendor's table has this where it has no text.
const NONE: &str = "-";

/// Returns the code of a row; `None` for the row of all codes that the table does not have.
fn shown_code(row: &Row) -> Option<u16> {
    (row.class != Class::Unknown).then_some(row.code)
}

// === impl CodeOrType ===

impl FromStr for CodeOrType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(code) = text.parse() {
            return Ok(Self::Code(code));
        }
        let rows = || TABLE.iter().chain([&UNKNOWN]);
        if let Some(row) = rows().find(|row| row.kind == text) {
            return Ok(Self::Type(row));
        }
        let distance = |row: &&Row| strsim::levenshtein(row.kind, text);
        let nearest = rows().min_by_key(distance).map_or("", |row| row.kind);
        Err(format!(
            "no code and no type of the table; the nearest is {nearest}"
        ))
    }
}

// === impl ShownCode ===

impl From<&Row> for ShownCode {
    fn from(row: &Row) -> Self {
        Self {
            code: shown_code(row),
            status: row.status.as_u16(),
            actionable_status: row.actionable_status.as_u16(),
            r#type: row.kind,
            source: row.source(),
            class: row.class.describe().0,
            definition: row.definition,
            explanation: row.explanation,
            solution: row.solution,
            hint: row.hint,
            retryable: retryable(row.resend).0,
            resent: resent(row.resend).0,
            retry_after: retry_after(row),
            closes_connection: row.closes_connection,
            phrases: row.phrases.iter().map(ShownPhrase::from).collect(),
        }
    }
}

impl From<&Phrase> for ShownPhrase {
    fn from(phrase: &Phrase) -> Self {
        Self {
            text: phrase.text,
            needs: needed(phrase.needs).0,
        }
    }
}

fn json(value: &impl Serialize) -> String {
    // A struct of texts and numbers cannot fail to serialise.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// Lists the columns of a row as text, without those that have no value for it.
fn columns(row: &Row) -> Vec<(&'static str, String)> {
    let sender = match row.source() {
        "proxy" => "the proxy",
        _ => "Kling",
    };
    let (class, subject) = row.class.describe();
    let status = match row.class {
        Class::Unknown => format!("Kling's, or {} if that is a success", row.status),
        _ => row.status.to_string(),
    };
    let mut columns = vec![
        ("status", status),
        ("sent by", sender.to_owned()),
        ("class", format!("{class}: {subject}")),
    ];
    let texts = [
        ("definition", row.definition),
        ("explanation", row.explanation),
        ("solution", row.solution),
    ];
    let given = texts.into_iter().filter(|(_, text)| *text != NONE);
    columns.extend(given.map(|(name, text)| (name, text.to_owned())));
    columns.extend(row.hint.map(|hint| ("hint", hint.to_owned())));
    columns.extend(row.phrases.iter().map(|phrase| {
        let (_, needs) = needed(phrase.needs);
        ("message", format!("with \"{}\": {needs}", phrase.text))
    }));
    match row.class {
        Class::Success => columns.push(("retryable", "no: there is no error".to_owned())),
        Class::Unknown => columns.push((
            "retryable",
            "a read, if the status is 5xx; a create, no".to_owned(),
        )),
        _ => {
            columns.push(("retryable", retryable(row.resend).1.to_owned()));
            columns.push(("resent", resent(row.resend).1.to_owned()));
        }
    }
    columns.extend(retry_after(row).map(|seconds| {
        let text = format!("{seconds} s, unless Kling names another time");
        ("retry-after", text)
    }));
    if row.actionable_status != row.status {
        let text = format!(
            "{}, with errors.status = \"actionable\"",
            row.actionable_status
        );
        columns.push(("actionable", text));
    }
    if row.closes_connection {
        columns.push(("connection", "closed after the answer".to_owned()));
    }
    columns
}

/// Returns the seconds of `Retry-After`; `None` for a row whose answers have no such header.
fn retry_after(row: &Row) -> Option<u64> {
    let waits = row.resend.allows(Effect::Read) && WITH_RETRY_AFTER.contains(&row.status);
    waits.then_some(row.retry_after.as_secs())
}

/// Returns a word and a sentence on the requests that a client may send again.
fn retryable(resend: Resend) -> (&'static str, &'static str) {
    match [Effect::Read, Effect::Create].map(|effect| resend.allows(effect)) {
        [_, true] => ("yes", "yes: nothing was done, send it again later"),
        [true, false] => (
            "reads",
            "yes for reads; no for creates: a task may exist, look it up first",
        ),
        [false, false] => ("no", "no: something has to change first"),
    }
}

/// Returns a word and a sentence on the requests that the proxy sends again.
fn resent(resend: Resend) -> (&'static str, &'static str) {
    match resend {
        Resend::Never | Resend::ByClient => ("no", "no"),
        Resend::Reads => ("reads", "a read, soon; a create, never"),
        Resend::Unsent => ("yes", "yes, soon"),
        Resend::Refused => ("later", "yes, after a longer wait each time"),
        Resend::NewToken => (
            "once",
            "once, with a new token; with an API key, not at all",
        ),
    }
}

/// Returns a word and a sentence on the credential that a message asks for.
fn needed(needs: Needs) -> (&'static str, &'static str) {
    match needs {
        Needs::ApiKey => ("api_key", "an API key is needed"),
        Needs::KeyPair => ("key_pair", "an access key and a secret key are needed"),
    }
}

//! `kling-proxy explain`: what the codes mean and how the proxy treats them.

use serde::Serialize;

use super::{Exit, Failure, Output, say};
use crate::service_code::{self, Retry, Row, TABLE};

/// A row as JSON shows it.
#[derive(Serialize)]
struct Shown {
    code: u16,
    status: u16,
    r#type: &'static str,
    source: &'static str,
    definition: &'static str,
    explanation: &'static str,
    solution: &'static str,
    retryable: &'static str,
}

pub(super) fn run(code: Option<i64>, output: Output) -> Result<(), Failure> {
    let row = match code {
        None => None,
        Some(code) => Some(service_code::find(code).ok_or_else(|| {
            Failure::new(
                Exit::Failed,
                format!("{code} is not in the table; `explain` lists all"),
            )
        })?),
    };
    match (output, row) {
        (Output::Json, None) => say(json(&TABLE.iter().map(Shown::from).collect::<Vec<_>>())),
        (Output::Json, Some(row)) => say(json(&Shown::from(row))),
        (Output::Text, None) => {
            say(format_args!(
                "{:<5} {:<7} {:<28} {:<10} meaning",
                "code", "status", "type", "retryable"
            ));
            for row in TABLE {
                let Row {
                    code,
                    kind,
                    explanation,
                    ..
                } = row;
                let status = row.status.as_u16();
                say(format_args!(
                    "{code:<5} {status:<7} {kind:<28} {:<10} {explanation}",
                    retryable(row.retry)
                ));
            }
        }
        (Output::Text, Some(row)) => {
            say(format_args!("{} {}", row.code, row.kind));
            for (name, text) in [
                ("status", row.status.to_string().as_str()),
                (
                    "sent by",
                    if row.source() == "proxy" {
                        "the proxy"
                    } else {
                        "Kling"
                    },
                ),
                ("definition", row.definition),
                ("explanation", row.explanation),
                ("solution", row.solution),
                ("retryable", treatment(row.retry)),
            ] {
                say(format_args!("  {name:<12} {text}"));
            }
        }
    }
    Ok(())
}

// === impl Shown ===

impl From<&Row> for Shown {
    fn from(row: &Row) -> Self {
        Self {
            code: row.code,
            status: row.status.as_u16(),
            r#type: row.kind,
            source: row.source(),
            definition: row.definition,
            explanation: row.explanation,
            solution: row.solution,
            retryable: retryable(row.retry),
        }
    }
}

fn json(value: &impl Serialize) -> String {
    // A struct of texts and numbers cannot fail to serialise.
    serde_json::to_string_pretty(value).unwrap_or_default()
}

fn retryable(retry: Retry) -> &'static str {
    match retry {
        Retry::Never => "no",
        Retry::Reads => "reads",
        Retry::Any => "yes",
    }
}

fn treatment(retry: Retry) -> &'static str {
    match retry {
        Retry::Never => "no: something has to change first",
        Retry::Reads => "a read, yes; a create, no: its task may exist, look it up first",
        Retry::Any => "yes: nothing was done, send it again later",
    }
}

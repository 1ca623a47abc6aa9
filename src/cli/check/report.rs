//! The results of the steps, printed as text while they run, or as one JSON object at the end.

use std::io;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::cli::{Exit, Failure, Output, say};
use crate::style::{Palette, Tone};

/// Result of a step: a finding, or the fault that made the step fail.
pub(super) type StepResult<T = ()> = Result<Finding<T>, Fault>;

/// Result of a step that did not fail.
pub(super) struct Finding<T = ()> {
    /// Value that later steps use.
    pub(super) value: T,
    text: String,
    warnings: Vec<Problem>,
}

/// Reason why a step failed, and the problems to correct.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    exit: Exit,
    text: String,
    problems: Vec<Problem>,
}

/// A problem that the user has to correct.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Problem {
    /// Stable name of the problem, for scripts.
    r#type: &'static str,
    /// Next thing for the user to do.
    advice: String,
}

/// The results of all steps that have run.
pub(super) struct Report {
    output: Output,
    /// Colours of the text on standard output.
    palette: Palette,
    steps: Vec<Step>,
    /// Exit code of the first step that failed.
    exit: Option<Exit>,
}

#[derive(Serialize)]
struct Step {
    #[serde(rename = "step")]
    name: &'static str,
    status: Status,
    found: String,
    problems: Vec<Problem>,
    took_ms: u128,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warning,
    Failure,
}

/// The whole report, in the form of the JSON output.
#[derive(Serialize)]
struct ShownReport<'a> {
    status: Status,
    exit_code: u8,
    steps: &'a [Step],
}

// === impl Finding ===

impl<T> Finding<T> {
    pub(super) fn new(value: T, text: impl Into<String>) -> Self {
        Self {
            value,
            text: text.into(),
            warnings: Vec::new(),
        }
    }

    /// Adds a problem that should be corrected, although the proxy works.
    pub(super) fn warn(&mut self, r#type: &'static str, advice: impl Into<String>) {
        self.warnings.push(Problem::new(r#type, advice));
    }
}

// === impl Fault ===

impl Fault {
    pub(super) fn new(
        exit: Exit,
        r#type: &'static str,
        text: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            exit,
            text: text.into(),
            problems: vec![Problem::new(r#type, advice)],
        }
    }

    /// Creates a fault with one problem for each wrong setting.
    pub(super) fn of_settings(problems: &[String]) -> Self {
        let problem = |advice: &String| Problem::new("wrong_settings", advice);
        Self {
            exit: Exit::Settings,
            text: format!("{} to correct", problems.len()),
            problems: problems.iter().map(problem).collect(),
        }
    }
}

// === impl Problem ===

impl Problem {
    fn new(r#type: &'static str, advice: impl Into<String>) -> Self {
        Self {
            r#type,
            advice: advice.into(),
        }
    }
}

// === impl Report ===

impl Report {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            palette: Palette::of(&io::stdout()),
            steps: Vec::new(),
            exit: None,
        }
    }

    /// Runs a step and adds its result. Returns the value of the finding, or `None` if the step failed.
    pub(super) fn take<T>(
        &mut self,
        name: &'static str,
        step: impl FnOnce() -> StepResult<T>,
    ) -> Option<T> {
        let start = Instant::now();
        let outcome = step();
        self.add(name, start.elapsed(), outcome).ok()
    }

    /// Waits for a step and adds its result. Returns the value of the finding, or the fault.
    pub(super) async fn wait<T>(
        &mut self,
        name: &'static str,
        step: impl Future<Output = StepResult<T>>,
    ) -> Result<T, Fault> {
        let start = Instant::now();
        let outcome = step.await;
        self.add(name, start.elapsed(), outcome)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.exit.is_some()
    }

    /// Prints the report if the output is JSON. Returns an error with the exit code if a step failed.
    pub(super) fn end(self) -> Result<(), Failure> {
        if let Output::Json = self.output {
            let worst = match self.exit {
                Some(_) => Status::Failure,
                None if self.steps.iter().any(|step| step.status != Status::Ok) => Status::Warning,
                None => Status::Ok,
            };
            let shown = ShownReport {
                status: worst,
                exit_code: self.exit.map_or(0, |exit| exit as u8),
                steps: &self.steps,
            };
            // A struct of texts and numbers cannot fail to serialise.
            say(serde_json::to_string_pretty(&shown).unwrap_or_default());
        }
        self.exit.map_or(Ok(()), |exit| {
            Err(Failure {
                exit,
                lines: Vec::new(),
            })
        })
    }

    fn add<T>(
        &mut self,
        name: &'static str,
        took: Duration,
        outcome: StepResult<T>,
    ) -> Result<T, Fault> {
        let (status, found, problems, outcome) = match outcome {
            Ok(Finding {
                value,
                text,
                warnings,
            }) => {
                let status = if warnings.is_empty() {
                    Status::Ok
                } else {
                    Status::Warning
                };
                (status, text, warnings, Ok(value))
            }
            Err(fault) => {
                self.exit.get_or_insert(fault.exit);
                let Fault { text, problems, .. } = fault.clone();
                (Status::Failure, text, problems, Err(fault))
            }
        };
        let step = Step {
            name,
            status,
            found,
            problems,
            took_ms: took.as_millis(),
        };
        if let Output::Text = self.output {
            step.tell(self.palette);
        }
        self.steps.push(step);
        outcome
    }
}

// === impl Step ===

impl Step {
    fn tell(&self, palette: Palette) {
        let Self {
            name,
            found,
            took_ms,
            ..
        } = self;
        let (status, tone) = match self.status {
            Status::Ok => ("ok", Tone::Good),
            Status::Warning => ("warning", Tone::Warning),
            Status::Failure => ("FAILED", Tone::Bad),
        };
        let status = palette.paint(tone, status);
        let took = palette.paint(Tone::Faint, format!("({took_ms} ms)"));
        say(format_args!("{status:<8} {name:<13}  {found} {took}"));
        for Problem { advice, .. } in &self.problems {
            let arrow = palette.paint(tone, "->");
            say(format_args!("{:<24}{arrow} {advice}", ""));
        }
    }
}

//! Words in a request that ask the sandbox for a fault, such as `sandbox:1303`.

use std::time::Duration;

use serde_json::Value;

use super::reply::Refusal;

/// Faults that a request asks for. If it asks for several of one kind, the last one counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fault {
    /// Time between the creation of the task and the response: `sandbox:slow=5s`.
    pub(super) delay: Duration,
    /// Time from the creation of the task to its end: `sandbox:duration=40s`. If it is `None`,
    /// `sandbox.task_time`.
    pub(super) duration: Option<Duration>,
    pub(super) ending: Ending,
}

/// Outcome of a create request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    #[default]
    Succeed,
    /// `sandbox:failed`: a task that fails, or a response that nothing was found.
    Fail,
    /// `sandbox:CODE`, or `sandbox:CODE@STATUS` for another HTTP status than the documented one. No task is
    /// created.
    Refuse(Refusal),
    /// `sandbox:html`: the page of a broken gateway. No task is created.
    BrokenGateway,
    /// `sandbox:reset`: a task is created, but the connection is dropped instead of a response.
    Reset,
    /// `sandbox:lost`: a task is created, but the response is the page of a broken gateway.
    Lost,
}

const MARK: &str = "sandbox:";

const LONGEST_DELAY: Duration = Duration::from_mins(10);

/// Longest duration of a task, which is also the longest `sandbox.task_time`.
const LONGEST_TASK: Duration = Duration::from_hours(24);

// === impl Fault ===

impl Fault {
    /// Finds the fault words in all texts of a body, because the field of the prompt differs between
    /// endpoints, and some endpoints have no prompt.
    ///
    /// # Errors
    ///
    /// 1201 for an unknown word after `sandbox:`, because a test with a typing error must not pass.
    pub(super) fn of(body: &Value) -> Result<Self, Refusal> {
        let mut fault = Self::default();
        fault.read(body)?;
        Ok(fault)
    }

    fn read(&mut self, value: &Value) -> Result<(), Refusal> {
        match value {
            Value::String(text) => self.read_text(text),
            Value::Array(items) => items.iter().try_for_each(|item| self.read(item)),
            Value::Object(fields) => fields.values().try_for_each(|value| self.read(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
        }
    }

    fn read_text(&mut self, text: &str) -> Result<(), Refusal> {
        for (start, _) in text.match_indices(MARK) {
            let (before, rest) = (&text[..start], &text[start + MARK.len()..]);
            if before.ends_with("//") {
                continue; // a URL with the host `sandbox` and a port
            }
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '=' && c != '@');
            match &rest[..end.unwrap_or(rest.len())] {
                "" => {}
                "failed" => self.ending = Ending::Fail,
                "lost" => self.ending = Ending::Lost,
                "html" => self.ending = Ending::BrokenGateway,
                "reset" => self.ending = Ending::Reset,
                word => {
                    if let Some(delay) = time(word, "slow=") {
                        self.delay = delay.min(LONGEST_DELAY);
                    } else if let Some(duration) = time(word, "duration=") {
                        self.duration = Some(duration.min(LONGEST_TASK));
                    } else if let Some(refusal) = refusal(word) {
                        self.ending = Ending::Refuse(refusal);
                    } else {
                        return Err(Refusal::parameter(format!("Unknown trigger {MARK}{word}")));
                    }
                }
            }
        }
        Ok(())
    }
}

fn time(word: &str, name: &str) -> Option<Duration> {
    humantime::parse_duration(word.strip_prefix(name)?).ok()
}

fn refusal(word: &str) -> Option<Refusal> {
    let (code, status) = match word.split_once('@') {
        Some((code, status)) => (code, Some(status)),
        None => (word, None),
    };
    let mut refusal = Refusal::documented(code.parse().ok()?);
    if let Some(status) = status {
        refusal.status = status.parse().ok()?;
    }
    // An interim status would leave the client waiting for a final one.
    (!refusal.status.is_informational()).then_some(refusal)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(prompt: &str) -> Result<Fault, Refusal> {
        Fault::of(&json!({ "prompt": prompt }))
    }

    #[test]
    fn a_code_is_answered_with_its_documented_status_or_the_one_asked_for() {
        for (prompt, code, status) in [
            ("a cat sandbox:1303", 1303, 429),
            ("sandbox:1103, please", 1103, 403),
            ("(sandbox:5002)", 5002, 504),
            ("sandbox:1999", 1999, 400),
            ("sandbox:1303@200", 1303, 200),
            ("sandbox:5000. sandbox:1000.", 1000, 401),
        ] {
            let Ok(Fault {
                ending: Ending::Refuse(refusal),
                ..
            }) = parse(prompt)
            else {
                panic!("no refusal in {prompt:?}");
            };
            assert_eq!(
                (refusal.code, refusal.status.as_u16()),
                (code, status),
                "{prompt:?}"
            );
        }
    }

    #[test]
    fn every_other_trigger_is_found_anywhere_in_a_prompt() {
        let seconds = Duration::from_secs;
        for (prompt, delay, ending) in [
            ("a cat", seconds(0), Ending::Succeed),
            (
                "children in a sandbox: playing",
                seconds(0),
                Ending::Succeed,
            ),
            ("sandbox:failed.", seconds(0), Ending::Fail),
            ("x sandbox:html y", seconds(0), Ending::BrokenGateway),
            ("xsandbox:reset", seconds(0), Ending::Reset),
            ("sandbox:lost", seconds(0), Ending::Lost),
            ("sandbox:slow=5s", seconds(5), Ending::Succeed),
            ("sandbox:slow=5s sandbox:reset", seconds(5), Ending::Reset),
            ("sandbox:slow=1year", LONGEST_DELAY, Ending::Succeed),
        ] {
            let fault = Fault {
                delay,
                duration: None,
                ending,
            };
            assert_eq!(parse(prompt), Ok(fault), "{prompt:?}");
        }
    }

    #[test]
    fn a_prompt_says_how_long_its_task_lasts() {
        for (prompt, duration) in [
            ("a cat", None),
            ("a cat sandbox:duration=40s", Some(Duration::from_secs(40))),
            ("sandbox:duration=1m30s.", Some(Duration::from_secs(90))),
            ("sandbox:duration=0s", Some(Duration::ZERO)),
            ("sandbox:duration=1year", Some(LONGEST_TASK)),
        ] {
            let fault = parse(prompt).unwrap();
            assert_eq!(fault.duration, duration, "{prompt:?}");
        }
    }

    #[test]
    fn a_trigger_is_found_in_every_text_of_a_body() {
        for body in [
            json!({ "text": "sandbox:failed" }),
            json!({ "contents": [{ "type": "prompt", "text": "a cat sandbox:failed" }] }),
            json!({ "input": { "images": ["https://a.test/sandbox:failed.png"] } }),
        ] {
            let fault = Fault::of(&body).unwrap();
            assert_eq!(fault.ending, Ending::Fail, "{body}");
        }
    }

    #[test]
    fn a_host_called_sandbox_is_no_trigger() {
        let body =
            json!({ "image": "http://sandbox:5548/results/1.png", "n": 1, "x": [null, true] });
        assert_eq!(Fault::of(&body), Ok(Fault::default()));
    }

    #[test]
    fn a_mistyped_trigger_is_refused() {
        for word in [
            "faild",
            "slow",
            "slow=",
            "slow=5",
            "duration=40",
            "duration",
            "losts",
            "1303@",
            "1303@99",
            "1303@100",
            "99999",
            "=",
            "Ü",
        ] {
            let outcome = parse(&format!("sandbox:{word}"));
            assert_eq!(outcome.is_err(), word != "Ü", "{word}");
        }
    }
}

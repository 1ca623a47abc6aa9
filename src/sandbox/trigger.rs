//! Words in a prompt that ask the sandbox for a fault, such as `sandbox:1303`.

use std::time::Duration;

use super::reply::Refusal;

/// What a prompt asks for; of several wishes of one sort the last counts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Trigger {
    /// Time between the creation of the task and the answer: `sandbox:slow=5s`.
    pub(super) delay: Duration,
    pub(super) ending: Ending,
}

/// How a create ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Ending {
    #[default]
    Succeed,
    /// `sandbox:failed`: a task that fails.
    Fail,
    /// `sandbox:CODE`, or `sandbox:CODE@STATUS` for another HTTP status than the documented one: no task.
    Refuse(Refusal),
    /// `sandbox:html`: the page of a broken gateway, and no task.
    BrokenGateway,
    /// `sandbox:reset`: a task, but the connection is dropped instead of an answer.
    Reset,
}

const MARK: &str = "sandbox:";

const LONGEST_DELAY: Duration = Duration::from_mins(10);

// === impl Trigger ===

impl Trigger {
    /// Finds the triggers of a prompt.
    ///
    /// # Errors
    ///
    /// 1201 for a word after `sandbox:` that is none: a test with a typing error must not pass.
    pub(super) fn parse(prompt: &str) -> Result<Self, Refusal> {
        let mut trigger = Self::default();
        for text in prompt.split(MARK).skip(1) {
            let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '=' && c != '@');
            match &text[..end.unwrap_or(text.len())] {
                "" => {}
                "failed" => trigger.ending = Ending::Fail,
                "html" => trigger.ending = Ending::BrokenGateway,
                "reset" => trigger.ending = Ending::Reset,
                word => {
                    if let Some(delay) = delay(word) {
                        trigger.delay = delay;
                    } else if let Some(refusal) = refusal(word) {
                        trigger.ending = Ending::Refuse(refusal);
                    } else {
                        return Err(Refusal::parameter(format!("Unknown trigger {MARK}{word}")));
                    }
                }
            }
        }
        Ok(trigger)
    }
}

fn delay(word: &str) -> Option<Duration> {
    let delay = humantime::parse_duration(word.strip_prefix("slow=")?).ok()?;
    Some(delay.min(LONGEST_DELAY))
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
    use super::*;

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
            let Ok(Trigger {
                ending: Ending::Refuse(refusal),
                ..
            }) = Trigger::parse(prompt)
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
            ("sandbox:slow=5s", seconds(5), Ending::Succeed),
            ("sandbox:slow=5s sandbox:reset", seconds(5), Ending::Reset),
            ("sandbox:slow=1year", LONGEST_DELAY, Ending::Succeed),
        ] {
            assert_eq!(
                Trigger::parse(prompt),
                Ok(Trigger { delay, ending }),
                "{prompt:?}"
            );
        }
    }

    #[test]
    fn a_mistyped_trigger_is_refused() {
        for word in [
            "faild", "slow", "slow=", "slow=5", "1303@", "1303@99", "1303@100", "99999", "=", "Ü",
        ] {
            let outcome = Trigger::parse(&format!("sandbox:{word}"));
            assert_eq!(outcome.is_err(), word != "Ü", "{word}");
        }
    }
}

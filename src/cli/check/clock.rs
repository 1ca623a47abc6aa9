//! Compares this machine's clock with upstream's. Tokens begin and end by the clock, so the two must not
//! differ by much.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use humantime::format_duration;

use super::account::{ApiResponse, Credentials};
use super::network::Target;
use super::report::{Fault, Finding, StepResult};
use crate::auth::token::Credential;
use crate::cli::Exit;
use crate::clock::Clock;
use crate::kling::service_code::Class;
use crate::upstream::{ClockReading, UpstreamClock, shifted};

/// Largest difference without a warning. The default of `token.not_before_leeway` covers the same difference,
/// and a larger one cannot come from rounding.
const TOLERATED: Duration = Duration::from_secs(5);
/// Smallest difference that counts, in milliseconds. `Date` has only whole seconds, so clocks that differ by
/// less agree.
const RESOLUTION: u64 = 1_000;

/// Upstream's clock: this machine's clock, shifted by the difference that a response showed.
struct Corrected {
    machine: Arc<dyn Clock>,
    /// Milliseconds by which upstream's clock is ahead.
    offset: i64,
}

/// Compares this machine's clock with the `Date` of a response. If upstream refused the token for its time,
/// returns the clock by which the proxy mints the next token.
pub(super) fn compare(
    answer: &ApiResponse,
    target: &Target,
    credentials: &Credentials,
) -> StepResult<Option<Arc<dyn Clock>>> {
    let Some(date) = answer.date else {
        return Ok(Finding::new(None, "upstream told no Date to compare with"));
    };
    let offset = offset(date, answer.asked, answer.answered);
    let distance = rounded(offset);
    let text = match offset {
        0 => "agrees with upstream's".to_owned(),
        1.. => format!("{} behind upstream's", format_duration(distance)),
        _ => format!("{} ahead of upstream's", format_duration(distance)),
    };
    let is_corrected = UpstreamClock::corrects(&target.origin, distance);
    let is_pair = matches!(credentials.credential, Credential::Pair { .. });
    let refused = is_pair && offset != 0 && answer.row().class == Class::TokenTime;
    let advice = if is_corrected {
        "set this machine's clock, best by NTP; meanwhile the proxy makes tokens by upstream's"
    } else {
        "set this machine's clock, best by NTP: tokens begin and end by it"
    };
    if refused && !is_corrected {
        let text = format!("{text}, and upstream refuses the token for it");
        return Err(Fault::new(Exit::Failed, "clock_wrong", text, advice));
    }
    let corrected = || -> Arc<dyn Clock> {
        Arc::new(Corrected {
            machine: Arc::clone(&credentials.clock),
            offset,
        })
    };
    let mut found = Finding::new(refused.then(corrected), text);
    if refused || distance > TOLERATED {
        found.warn("clock_wrong", advice);
    }
    Ok(found)
}

// === impl Corrected ===

impl Clock for Corrected {
    fn now(&self) -> SystemTime {
        shifted(self.machine.now(), self.offset)
    }
}

/// Returns the milliseconds by which upstream's clock is ahead of this machine's, as the proxy would
/// learn them from this response; 0 if the clocks agree.
fn offset(date: SystemTime, asked: SystemTime, answered: SystemTime) -> i64 {
    let round_trip = answered.duration_since(asked).unwrap_or_default();
    let offset = ClockReading::new(date, answered, round_trip).offset(0);
    if offset.unsigned_abs() < RESOLUTION {
        0
    } else {
        offset
    }
}

/// Returns the size of an offset in milliseconds, rounded to whole seconds for display.
fn rounded(offset: i64) -> Duration {
    Duration::from_secs((offset.unsigned_abs() + 500) / 1_000)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn the_time_an_answer_takes_is_no_skew() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (date, asked, answered, ahead) in [
            (1_000, 1_000, 1_000, 0),
            (1_000, 1_001, 1_001, 0),
            (1_010, 1_000, 1_020, 0),
            (1_000, 1_011, 1_012, -11_000),
            (1_600, 1_000, 1_001, 600_000),
        ] {
            let found = offset(at(date), at(asked), at(answered));
            assert_eq!(found, ahead, "{date} {asked}");
        }
    }
}

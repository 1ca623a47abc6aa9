//! The clock: tokens begin and end by it, so it must not be far from upstream's.

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use humantime::format_duration;

use super::account::{Answer, Credentials};
use super::network::Way;
use super::report::{Fault, Found, Outcome};
use crate::auth::token::Credential;
use crate::cli::Exit;
use crate::clock::Clock;
use crate::kling::service_code::Class;
use crate::upstream::UpstreamClock;

/// More than this is no rounding; the default of `token.not_before_leeway` covers as much.
const TOLERATED: Duration = Duration::from_secs(5);
/// `Date` has whole seconds.
const RESOLUTION: Duration = Duration::from_secs(1);

/// Upstream's clock, as its answer told it.
struct Corrected {
    machine: Arc<dyn Clock>,
    /// Which way the machine's is wrong, and how far.
    skew: (Ordering, Duration),
}

/// Compares this machine's clock with the `Date` of an answer. Where the token was refused for its
/// time, hands on the clock that the proxy makes the next one by.
pub(super) fn compare(
    answer: &Answer,
    way: &Way,
    credentials: &Credentials,
) -> Outcome<Option<Arc<dyn Clock>>> {
    let Some(date) = answer.date else {
        return Ok(Found::new(None, "upstream told no Date to compare with"));
    };
    let (direction, distance) = skew(date, answer.asked, answer.answered);
    let text = match direction {
        Ordering::Equal => "agrees with upstream's".to_owned(),
        Ordering::Less => format!("{} behind upstream's", format_duration(distance)),
        Ordering::Greater => format!("{} ahead of upstream's", format_duration(distance)),
    };
    let is_corrected = UpstreamClock::corrects(&way.origin, distance);
    let is_pair = matches!(credentials.credential, Credential::Pair { .. });
    let refused = is_pair && !distance.is_zero() && answer.row().class == Class::TokenTime;
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
            skew: (direction, distance),
        })
    };
    let mut found = Found::new(refused.then(corrected), text);
    if refused || distance > TOLERATED {
        found.warn("clock_wrong", advice);
    }
    Ok(found)
}

// === impl Corrected ===

impl Clock for Corrected {
    fn now(&self) -> SystemTime {
        let now = self.machine.now();
        match self.skew {
            (Ordering::Greater, ahead) => now - ahead,
            (_, behind) => now + behind,
        }
    }
}

/// How far our clock is from upstream's, to the second. Upstream's stood at `date`, or less than a
/// second later, at some moment between our times of asking and being answered.
fn skew(date: SystemTime, asked: SystemTime, answered: SystemTime) -> (Ordering, Duration) {
    let seconds = |skew: Duration| Duration::from_secs((skew + RESOLUTION / 2).as_secs());
    let date = date + RESOLUTION / 2;
    match (date.duration_since(answered), asked.duration_since(date)) {
        (Ok(behind), _) if behind >= RESOLUTION => (Ordering::Less, seconds(behind)),
        (_, Ok(ahead)) if ahead >= RESOLUTION => (Ordering::Greater, seconds(ahead)),
        _ => (Ordering::Equal, Duration::ZERO),
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn the_time_an_answer_takes_is_no_skew() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (date, asked, answered, skew_found) in [
            (1_000, 1_000, 1_000, (Ordering::Equal, 0)),
            (1_000, 1_001, 1_001, (Ordering::Equal, 0)),
            (1_010, 1_000, 1_020, (Ordering::Equal, 0)),
            (1_000, 1_011, 1_012, (Ordering::Greater, 11)),
            (1_600, 1_000, 1_001, (Ordering::Less, 600)),
        ] {
            let (direction, skew) = skew(at(date), at(asked), at(answered));
            assert_eq!((direction, skew.as_secs()), skew_found, "{date} {asked}");
        }
    }
}

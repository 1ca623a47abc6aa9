//! What time it is at upstream, learned from the `Date` of its answers. Upstream judges tokens by
//! its own clock, so that is the one they are made by.
//!
//! A `Date` proves nothing: a gateway may have written it that never sees a token. What proves a clock is
//! that upstream accepts a token that was minted by it. So an offset of over 5 minutes from our clock is on
//! trial until then. In the table "far" is over 5 minutes from where the state began.
//!
//! | state, and what tokens are minted by | most answers say: far | one is accepted | one is refused for its time | another one is, before one is accepted |
//! | --- | --- | --- | --- | --- |
//! | `Start`: our clock, unproven | `Trial` of that | `Own` | what its `Date` says | `Own` |
//! | `Own`: our clock | nothing changes | `Own` | what its `Date` says | `Own` |
//! | `Trial`: an offset, unproven | `Trial` of that, or `Start` | `Confirmed` | what its `Date` says; `Own` if that is no news | `Own` |
//! | `Confirmed`: an offset | nothing changes | `Confirmed` | what its `Date` says | `Own` |
//!
//! What a `Date` says is `Own` up to 5 minutes from our clock, else `Trial`. Where a refusal has none, the
//! next answers decide: `Start` or `Trial`. So `Date` and our clock take turns while upstream refuses
//! tokens, and other answers cannot keep either from its turn. What is not far counts at once, if most
//! answers say it.

use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::{AGE, DATE};
use tokio::time::Instant;

use super::clock_reading::{ClockReading, GREATEST, shifted};
use super::origin::Origin;
use crate::clock::{Clock, Correction};
use crate::telemetry::metrics::Metrics;

/// How many samples count: one or two that are wrong do not.
const SAMPLES: usize = 5;
/// Between samples, so that they do not all come from one bad moment, and busy days cost nothing.
const INTERVAL: Duration = Duration::from_secs(1);
/// A difference of more is on trial first.
const FAR: i64 = 5 * 60 * 1_000;
/// A difference of more is worth a line in the log: `token.not_before_leeway` will not cover much
/// more of it.
const NOTABLE: i64 = 3_000;

/// The clock of upstream: this machine's, corrected by what was learned. Reading it takes no lock.
pub struct UpstreamClock {
    machine: Arc<dyn Clock>,
    /// How far upstream is ahead, in milliseconds.
    offset: AtomicI64,
    /// How often the clock was set anew.
    correction: AtomicU32,
    /// Whether a token was accepted that was minted by this correction.
    is_proven: AtomicBool,
    history: Mutex<History>,
    /// When the next sample is due, in milliseconds after `start`.
    due: AtomicU64,
    start: Instant,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct History {
    state: State,
    /// The offset with which the state began; 0 for our clock.
    base: i64,
    /// The clock was set by the `Date` of a refusal. If it is refused too, our clock is next.
    own_is_next: bool,
    /// Offsets in milliseconds, the oldest first.
    samples: Vec<i64>,
    /// What the log said last.
    told: i64,
}

/// See the table above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    Own,
    Trial,
    Confirmed,
}

// === impl UpstreamClock ===

impl UpstreamClock {
    /// Starts as the clock of this machine.
    pub fn new(machine: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Self {
            machine,
            offset: AtomicI64::new(0),
            correction: AtomicU32::new(0),
            is_proven: AtomicBool::new(false),
            history: Mutex::default(),
            due: AtomicU64::new(0),
            start: Instant::now(),
            metrics,
        }
    }

    /// Whether tokens for an origin are right although the machine's clock differs from its as much.
    pub fn corrects(origin: &Origin, difference: Duration) -> bool {
        origin.is_secure() && difference.as_millis() <= GREATEST.unsigned_abs().into()
    }

    /// Learns from the head of an answer, if a sample is due. `asked` is when upstream had the
    /// request.
    pub(super) fn learn(&self, head: &HeaderMap, asked: Instant) {
        if self.takes_turn(asked)
            && let Some(reading) = self.read(head, asked)
        {
            self.take(reading);
        }
    }

    /// Upstream has accepted a token that was minted by this correction.
    pub(super) fn accepted(&self, correction: Correction) {
        if self.is_proven.load(Relaxed) {
            return;
        }
        let mut history = self.lock();
        if correction != self.correction() {
            return;
        }
        self.is_proven.store(true, Relaxed);
        history.own_is_next = false;
        history.state = match history.state {
            State::Start | State::Own => State::Own,
            State::Trial | State::Confirmed => State::Confirmed,
        };
        history.tell(self.offset.load(Relaxed));
    }

    /// Learns from an answer that refuses, for its time, a token that was minted by this correction:
    /// what was learned is wrong, or a clock was set while we were running.
    pub(super) fn refused(&self, correction: Correction, head: &HeaderMap, asked: Instant) {
        self.refuse(correction, self.read(head, asked).map(ClockReading::middle));
    }

    /// What an answer that came between `asked` and now says of upstream's clock, if it does.
    fn read(&self, head: &HeaderMap, asked: Instant) -> Option<ClockReading> {
        // A cache tells the time at which it stored the answer.
        if head.contains_key(AGE) {
            return None;
        }
        let date = head.get(DATE)?.to_str().ok()?;
        let date = httpdate::parse_http_date(date).ok()?;
        let reading = ClockReading::new(date, self.machine.now(), asked.elapsed());
        Some(reading).filter(ClockReading::is_plausible)
    }

    /// The same, where its `Date` says this offset.
    fn refuse(&self, correction: Correction, said: Option<i64>) {
        let mut history = self.lock();
        // Many may be refused together, of which the first has set the clock.
        if correction != self.correction() {
            return;
        }
        let is_no_news =
            history.state == State::Trial && said.is_some_and(|said| !is_far(said, history.base));
        if history.own_is_next || is_no_news {
            history.own_is_next = false;
            history.samples.clear();
            self.set(&mut history, State::Own, 0);
            return;
        }
        history.own_is_next = true;
        if let Some(said) = said {
            history.samples = vec![said];
            let state = if is_far(said, 0) {
                State::Trial
            } else {
                State::Own
            };
            self.set(&mut history, state, said);
        } else {
            let state = match history.state {
                State::Start | State::Own => State::Start,
                State::Trial | State::Confirmed => State::Trial,
            };
            self.set(&mut history, state, self.offset.load(Relaxed));
        }
        self.settle(&mut history);
    }

    fn take(&self, reading: ClockReading) {
        let mut history = self.lock();
        let sample = reading.offset(self.offset.load(Relaxed));
        let is_judged = matches!(history.state, State::Own | State::Confirmed);
        if is_judged && is_far(sample, history.base) {
            return;
        }
        if history.samples.len() == SAMPLES {
            history.samples.remove(0);
        }
        history.samples.push(sample);
        let offset = history.median();
        if is_far(offset, history.base) {
            let state = if is_far(offset, 0) {
                State::Trial
            } else {
                State::Start
            };
            self.set(&mut history, state, offset);
        }
        self.settle(&mut history);
    }

    /// Enters a state. Tokens are minted anew.
    fn set(&self, history: &mut History, state: State, offset: i64) {
        history.state = state;
        history.base = match state {
            State::Start | State::Own => 0,
            State::Trial | State::Confirmed => offset,
        };
        self.store(offset);
        self.is_proven.store(false, Relaxed);
        // Who sees it sees the offset too.
        self.correction.fetch_add(1, Release);
    }

    fn store(&self, offset: i64) {
        self.offset.store(offset, Relaxed);
        self.metrics.clock_offset(seconds(offset));
    }

    /// Whether an answer to what was `asked` then is the next sample. Mostly it is not, which is told
    /// without a look at a clock.
    fn takes_turn(&self, asked: Instant) -> bool {
        let due = self.due.load(Relaxed);
        if whole_millis(asked - self.start) < due {
            return false;
        }
        let next = whole_millis(self.start.elapsed() + INTERVAL);
        // Of several threads one takes the sample.
        self.due
            .compare_exchange(due, next, Relaxed, Relaxed)
            .is_ok()
    }

    fn settle(&self, history: &mut History) {
        if history.samples.is_empty() {
            return;
        }
        let offset = history.median();
        self.store(offset);
        if history.state != State::Trial {
            history.tell(offset);
        }
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for UpstreamClock {
    fn now(&self) -> SystemTime {
        shifted(self.machine.now(), self.offset.load(Relaxed))
    }

    fn correction(&self) -> Correction {
        Correction(self.correction.load(Acquire))
    }
}

// === impl History ===

impl History {
    fn median(&self) -> i64 {
        // An even number has no middle: the newest waits for another one.
        let odd = self.samples.len().saturating_sub(1) / 2 * 2 + 1;
        let mut samples: Vec<_> = self.samples.iter().take(odd).copied().collect();
        samples.sort_unstable();
        samples.get(odd / 2).copied().unwrap_or_default()
    }

    /// Tells the log what is worth it.
    fn tell(&mut self, offset: i64) {
        if (offset - self.told).abs() <= NOTABLE {
            return;
        }
        self.told = offset;
        let offset_seconds = seconds(offset);
        if offset.abs() <= NOTABLE {
            tracing::info!(offset_seconds, "clock is right again");
            return;
        }
        tracing::warn!(
            offset_seconds,
            "this machine's clock is {}: tokens are made by upstream's; set the clock, by NTP for example",
            if offset > 0 { "slow" } else { "fast" },
        );
    }
}

fn is_far(offset: i64, from: i64) -> bool {
    (offset - from).abs() > FAR
}

fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn seconds(millis: i64) -> f64 {
    let distance = Duration::from_millis(millis.unsigned_abs()).as_secs_f64();
    if millis < 0 { -distance } else { distance }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    /// A fast answer by a clock that is ahead by so many milliseconds.
    fn fast(ahead: i64) -> ClockReading {
        ClockReading {
            least: ahead - 600,
            most: ahead + 600,
        }
    }

    /// An answer that took ten seconds.
    fn slow(ahead: i64) -> ClockReading {
        ClockReading {
            least: ahead - 10_000,
            most: ahead + 1_000,
        }
    }

    /// What is known after these answers.
    fn learned(readings: impl IntoIterator<Item = ClockReading>) -> i64 {
        let metrics = Arc::new(Metrics::new().unwrap());
        let clock = UpstreamClock::new(Arc::new(SystemClock), metrics);
        for reading in readings {
            clock.take(reading);
        }
        clock.offset.load(Relaxed)
    }

    /// What happens to a clock. Offsets in minutes.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// An answer says so.
        Said(i64),
        /// A token was accepted.
        Accepted,
        /// A token was refused, by an answer that says so.
        Refused(i64),
        /// The same, by an answer without a `Date`.
        RefusedUndated,
        /// A token from before the clock was set last was accepted, or refused.
        AcceptedLate,
        RefusedLate(i64),
    }

    /// Where these events lead: a state, and an offset in minutes.
    fn after(events: &[Event]) -> (State, i64) {
        let minute = 60_000;
        let metrics = Arc::new(Metrics::new().unwrap());
        let clock = UpstreamClock::new(Arc::new(SystemClock), metrics);
        for event in events {
            let current = clock.correction();
            let before = Correction(current.0.wrapping_sub(1));
            match *event {
                Event::Said(offset) => clock.take(fast(offset * minute)),
                Event::Accepted => clock.accepted(current),
                Event::Refused(offset) => clock.refuse(current, Some(offset * minute)),
                Event::RefusedUndated => clock.refuse(current, None),
                Event::AcceptedLate => clock.accepted(before),
                Event::RefusedLate(offset) => clock.refuse(before, Some(offset * minute)),
            }
        }
        let state = clock.lock().state;
        (state, clock.offset.load(Relaxed) / minute)
    }

    /// R40.
    #[test]
    fn offset_of_over_five_minutes_is_on_trial_until_a_token_by_it_is_accepted() {
        use Event::{Accepted, AcceptedLate, Refused, RefusedLate, RefusedUndated, Said};
        use State::{Confirmed, Own, Start, Trial};

        for (events, expected) in [
            // Our clock, which nobody has judged.
            (&[][..], (Start, 0)),
            (&[Said(5)], (Start, 5)),
            (&[Said(60)], (Trial, 60)),
            (&[Accepted], (Own, 0)),
            (&[Refused(60)], (Trial, 60)),
            (&[Refused(4)], (Own, 4)),
            (&[RefusedUndated], (Start, 0)),
            (&[RefusedUndated, RefusedUndated], (Own, 0)),
            // Our clock, which upstream has judged: answers do not lead far away.
            (&[Accepted, Said(60), Said(60), Said(60)], (Own, 0)),
            (&[Accepted, Said(4), Said(4), Said(4)], (Own, 4)),
            (&[Accepted, Said(4), Said(8), Said(8), Said(8)], (Own, 4)),
            (&[Accepted, Refused(60)], (Trial, 60)),
            (&[Accepted, Refused(4)], (Own, 4)),
            (&[Accepted, Refused(4), Refused(4)], (Own, 0)),
            (&[Accepted, Refused(4), Accepted, Refused(4)], (Own, 4)),
            (&[Accepted, RefusedUndated], (Start, 0)),
            (&[Accepted, RefusedUndated, Said(60)], (Trial, 60)),
            // An offset on trial.
            (&[Said(60), Accepted], (Confirmed, 60)),
            (&[Said(60), Refused(60)], (Own, 0)),
            (&[Said(60), Refused(30)], (Trial, 30)),
            (&[Said(60), Refused(2)], (Own, 2)),
            (&[Said(60), RefusedUndated], (Trial, 60)),
            (&[Said(60), RefusedUndated, RefusedUndated], (Own, 0)),
            (&[Said(60), Said(0), Said(0)], (Start, 0)),
            (&[Said(60), Said(30), Said(30)], (Trial, 30)),
            // After a second refusal our own clock has its turn, whatever is said meanwhile.
            (&[Refused(60), Refused(30)], (Own, 0)),
            (&[Refused(60), Said(30), Said(30), Refused(20)], (Own, 0)),
            (&[Said(60), Refused(30), Refused(20)], (Own, 0)),
            (&[Said(60), Refused(60), Said(60), Said(60)], (Own, 0)),
            (&[Said(60), Refused(60), Accepted], (Own, 0)),
            // And then `Date` again.
            (&[Said(60), Refused(60), Refused(60)], (Trial, 60)),
            (&[Refused(60), Refused(60), Refused(60)], (Trial, 60)),
            (
                &[Refused(60), Refused(60), Refused(60), Refused(60)],
                (Own, 0),
            ),
            // A proven offset: answers do not lead far away, nor far from it by small steps.
            (
                &[Said(60), Accepted, Said(0), Said(0), Said(0)],
                (Confirmed, 60),
            ),
            (&[Said(60), Accepted, Said(63), Said(63)], (Confirmed, 63)),
            (
                &[Said(60), Accepted, Said(64), Said(64), Said(68)],
                (Confirmed, 64),
            ),
            (&[Said(60), Accepted, Refused(0)], (Own, 0)),
            (&[Said(60), Accepted, Refused(60)], (Trial, 60)),
            (&[Said(60), Accepted, Refused(60), Refused(60)], (Own, 0)),
            (
                &[Said(60), Accepted, Refused(-60), Accepted],
                (Confirmed, -60),
            ),
            (&[Said(60), Accepted, RefusedUndated], (Trial, 60)),
            // What became of earlier tokens says nothing of the present clock.
            (&[Said(60), AcceptedLate], (Trial, 60)),
            (
                &[Refused(60), RefusedLate(60), RefusedLate(60)],
                (Trial, 60),
            ),
        ] {
            assert_eq!(after(events), expected, "{events:?}");
        }
    }

    #[test]
    fn what_most_of_the_last_answers_say_counts() {
        let hour = 3_600_000;
        for (said, offset) in [
            (&[][..], 0),
            (&[hour], hour),
            (&[-hour], -hour),
            (&[0, hour], 0),
            (&[0, hour, hour], hour),
            (&[hour, 0, 0], 0),
            (&[hour, -hour, hour, hour], hour),
            (&[0, 0, hour, 0, hour, 0], 0),
            (&[0, 0, 0, 0, 0, 0, hour, hour], 0),
            (&[0, 0, 0, 0, 0, 0, hour, hour, hour], hour),
            (&[hour, hour + 100, hour - 500, hour + 300], hour),
        ] {
            assert_eq!(learned(said.iter().copied().map(fast)), offset, "{said:?}");
        }
    }

    #[test]
    fn an_answer_that_may_have_been_late_changes_nothing() {
        assert_eq!(learned([slow(0), slow(500), fast(400), fast(-400)]), 0);
        assert_eq!(learned([fast(4_000), slow(4_000), slow(0)]), 4_000);
    }

    #[test]
    fn between_samples_there_is_a_second() {
        let metrics = Arc::new(Metrics::new().unwrap());
        let clock = UpstreamClock::new(Arc::new(SystemClock), metrics);
        let dated = |ahead| {
            let date = SystemClock.now() + Duration::from_secs(ahead);
            let date = httpdate::fmt_http_date(date).parse().unwrap();
            HeaderMap::from_iter([(DATE, date)])
        };
        let asked = Instant::now();
        for ahead in [0, 9, 9, 9] {
            clock.learn(&dated(ahead), asked);
        }
        assert_eq!(clock.offset.load(Relaxed), 0);
        clock.refused(clock.correction(), &dated(9), asked);
        // `Date` has no fractions.
        let offset = clock.offset.load(Relaxed);
        assert!(
            (8_000..=10_000).contains(&offset),
            "{offset}: a refusal is proof enough"
        );
    }
}

//! Upstream's time, learned from the `Date` of its responses. Upstream judges tokens by its own clock, so
//! tokens are minted by that clock too.
//!
//! A `Date` proves nothing: it may come from a gateway that never sees a token. A clock is proven when
//! upstream accepts a token that was minted by it. So an offset of over 5 minutes from our clock is on trial
//! until then.
//!
//! In the table, "far" means over 5 minutes from the offset with which the state began.
//!
//! | state, and clock that mints tokens | most responses are far | a token is accepted | a token is refused for its time | another token is refused before one is accepted |
//! | --- | --- | --- | --- | --- |
//! | `Start`: our clock, unproven | `Trial` of the new offset | `Own` | set by its `Date` | `Own` |
//! | `Own`: our clock | nothing changes | `Own` | set by its `Date` | `Own` |
//! | `Trial`: an offset, unproven | `Trial` of the new offset, or `Start` | `Confirmed` | set by its `Date`; `Own` if that is not far | `Own` |
//! | `Confirmed`: an offset | nothing changes | `Confirmed` | set by its `Date` | `Own` |
//!
//! "Set by its `Date`" means: `Own` if the `Date` is up to 5 minutes from our clock, else `Trial`. After a
//! refusal without a `Date` the next responses decide, in `Start` or `Trial`. So `Date` and our clock take
//! turns while upstream refuses tokens, and other responses cannot keep either from its turn. An offset that
//! is not far takes effect at once, if most responses agree on it.

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

/// Number of latest samples of which the median counts. One or two wrong ones cannot decide it.
const SAMPLES: usize = 5;
/// Shortest time between samples, so that they do not all come from one bad moment, and busy days cost
/// nothing.
const INTERVAL: Duration = Duration::from_secs(1);
/// Offset in milliseconds above which a clock is on trial first.
const FAR: i64 = 5 * 60 * 1_000;
/// Offset in milliseconds above which the log gets a line: `token.not_before_leeway` will not cover much
/// more.
const NOTABLE: i64 = 3_000;

/// The clock of upstream: this machine's clock plus the learned offset. Reading it takes no lock.
pub struct UpstreamClock {
    machine: Arc<dyn Clock>,
    /// Milliseconds by which upstream's clock is ahead of this machine's.
    offset: AtomicI64,
    /// Number of times that the clock was set.
    correction: AtomicU32,
    /// True if upstream has accepted a token that was minted by the current correction.
    is_proven: AtomicBool,
    history: Mutex<History>,
    /// Time at which the next sample is due, in milliseconds after `start`.
    due: AtomicU64,
    start: Instant,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct History {
    state: State,
    /// The offset with which the state began; 0 for our clock.
    base: i64,
    /// True after a refusal. If a token is refused again before one is accepted, our clock is next.
    own_is_next: bool,
    /// Offsets in milliseconds, the oldest first.
    samples: Vec<i64>,
    /// Offset that was logged last, in milliseconds; 0 before the first line.
    told: i64,
}

/// State of the learned clock; see the table above.
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
    /// Creates a clock that starts as the clock of this machine.
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

    /// Returns true if tokens for `origin` are right although this machine's clock differs by `difference`
    /// from that of the origin.
    pub fn corrects(origin: &Origin, difference: Duration) -> bool {
        origin.is_secure() && difference.as_millis() <= GREATEST.unsigned_abs().into()
    }

    /// Learns from the head of a response, if a sample is due. `asked` is the time at which upstream had the
    /// request.
    pub(super) fn learn(&self, head: &HeaderMap, asked: Instant) {
        if self.takes_turn(asked)
            && let Some(reading) = self.read(head, asked)
        {
            self.take(reading);
        }
    }

    /// Records that upstream has accepted a token that was minted by this correction.
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

    /// Learns from a response that refuses a token for its time. The token was minted by `correction`. Either
    /// the learned offset is wrong, or a clock was set while the proxy was running.
    pub(super) fn refused(&self, correction: Correction, head: &HeaderMap, asked: Instant) {
        self.refuse(correction, self.read(head, asked).map(ClockReading::middle));
    }

    /// Returns the bounds of the offset that the `Date` of a response shows, if it shows any. The response
    /// came between `asked` and now.
    fn read(&self, head: &HeaderMap, asked: Instant) -> Option<ClockReading> {
        // The `Date` of a cached response is the time at which the cache stored it.
        if head.contains_key(AGE) {
            return None;
        }
        let date = head.get(DATE)?.to_str().ok()?;
        let date = httpdate::parse_http_date(date).ok()?;
        let reading = ClockReading::new(date, self.machine.now(), asked.elapsed());
        Some(reading).filter(ClockReading::is_plausible)
    }

    /// Sets the clock after a refusal. `said` is the offset by the `Date` of the response, in milliseconds.
    fn refuse(&self, correction: Correction, said: Option<i64>) {
        let mut history = self.lock();
        // Many tokens may be refused together. The first of these refusals has set the clock already.
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

    /// Enters a state with this offset, in milliseconds. The new correction makes tokens be minted anew.
    fn set(&self, history: &mut History, state: State, offset: i64) {
        history.state = state;
        history.base = match state {
            State::Start | State::Own => 0,
            State::Trial | State::Confirmed => offset,
        };
        self.store(offset);
        self.is_proven.store(false, Relaxed);
        // A thread that sees the new correction also sees the new offset.
        self.correction.fetch_add(1, Release);
    }

    fn store(&self, offset: i64) {
        self.offset.store(offset, Relaxed);
        self.metrics.clock_offset(seconds(offset));
    }

    /// Returns true if the response to a request that was sent at `asked` is the next sample. Usually it is
    /// not, and then no clock is read.
    fn takes_turn(&self, asked: Instant) -> bool {
        let due = self.due.load(Relaxed);
        if whole_millis(asked - self.start) < due {
            return false;
        }
        let next = whole_millis(self.start.elapsed() + INTERVAL);
        // If several threads compete, one takes the sample.
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
        // An even number of samples has no middle one: the newest sample waits for the next.
        let odd = self.samples.len().saturating_sub(1) / 2 * 2 + 1;
        let mut samples: Vec<_> = self.samples.iter().take(odd).copied().collect();
        samples.sort_unstable();
        samples.get(odd / 2).copied().unwrap_or_default()
    }

    /// Logs an offset if it differs by more than [`NOTABLE`] from the last one in the log.
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

    /// Returns the reading of a fast response from a clock that is `ahead` by this many milliseconds.
    fn fast(ahead: i64) -> ClockReading {
        ClockReading {
            least: ahead - 600,
            most: ahead + 600,
        }
    }

    /// Returns the reading of a response that took ten seconds.
    fn slow(ahead: i64) -> ClockReading {
        ClockReading {
            least: ahead - 10_000,
            most: ahead + 1_000,
        }
    }

    /// Returns the offset that is known after these readings, in milliseconds.
    fn learned(readings: impl IntoIterator<Item = ClockReading>) -> i64 {
        let metrics = Arc::new(Metrics::new().unwrap());
        let clock = UpstreamClock::new(Arc::new(SystemClock), metrics);
        for reading in readings {
            clock.take(reading);
        }
        clock.offset.load(Relaxed)
    }

    /// An event that may change the clock. Offsets are in minutes.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        /// A response came whose `Date` shows this offset.
        Said(i64),
        /// A token of the current correction was accepted.
        Accepted,
        /// A token was refused, in a response whose `Date` shows this offset.
        Refused(i64),
        /// A token was refused, in a response without a `Date`.
        RefusedUndated,
        /// A token from before the last correction was accepted, or refused.
        AcceptedLate,
        RefusedLate(i64),
    }

    /// Returns the state, and the offset in minutes, after these events.
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

    /// R40. A `Date` alone must not set the clock far from ours.
    #[test]
    fn offset_of_over_five_minutes_is_on_trial_until_a_token_by_it_is_accepted() {
        use Event::{Accepted, AcceptedLate, Refused, RefusedLate, RefusedUndated, Said};
        use State::{Confirmed, Own, Start, Trial};

        for (events, expected) in [
            // Our clock, unproven.
            (&[][..], (Start, 0)),
            (&[Said(5)], (Start, 5)),
            (&[Said(60)], (Trial, 60)),
            (&[Accepted], (Own, 0)),
            (&[Refused(60)], (Trial, 60)),
            (&[Refused(4)], (Own, 4)),
            (&[RefusedUndated], (Start, 0)),
            (&[RefusedUndated, RefusedUndated], (Own, 0)),
            // Our clock, proven: responses do not move it far.
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
            // After a second refusal our own clock has its turn, regardless of other responses.
            (&[Refused(60), Refused(30)], (Own, 0)),
            (&[Refused(60), Said(30), Said(30), Refused(20)], (Own, 0)),
            (&[Said(60), Refused(30), Refused(20)], (Own, 0)),
            (&[Said(60), Refused(60), Said(60), Said(60)], (Own, 0)),
            (&[Said(60), Refused(60), Accepted], (Own, 0)),
            // After that, `Date` has its turn again.
            (&[Said(60), Refused(60), Refused(60)], (Trial, 60)),
            (&[Refused(60), Refused(60), Refused(60)], (Trial, 60)),
            (
                &[Refused(60), Refused(60), Refused(60), Refused(60)],
                (Own, 0),
            ),
            // A proven offset: responses do not move it far, not even in small steps.
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
            // The outcome of earlier tokens shows nothing about the present clock.
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
        // `Date` has no fractions of a second.
        let offset = clock.offset.load(Relaxed);
        assert!(
            (8_000..=10_000).contains(&offset),
            "{offset}: a refusal is proof enough"
        );
    }
}

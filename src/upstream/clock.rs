//! What time it is at upstream, learned from the `Date` of its answers. Upstream judges tokens by
//! its own clock, so that is the one they are made by.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use http::header::{AGE, DATE};
use tokio::time::Instant;

use super::Origin;
use crate::clock::Clock;
use crate::metrics::Metrics;

/// How many samples count: one or two that are wrong do not.
const SAMPLES: usize = 5;
/// Between samples, so that they do not all come from one bad moment, and busy days cost nothing.
const INTERVAL: Duration = Duration::from_secs(1);
/// `Date` has no fractions.
const RESOLUTION: i64 = 1_000;
/// A difference of more says nothing of clocks.
const GREATEST: i64 = 24 * 60 * 60 * 1_000;
/// A difference of more is worth a line in the log: `token.not_before_leeway` will not cover much
/// more of it.
const NOTABLE: i64 = 3_000;

/// The clock of upstream: this machine's, corrected by what was learned. Reading it takes no lock.
pub struct UpstreamClock {
    machine: Arc<dyn Clock>,
    /// How far upstream is ahead, in milliseconds.
    offset: AtomicI64,
    history: Mutex<History>,
    /// When the next sample is due, in milliseconds after `start`.
    due: AtomicU64,
    start: Instant,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct History {
    /// Offsets in milliseconds, the oldest first.
    samples: Vec<i64>,
    /// What the log said last.
    told: i64,
}

/// Bounds of the offset by one answer: its `Date` was written after the request was sent and before
/// the answer came. In milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    least: i64,
    most: i64,
}

// === impl UpstreamClock ===

impl UpstreamClock {
    /// Starts as the clock of this machine.
    pub fn new(machine: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Self {
            machine,
            offset: AtomicI64::new(0),
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

    /// Learns from an answer that refuses a token for its time, and forgets what was learned before:
    /// a clock was set while we were running.
    pub(super) fn relearn(&self, head: &HeaderMap, asked: Instant) {
        if let Some(reading) = self.read(head, asked) {
            self.replace(reading);
        }
    }

    /// What an answer that came between `asked` and now says of upstream's clock, if it does.
    fn read(&self, head: &HeaderMap, asked: Instant) -> Option<Reading> {
        // A cache tells the time at which it stored the answer.
        if head.contains_key(AGE) {
            return None;
        }
        let date = head.get(DATE)?.to_str().ok()?;
        let date = unix_millis(httpdate::parse_http_date(date).ok()?);
        Reading::new(date, unix_millis(self.machine.now()), asked.elapsed())
    }

    fn replace(&self, reading: Reading) {
        let mut history = self.lock();
        history.samples = vec![reading.middle()];
        self.settle(&mut history);
    }

    fn take(&self, reading: Reading) {
        let mut history = self.lock();
        if history.samples.len() == SAMPLES {
            history.samples.remove(0);
        }
        history
            .samples
            .push(reading.sample(self.offset.load(Relaxed)));
        self.settle(&mut history);
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
        let offset = history.median();
        self.offset.store(offset, Relaxed);
        self.metrics.clock_offset(seconds(offset));
        if (offset - history.told).abs() <= NOTABLE {
            return;
        }
        history.told = offset;
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

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for UpstreamClock {
    fn now(&self) -> SystemTime {
        let now = self.machine.now();
        let offset = self.offset.load(Relaxed);
        let distance = Duration::from_millis(offset.unsigned_abs());
        let there = if offset < 0 {
            now.checked_sub(distance)
        } else {
            now.checked_add(distance)
        };
        there.unwrap_or(now)
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
}

// === impl Reading ===

impl Reading {
    /// `date` and `received` in milliseconds since the epoch.
    fn new(date: i64, received: i64, round_trip: Duration) -> Option<Self> {
        let round_trip = i64::try_from(round_trip.as_millis()).ok()?;
        let reading = Self {
            least: date - received,
            most: date + RESOLUTION - (received - round_trip),
        };
        (-GREATEST..=GREATEST)
            .contains(&reading.middle())
            .then_some(reading)
    }

    /// `Date` and half a second, less the time of receipt and half the round trip.
    fn middle(self) -> i64 {
        i64::midpoint(self.least, self.most)
    }

    /// What this says where `current` was known. An answer that took long says little, and what
    /// fits its bounds need not be wrong; clocks that agree are not set against each other by a
    /// fraction of a second.
    fn sample(self, current: i64) -> i64 {
        [current, 0]
            .into_iter()
            .find(|offset| (self.least..=self.most).contains(offset))
            .unwrap_or_else(|| self.middle())
    }
}

fn unix_millis(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_millis()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_millis()).map_or(i64::MIN, |millis| -millis)
        }
    }
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
    fn fast(ahead: i64) -> Reading {
        Reading {
            least: ahead - 600,
            most: ahead + 600,
        }
    }

    /// An answer that took ten seconds.
    fn slow(ahead: i64) -> Reading {
        Reading {
            least: ahead - 10_000,
            most: ahead + 1_000,
        }
    }

    /// What is known after these answers.
    fn learned(readings: impl IntoIterator<Item = Reading>) -> i64 {
        let metrics = Arc::new(Metrics::new().unwrap());
        let clock = UpstreamClock::new(Arc::new(SystemClock), metrics);
        for reading in readings {
            clock.take(reading);
        }
        clock.offset.load(Relaxed)
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
        clock.relearn(&dated(9), asked);
        // `Date` has no fractions.
        let offset = clock.offset.load(Relaxed);
        assert!(
            (8_000..=10_000).contains(&offset),
            "{offset}: a refusal is proof enough"
        );
    }

    #[test]
    fn date_is_compared_with_the_middle_of_the_round_trip() {
        let (hour, round_trip) = (3_600_000, Duration::from_millis(200));
        for (date, middle) in [
            (5_000, Some(0)),
            (5_000 + hour, Some(hour)),
            (5_000 - hour, Some(-hour)),
            (5_000 + 24 * hour, Some(24 * hour)),
            (5_000 - 24 * hour, Some(-24 * hour)),
            (6_000 + 24 * hour, None),
            (4_000 - 24 * hour, None),
        ] {
            let reading = Reading::new(date, 5_600, round_trip);
            assert_eq!(reading.map(Reading::middle), middle, "{date}");
        }
    }
}

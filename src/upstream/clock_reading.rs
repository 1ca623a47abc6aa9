//! The difference between two clocks that the `Date` of one answer tells.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `Date` has whole seconds (RFC 9110, section 5.6.7). In milliseconds.
const RESOLUTION: i64 = 1_000;
/// A difference of more says nothing of clocks. In milliseconds.
pub(super) const GREATEST: i64 = 24 * 60 * 60 * 1_000;

/// Bounds of the offset by one answer: its `Date` was written after the request was sent and before
/// the answer came. In milliseconds by which upstream's clock is ahead of this machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    pub(super) least: i64,
    pub(super) most: i64,
}

// === impl ClockReading ===

impl ClockReading {
    /// Compares a `Date` with this machine's clock at the time of receipt.
    pub fn new(date: SystemTime, received: SystemTime, round_trip: Duration) -> Self {
        let (date, received) = (unix_millis(date), unix_millis(received));
        let round_trip = i64::try_from(round_trip.as_millis()).unwrap_or(i64::MAX);
        let asked = received.saturating_sub(round_trip);
        Self {
            least: date.saturating_sub(received),
            most: date.saturating_add(RESOLUTION).saturating_sub(asked),
        }
    }

    /// `Date` and half a second, less the time of receipt and half the round trip.
    pub(super) fn middle(self) -> i64 {
        i64::midpoint(self.least, self.most)
    }

    /// Returns false if the difference is so great that something else than a clock is wrong.
    pub(super) fn is_plausible(&self) -> bool {
        (-GREATEST..=GREATEST).contains(&self.middle())
    }

    /// Returns the offset after this answer where `current` was known. An answer that took long says
    /// little, and an offset that fits its bounds need not be wrong; clocks that agree are not set
    /// against each other by a fraction of a second.
    pub fn offset(self, current: i64) -> i64 {
        [current, 0]
            .into_iter()
            .find(|offset| (self.least..=self.most).contains(offset))
            .unwrap_or_else(|| self.middle())
    }
}

/// Moves a time by an offset in milliseconds. A time that does not exist stays where it is.
pub fn shifted(time: SystemTime, offset: i64) -> SystemTime {
    let distance = Duration::from_millis(offset.unsigned_abs());
    let there = if offset < 0 {
        time.checked_sub(distance)
    } else {
        time.checked_add(distance)
    };
    there.unwrap_or(time)
}

fn unix_millis(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_millis()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_millis()).map_or(i64::MIN, |millis| -millis)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn date_is_compared_with_the_middle_of_the_round_trip() {
        let (hour, round_trip) = (3_600_000, Duration::from_millis(200));
        let at = |millis| shifted(UNIX_EPOCH, millis);
        for (date, middle) in [
            (5_000, Some(0)),
            (5_000 + hour, Some(hour)),
            (5_000 - hour, Some(-hour)),
            (5_000 + 24 * hour, Some(24 * hour)),
            (5_000 - 24 * hour, Some(-24 * hour)),
            (6_000 + 24 * hour, None),
            (4_000 - 24 * hour, None),
        ] {
            let reading = ClockReading::new(at(date), at(5_600), round_trip);
            let plausible = reading.is_plausible().then(|| reading.middle());
            assert_eq!(plausible, middle, "{date}");
        }
    }
}

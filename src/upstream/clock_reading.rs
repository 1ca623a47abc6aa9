//! Offset between the clocks of this machine and of upstream, by the `Date` of one response.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Resolution of `Date` in milliseconds: it has whole seconds (RFC 9110, section 5.6.7).
const RESOLUTION: i64 = 1_000;
/// Largest offset that is believed, in milliseconds. A larger one is not the fault of a clock.
pub(super) const GREATEST: i64 = 24 * 60 * 60 * 1_000;

/// Bounds of the offset by one response, in milliseconds by which upstream's clock is ahead of this
/// machine's. The `Date` was written after the request was sent and before the response arrived.
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

    /// Returns the middle of the bounds: `Date` plus half a second, less this machine's time in the middle of
    /// the round trip.
    pub(super) fn middle(self) -> i64 {
        i64::midpoint(self.least, self.most)
    }

    /// Returns false if the offset is so large that something other than a clock must be wrong.
    pub(super) fn is_plausible(&self) -> bool {
        (-GREATEST..=GREATEST).contains(&self.middle())
    }

    /// Returns the offset to use after this response, in milliseconds; `current` is the one in use.
    ///
    /// A slow response has wide bounds and shows little, so an offset within the bounds need not be wrong:
    /// `current` stays if it is within them, else 0 is used if that is. So clocks that agree are not moved
    /// apart by a fraction of a second.
    pub fn offset(self, current: i64) -> i64 {
        [current, 0]
            .into_iter()
            .find(|offset| (self.least..=self.most).contains(offset))
            .unwrap_or_else(|| self.middle())
    }
}

/// Moves a time by an offset in milliseconds. Returns the time unchanged if the result does not exist.
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

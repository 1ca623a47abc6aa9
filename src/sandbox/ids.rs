//! Everything that looks random, generated from one seed.

use std::ops::RangeInclusive;

use fastrand::Rng;

/// Two sequences of ids, each decided by the seed. The sequences are independent: the number of polls by a
/// client changes no id of a task.
#[derive(Debug)]
pub(super) struct Ids {
    numbers: Rng,
    requests: Rng,
}

/// Range of task ids, which have 18 digits.
const NUMBERS: RangeInclusive<u64> = 100_000_000_000_000_000..=999_999_999_999_999_999;

// === impl Ids ===

impl Ids {
    pub(super) fn new(seed: u64) -> Self {
        let mut numbers = Rng::with_seed(seed);
        let requests = numbers.fork();
        Self { numbers, requests }
    }

    /// Returns an id for a task, or for its output.
    pub(super) fn number(&mut self) -> u64 {
        self.numbers.u64(NUMBERS)
    }

    /// Returns a version 4 UUID (RFC 9562, section 5.4), as in Kling's examples.
    pub(super) fn request(&mut self) -> String {
        const VERSION: u128 = 0xf << 76;
        const VARIANT: u128 = 0b11 << 62;
        let bits = self.requests.u128(..) & !VERSION & !VARIANT | 0x4 << 76 | 0b10 << 62;
        let mut id = format!("{bits:032x}");
        for hyphen in [20, 16, 12, 8] {
            id.insert(hyphen, '-');
        }
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides_all_ids_whatever_is_asked_for_in_between() {
        let mut first = Ids::new(7);
        let expected = [(); 3].map(|()| first.number());
        let mut second = Ids::new(7);
        let requests = [(); 3].map(|()| second.request());
        assert_eq!([(); 3].map(|()| second.number()), expected);
        assert_eq!([(); 3].map(|()| first.request()), requests);
        assert!(expected.iter().all(|id| id.to_string().len() == 18));
        assert_ne!([(); 3].map(|()| Ids::new(8).number()), expected);
    }

    #[test]
    fn a_request_id_is_a_version_4_uuid() {
        let id = Ids::new(0).request();
        let lengths: Vec<_> = id.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12], "{id}");
        assert_eq!(&id[14..15], "4", "{id}");
        assert!("89ab".contains(&id[19..20]), "{id}");
    }
}

//! Units of resource packs: decimal numbers such as `2.5`, as Kling writes them in strings.

use std::fmt;
use std::str::FromStr;

/// An amount of units, in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Units(pub i64);

/// Millionths of one unit.
pub const ONE: i64 = 1_000_000;
/// Digits after the point.
const PLACES: usize = 6;

/// Error for a text that is no amount of units.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("want a decimal number with at most 6 digits after the point")]
pub struct NoUnits;

impl FromStr for Units {
    type Err = NoUnits;

    /// Reads a decimal number. Zeros at its end do not count as digits.
    fn from_str(text: &str) -> Result<Self, NoUnits> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let fraction = fraction.trim_end_matches('0');
        let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if whole.is_empty()
            || !are_digits(whole)
            || !are_digits(fraction)
            || fraction.len() > PLACES
        {
            return Err(NoUnits);
        }
        let whole: i64 = whole.parse().map_err(|_| NoUnits)?;
        let fraction: i64 = format!("{fraction:0<PLACES$}")
            .parse()
            .map_err(|_| NoUnits)?;
        let whole = whole.checked_mul(ONE).ok_or(NoUnits)?;
        Ok(Self(whole.checked_add(fraction).ok_or(NoUnits)?))
    }
}

impl fmt::Display for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(millionths) = self;
        let sign = if *millionths < 0 { "-" } else { "" };
        let (whole, rest) = (
            millionths.unsigned_abs() / 1_000_000,
            millionths.unsigned_abs() % 1_000_000,
        );
        let fraction = format!("{rest:0PLACES$}");
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{sign}{whole}"),
            fraction => write!(f, "{sign}{whole}.{fraction}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_written() {
        for (text, written) in [
            ("2.5", "2.5"),
            ("0", "0"),
            ("0.000001", "0.000001"),
            ("10.00", "10"),
            ("2.4000000", "2.4"),
            ("007", "7"),
            ("9223372036854", "9223372036854"),
        ] {
            assert_eq!(text.parse::<Units>().unwrap().to_string(), written);
        }
        for text in [
            "",
            ".",
            ".5",
            "-1",
            "1e3",
            "0.0000001",
            "9223372036855",
            "1,5",
            "NaN",
            "1 ",
        ] {
            assert_eq!(text.parse::<Units>(), Err(NoUnits), "{text}");
        }
        assert_eq!(Units(-1_500_000).to_string(), "-1.5");
    }
}

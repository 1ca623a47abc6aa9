//! Compares the counts with the agreed counts in `benches/counts.txt`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::{env, fs};

use crate::scenarios::{CALLS, SCENARIOS};
use crate::valgrind::Profile;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/counts.txt");
const HEADING: &str = "\
# What a call costs, and the most that CI lets pass: a tenth more. Written by
# UPDATE_COUNTS=1 cargo bench --locked --bench instructions
";

/// Counts everything and compares. With `UPDATE_COUNTS` in the environment, it agrees to the new counts
/// instead.
pub(crate) fn judge() -> ExitCode {
    let counts = SCENARIOS.iter().flat_map(|(scenario, _)| count(scenario));
    if env::var_os("UPDATE_COUNTS").is_some() {
        let mut text = HEADING.to_owned();
        for (what, count) in counts {
            let limit = count + count / 10;
            writeln!(text, "{what:<26}{count:>10}{limit:>10}").unwrap();
        }
        fs::write(FILE, text).unwrap();
        return ExitCode::SUCCESS;
    }
    let text = fs::read_to_string(FILE).unwrap();
    let agreements: HashMap<_, _> = text.lines().filter_map(agreement).collect();
    let mut outcome = ExitCode::SUCCESS;
    println!("{:<26}{:>10}{:>10}{:>10}", "", "counted", "agreed", "limit");
    for (what, count) in counts {
        let (agreed, limit) = agreements.get(&what).copied().unwrap_or_default();
        let lost = count == 0 && agreed > 0;
        if lost || count > limit {
            outcome = ExitCode::FAILURE;
        }
        let verdict = if count > limit {
            "  TOO MANY"
        } else if lost {
            "  NOT COUNTED"
        } else if count < agreed - agreed / 10 {
            "  fewer: agree to that, or they come back unseen"
        } else {
            ""
        };
        println!("{what:<26}{count:>10}{agreed:>10}{limit:>10}{verdict}");
    }
    outcome
}

/// Counts one call of a scenario, rounded up: if the agreed count is 0, the event never happens.
fn count(scenario: &str) -> [(String, u64); 3] {
    let profile = Profile::of(scenario);
    [
        ("instructions", profile.instructions),
        ("allocations", profile.allocations),
        ("locked", profile.locked),
    ]
    .map(|(what, count)| (format!("{scenario} {what}"), count.div_ceil(CALLS)))
}

/// Parses a line such as `poll instructions 38625 42487`: the agreed count, then the limit.
fn agreement(line: &str) -> Option<(String, (u64, u64))> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [scenario, what, count, limit] = words[..] else {
        return None;
    };
    let counts = (count.parse().ok()?, limit.parse().ok()?);
    Some((format!("{scenario} {what}"), counts))
}

//! Counts the work of the proxy for a request, and fails if a count is more than a tenth above the agreed
//! count: `cargo bench --bench instructions`. benches/README.md explains how to read and to change the
//! counts.
//!
//! If cargo runs this program, it is the judge, which runs itself under valgrind, scenario by scenario.

#![expect(clippy::print_stdout, reason = "its output is a table")]

mod counts;
mod scenarios;
mod upstream;
mod valgrind;

use std::env;
use std::process::ExitCode;

use self::scenarios::SCENARIOS;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [valgrind::SCENARIO, name] => {
            let (_, run) = SCENARIOS.iter().find(|(known, _)| *known == name).unwrap();
            run();
            ExitCode::SUCCESS
        }
        // `cargo test --benches` only checks that the scenarios work.
        [] => {
            for (_, run) in SCENARIOS {
                run();
            }
            ExitCode::SUCCESS
        }
        _ => counts::judge(),
    }
}

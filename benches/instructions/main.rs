//! Counts what the proxy does for a request, and fails where that is a tenth more than was agreed:
//! `cargo bench --bench instructions`. benches/README.md says how to read and to change the counts.
//!
//! Run by cargo it is the judge, which runs itself under valgrind, scenario by scenario.

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
        // What `cargo test --benches` wants to know: whether they work.
        [] => {
            for (_, run) in SCENARIOS {
                run();
            }
            ExitCode::SUCCESS
        }
        _ => counts::judge(),
    }
}

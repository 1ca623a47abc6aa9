//! Runs a scenario under callgrind and DHAT, and reads their counts.

use std::hint::black_box;
use std::process::Command;
use std::{env, fs};

use serde::Deserialize;

/// Argument before the name of the scenario to run.
pub(crate) const SCENARIO: &str = "--scenario";
/// Name of [`counted`] in valgrind's output.
const COUNTED: &str = concat!(module_path!(), "::counted");

/// Counts of a scenario, for all its calls.
pub(crate) struct Profile {
    pub(crate) instructions: u64,
    /// Instructions that change memory atomically. A mutex takes two.
    pub(crate) locked: u64,
    pub(crate) allocations: u64,
}

/// Output file of DHAT, in JSON.
#[derive(Deserialize)]
struct Heap {
    #[serde(rename = "pps")]
    places: Vec<Place>,
    #[serde(rename = "ftbl")]
    frames: Vec<String>,
}

/// Call stack that allocated memory.
#[derive(Deserialize)]
struct Place {
    #[serde(rename = "tbk")]
    blocks: u64,
    /// Calls that led to the allocation, as indices of frames.
    #[serde(rename = "fs")]
    stack: Vec<usize>,
}

/// Does the work to be counted. Only this function's work on the calling thread counts, other threads do
/// not.
#[inline(never)]
pub(crate) fn counted(work: &mut dyn FnMut()) {
    work();
    // Without this line, the call would be a jump, which leaves this function.
    black_box(());
}

// === impl Profile ===

impl Profile {
    /// Runs a scenario under both tools.
    pub(crate) fn of(scenario: &str) -> Self {
        let toggle = format!("--toggle-collect={COUNTED}");
        let options = ["--collect-bus=yes", "--collect-atstart=no", &toggle];
        let text = run("callgrind", &options, scenario);
        let mut lines = text.lines();
        let totals = lines.find_map(|line| line.strip_prefix("totals: "));
        let mut totals = totals.unwrap().split(' ').map(str::parse);
        let instructions = totals.next().unwrap().unwrap();
        // Callgrind leaves it out if it is 0.
        let locked = totals.next().unwrap_or(Ok(0)).unwrap();

        let text = run("dhat", &["--num-callers=500"], scenario);
        let heap: Heap = serde_json::from_str(&text).unwrap();
        let is_counted = |place: &&Place| {
            let mut stack = place.stack.iter();
            stack.any(|&frame| heap.frames[frame].contains(COUNTED))
        };
        let places = heap.places.iter().filter(is_counted);
        Self {
            instructions,
            locked,
            allocations: places.map(|place| place.blocks).sum(),
        }
    }
}

/// Runs a scenario under a tool of valgrind, and returns the tool's output file.
fn run(tool: &str, options: &[&str], scenario: &str) -> String {
    let file = format!("{}/{scenario}.{tool}", env!("CARGO_TARGET_TMPDIR"));
    let output = Command::new("valgrind")
        .arg(format!("--tool={tool}"))
        .arg(format!("--{tool}-out-file={file}"))
        .args(options)
        .arg(env::current_exe().unwrap())
        .args([SCENARIO, scenario])
        .output()
        .expect("valgrind is installed");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{scenario}: {log}");
    fs::read_to_string(file).unwrap()
}

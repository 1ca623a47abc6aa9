//! The whole proxy in one thread, with simulated time, between simulated clients and a simulated Kling.
//!
//! A seed makes a [`Plan`]: the requests of the clients, their times, their patience and their retries, and
//! the reaction of upstream to each request that arrives. [`world::run`] carries it out on in-memory
//! sockets, which replace the network below the connector and at the listener. Everything between is the
//! real program. Then [`Books`] reports the rules that were broken. A plan that breaks a rule is made
//! smaller, and its seed is printed: `SIMULATION_SEED=7 cargo test --test simulation` runs that seed alone.

mod books;
mod client;
mod log;
mod plan;
mod upstream;
mod world;

use std::env;
use std::ops::Add as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use books::{Books, Outcomes};
use plan::Plan;

/// Number of seeds to run. `SIMULATION_SEEDS` sets another number.
const SEEDS: u64 = 10_000;

/// Reads a number from the environment.
fn given(variable: &str) -> Option<u64> {
    Some(env::var(variable).ok()?.parse().expect("a number"))
}

/// Removes steps from a plan as long as it still breaks a rule.
fn shrink(mut plan: Plan) -> (Plan, Books) {
    let mut books = world::run(&plan);
    loop {
        let smaller = plan.smaller().find_map(|plan| {
            let books = world::run(&plan);
            (!books.violations().is_empty()).then_some((plan, books))
        });
        match smaller {
            Some(smaller) => (plan, books) = smaller,
            None => return (plan, books),
        }
    }
}

fn check(seed: u64) -> Outcomes {
    let plan = Plan::of(seed);
    let books = world::run(&plan);
    if books.violations().is_empty() {
        return books.outcomes();
    }
    let (plan, books) = shrink(plan);
    panic!(
        "seed {seed} breaks a rule: {:#?}\n{plan:#?}\n{books:#?}",
        books.violations()
    );
}

#[test]
#[expect(clippy::print_stdout, reason = "how to run it again")]
fn no_task_is_paid_twice_or_lost_and_every_request_ends() {
    if let Some(seed) = given("SIMULATION_SEED") {
        println!("{:?}", check(seed));
        return;
    }
    let seeds = given("SIMULATION_SEEDS").unwrap_or(SEEDS);
    println!("seeds 0 to {seeds}");
    let next = AtomicU64::new(0);
    let work = || {
        let mut all = Outcomes::default();
        while let seed = next.fetch_add(1, Relaxed)
            && seed < seeds
        {
            all += check(seed);
        }
        all
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let outcomes = threads.into_iter().map(|thread| thread.join().unwrap());
        outcomes.fold(Outcomes::default(), Outcomes::add)
    });
    println!("{all:?}");
    assert!(all.is_usual(), "{all:?}");
}

#[test]
fn plan_runs_the_same_way_each_time() {
    for seed in 0..50 {
        let plan = Plan::of(seed);
        let [first, second] = [(); 2].map(|()| format!("{:#?}", world::run(&plan)));
        assert_eq!(first, second, "seed {seed}");
    }
}

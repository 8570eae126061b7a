//! Turns under faults, on a clock and a store of the test's own: replicas pause, crash and come back
//! late, store calls fail or are done twice or without an answer, clients go away and come back.
//!
//! Every run follows from its seed. `SIMULATION_SEED=… cargo test --test simulation` repeats one,
//! `SIMULATION_RUNS=…` says how many there are.

mod harness {
    pub mod sim;
}

use std::{env, sync::atomic::AtomicU64, sync::atomic::Ordering, thread};

use harness::sim::{Tally, run};

const RUNS: u64 = 10_000;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} must be a number")),
    )
}

#[test]
fn turns_keep_their_promises_whatever_fails() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let found = run(seed);
        println!("{}", found.trace.join("\n"));
        assert!(
            found.faults.is_empty(),
            "SIMULATION_SEED={seed}: {:#?}",
            found.faults
        );
        return;
    }
    let runs = number("SIMULATION_RUNS").unwrap_or(RUNS);
    let next = AtomicU64::new(0);
    let work = || {
        let mut tally = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= runs {
                return tally;
            }
            let found = run(seed);
            assert!(
                found.faults.is_empty(),
                "SIMULATION_SEED={seed}: {:#?}",
                found.faults
            );
            tally.add(&found.tally);
        }
    };
    let threads = thread::available_parallelism().map_or(2, usize::from);
    let mut tally = Tally::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(found) => tally.add(&found),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    println!("{tally:#?}");
    // What never happens is not tested.
    if runs >= 1_000 {
        for (what, count) in tally.counts() {
            assert!(count > runs / 200, "too few {what}: {count}");
        }
    }
}

#[test]
fn a_seed_repeats_a_run() {
    for seed in 0..100 {
        let (first, second) = (run(seed).trace, run(seed).trace);
        for (first, second) in first.iter().zip(&second) {
            assert_eq!(first, second, "seed {seed}");
        }
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

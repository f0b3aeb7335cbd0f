//! Whole clusters in virtual time: real coordinators, workers without a model, and faults by chance. A seed is a run, and the same
//! seed is the same run. PHALANX_SIMULATION_SEEDS: how many, PHALANX_SIMULATION_SEED: the first one.

mod client;
mod coordinators;
mod faults;
mod journal;
mod network;
mod orders;
mod reach;
mod scenario;
mod worker;
mod world;

use std::cell::Cell;
use std::io::Write;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use journal::Journal;
use scenario::Scenario;
use tokio::runtime::Builder;
use world::World;

const SEEDS: u64 = 2000;
/// Lines of a run that are told when it fails.
const KEPT: usize = 400;

thread_local! {
    /// Panics of this thread: a task's would go unnoticed.
    static PANICS: Cell<usize> = const { Cell::new(0) };
}

/// What came of a seed.
struct Outcome {
    digest: u64,
    lines: String,
    failure: Option<String>,
}

fn run(seed: u64) -> Outcome {
    count_panics();
    let panics = PANICS.get();
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    let journal = runtime.block_on(async {
        let journal = Journal::new(KEPT);
        World::run(Scenario::new(seed), journal.clone()).await;
        journal
    });
    drop(runtime);
    let panicked = (PANICS.get() > panics).then(|| "a task panicked".to_owned());
    let failure = journal.verdict().or(panicked);
    let failure = failure.map(|what| {
        format!("{}{}PHALANX_SIMULATION_SEED={seed}: {what}", Scenario::new(seed), journal.lines())
    });
    Outcome { digest: journal.digest(), lines: journal.lines(), failure }
}

fn count_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.set(PANICS.get() + 1);
            told(panic);
        }));
    });
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().expect("a number"))
}

/// Runs all seeds on all cores; panics with the first failure.
fn for_all(seeds: std::ops::Range<u64>, check: impl Fn(u64) -> Option<String> + Sync) {
    let next = AtomicU64::new(seeds.start);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return None;
            }
            if let Some(failure) = check(seed) {
                next.store(seeds.end, Ordering::Relaxed);
                return Some(failure);
            }
        }
    };
    let failure = thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().expect("a verdict")).next()
    });
    if let Some(failure) = failure {
        panic!("{failure}");
    }
}

#[test]
fn whatever_fails_every_answer_is_whole() {
    let (first, count) = (number("PHALANX_SIMULATION_SEED", 0), number("PHALANX_SIMULATION_SEEDS", SEEDS));
    let begun = Instant::now();
    for_all(first..first + count, |seed| {
        let Outcome { lines, failure, .. } = run(seed);
        if count == 1 {
            tell(&lines);
        }
        failure
    });
    tell(&format!("{count} seeds from {first} on took {:.1} s\n", begun.elapsed().as_secs_f64()));
}

#[test]
fn the_same_seed_is_the_same_run() {
    for_all(0..50, |seed| {
        let (once, again) = (run(seed), run(seed));
        (once.digest != again.digest)
            .then(|| format!("seed {seed} was two runs:\n{}\n{}", once.lines, again.lines))
    });
}

/// On the standard error itself: a test that passes may say something too.
fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

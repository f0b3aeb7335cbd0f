//! Persistent threads that work on one job at a time.
//!
//! The driver opens a job, works on it like everybody else, closes it when no task is left, and waits for those
//! that came in meanwhile. A thread that is late (asleep, or preempted) misses the job and nobody waits for it, so
//! short jobs never pay for a wake-up and more threads than cores do no harm.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{Error, Result};

/// Waits of a few dozen microseconds are spun away, longer ones slept: a step's ops follow each other closely.
const SPINS: usize = 1000;
const YIELDS: usize = 100;

/// The threads: the one that calls, as worker 0, and `threads - 1` more.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One thread drives a pool: not `Sync`.
    driver: PhantomData<Cell<()>>,
}

type Job = dyn Fn(usize) + Sync;

struct Shared {
    /// Odd while a job is open.
    turn: AtomicUsize,
    /// Written by the driver only while no job is open and no helper is inside.
    job: UnsafeCell<Option<*const Job>>,
    /// Helpers that are inside the job, or looking whether it is open.
    inside: AtomicUsize,
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written under the protocol above and only read by helpers that are `inside` an open turn; what it
// points to is `Sync` and outlives the turn, since `run` does not return before `inside` is zero.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `threads - 1` helpers.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        let helpers = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            turn: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            inside: AtomicUsize::new(0),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, helpers: Vec::with_capacity(helpers), driver: PhantomData };
        for helper in 0..helpers {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("kernels-{}", helper + 1))
                .spawn(move || shared.help(helper))
                .map_err(|error| Error::Unsupported(format!("no thread for the pool: {error}")))?;
            pool.helpers.push(handle);
        }
        Ok(pool)
    }

    /// How many threads work, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work(worker, task)` once for every task below `tasks`, claimed one by one in ascending order. A panic
    /// in one of them is raised here once the others are done.
    pub(crate) fn for_each(&self, tasks: usize, work: impl Fn(usize, usize) + Sync) {
        if tasks <= 1 || self.helpers.is_empty() {
            (0..tasks).for_each(|task| work(0, task));
            return;
        }
        let next = AtomicUsize::new(0);
        let job = |worker| {
            loop {
                let task = next.fetch_add(1, SeqCst);
                if task >= tasks {
                    break;
                }
                work(worker, task);
            }
        };
        self.run(&job, tasks - 1);
    }

    /// Calls `job(worker)` here and on those helpers that come in time, of which `wanted` are woken.
    fn run(&self, job: &(dyn Fn(usize) + Sync), wanted: usize) {
        // A driver that panicked in its last job left the helpers' panics behind.
        self.take_panic();
        // SAFETY: only the lifetime changes; `Turn` below ends before `job` does, also when `job` unwinds.
        let job_forever =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Job>(job) };
        // SAFETY: no job is open and nobody is inside: the last turn waited for that, and only this thread opens one.
        unsafe { *self.shared.job.get() = Some(job_forever) };
        let turn = Turn::open(&self.shared);
        for (asleep, helper) in self.shared.asleep.iter().zip(&self.helpers).take(wanted) {
            if asleep.swap(false, SeqCst) {
                helper.thread().unpark();
            }
        }
        job(0);
        drop(turn);
        if let Some(panic) = self.take_panic() {
            resume_unwind(panic);
        }
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A helper catches its jobs' panics, so it cannot have died of one.
            let _ = helper.join();
        }
    }
}

/// An open job; dropping it closes the job and waits for the helpers inside.
struct Turn<'a>(&'a Shared);

impl<'a> Turn<'a> {
    fn open(shared: &'a Shared) -> Self {
        shared.turn.fetch_add(1, SeqCst);
        Turn(shared)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.turn.fetch_add(1, SeqCst);
        let mut waits = 0;
        while self.0.inside.load(SeqCst) != 0 {
            pause(waits);
            waits += 1;
        }
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self, helper: usize) {
        let mut last = 0;
        while let Some(turn) = self.next_turn(last, helper) {
            last = turn;
            self.inside.fetch_add(1, SeqCst);
            // The job may have closed since; if a newer one is open, that is as good.
            if self.turn.load(SeqCst) % 2 == 1 {
                // SAFETY: `inside` was raised before the turn was seen open, so the driver waits for this helper.
                let job = unsafe { (*self.job.get()).map(|job| &*job) };
                let outcome = catch_unwind(AssertUnwindSafe(|| job.map(|job| job(helper + 1))));
                if let Err(panic) = outcome {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            self.inside.fetch_sub(1, SeqCst);
        }
    }

    /// Waits until a job other than `last` is open; `None` when the pool ends.
    fn next_turn(&self, last: usize, helper: usize) -> Option<usize> {
        let open = || Some(self.turn.load(SeqCst)).filter(|&turn| turn % 2 == 1 && turn != last);
        for waits in 0..SPINS + YIELDS {
            if let Some(turn) = open() {
                return Some(turn);
            }
            pause(waits);
        }
        loop {
            self.asleep[helper].store(true, SeqCst);
            // Looked at after `asleep` is set, as the driver looks at `asleep` after the turn: one sees the other.
            if self.stop.load(SeqCst) {
                return None;
            }
            if let Some(turn) = open() {
                self.asleep[helper].store(false, SeqCst);
                return Some(turn);
            }
            thread::park();
        }
    }
}

fn pause(waits: usize) {
    if waits < SPINS {
        std::hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_for_any_number_of_threads() {
        for threads in 1..5 {
            let pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each(tasks, |worker, task| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, SeqCst);
                });
                assert!(counts.iter().all(|count| count.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn sleeping_helpers_wake_for_long_jobs() {
        let pool = Pool::new(2).unwrap();
        thread::sleep(std::time::Duration::from_millis(20));
        let helped = AtomicBool::new(false);
        pool.for_each(2, |worker, _| {
            helped.fetch_or(worker == 1, SeqCst);
            thread::sleep(std::time::Duration::from_millis(200));
        });
        assert!(helped.load(SeqCst));
    }

    #[test]
    fn a_panic_reaches_the_driver_and_the_pool_lives_on() {
        for guilty in 0..2 {
            let pool = Pool::new(3).unwrap();
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.for_each(64, |worker, task| {
                    thread::sleep(std::time::Duration::from_micros(100));
                    assert!(worker.min(1) != guilty && task != 63, "guilty");
                });
            }));
            assert!(outcome.is_err());
            let done = AtomicUsize::new(0);
            pool.for_each(100, |_, _| {
                done.fetch_add(1, SeqCst);
            });
            assert_eq!(done.load(SeqCst), 100);
        }
    }
}

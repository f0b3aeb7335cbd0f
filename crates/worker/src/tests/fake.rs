//! An executor that computes nothing.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cluster::{Assignment, Part};
use comm::AbortHandle;
use engine::{SampledToken, SeqSlice, StepOutput, StepPlan};
use model::{Executor, Loaded, StepSize};

use crate::load::Load;

/// Of every unit's weights.
pub(super) const UNIT_BYTES: u64 = 100;

/// Loads nothing, but counts what it would have. One executor may exist at a time.
#[derive(Default)]
pub(super) struct FakeLoad {
    pub(super) alive: Arc<AtomicUsize>,
    /// Devices that were opened.
    pub(super) opened: Arc<AtomicUsize>,
    /// The outcomes of the first loads, the last one first; then they succeed.
    pub(super) failures: Mutex<Vec<model::Error>>,
    /// Steps last until they are aborted.
    pub(super) stuck: bool,
    /// A load that comes to this unit gets no further, and lasts until it is aborted.
    pub(super) slow: Option<usize>,
    /// How steps end.
    pub(super) broken: Option<fn() -> model::Error>,
    /// Two steps are taken, and the first ends when the second has begun.
    pub(super) ahead: bool,
}

/// The units whose weights are there.
pub(super) type FakeHeld = BTreeSet<usize>;

pub(super) struct FakeExecutor {
    alive: Arc<AtomicUsize>,
    held: FakeHeld,
    broken: Option<fn() -> model::Error>,
    abort: Option<AbortHandle>,
    steps_in_flight: usize,
    running: VecDeque<StepOutput>,
}

impl FakeLoad {
    fn hold(
        &self,
        units: Range<usize>,
        flag: &AbortHandle,
        held: &mut FakeHeld,
    ) -> Result<Loaded, model::Error> {
        let mut loaded = Loaded::default();
        held.retain(|unit| units.contains(unit));
        for unit in units {
            if self.slow == Some(unit) {
                while !flag.is_aborted() {
                    std::thread::yield_now();
                }
                return Err(comm::Error::Aborted.into());
            }
            match held.insert(unit) {
                true => loaded.read += UNIT_BYTES,
                false => loaded.kept += UNIT_BYTES,
            }
        }
        Ok(loaded)
    }
}

impl Load for FakeLoad {
    type Connections = AbortHandle;
    type Held = FakeHeld;
    type Formed = AbortHandle;
    type Executor = FakeExecutor;

    fn connect(&self, _: &Assignment, abort: AbortHandle) -> Result<AbortHandle, model::Error> {
        Ok(abort)
    }

    fn open(&self) -> Result<FakeHeld, model::Error> {
        self.opened.fetch_add(1, Ordering::SeqCst);
        Ok(FakeHeld::new())
    }

    fn load(
        &self,
        assignment: &Assignment,
        abort: AbortHandle,
        flag: &AbortHandle,
        held: &mut FakeHeld,
    ) -> Result<(AbortHandle, Loaded), model::Error> {
        if let Some(error) = self.failures.lock().unwrap().pop() {
            return Err(error);
        }
        Ok((abort, self.hold(assignment.own_units().clone(), flag, held)?))
    }

    fn prepare(&self, part: &Part, flag: &AbortHandle, held: &mut FakeHeld) -> Result<Loaded, model::Error> {
        self.hold(part.units.clone(), flag, held)
    }

    fn start(
        &self,
        _: &Assignment,
        abort: AbortHandle,
        held: FakeHeld,
    ) -> Result<FakeExecutor, model::Error> {
        assert_eq!(self.alive.fetch_add(1, Ordering::SeqCst), 0, "the share before is still there");
        Ok(FakeExecutor {
            alive: self.alive.clone(),
            held,
            broken: self.broken,
            abort: self.stuck.then_some(abort),
            steps_in_flight: if self.ahead { 2 } else { 1 },
            running: VecDeque::new(),
        })
    }

    fn leave(&self, mut executor: FakeExecutor) -> Result<FakeHeld, model::Error> {
        Ok(std::mem::take(&mut executor.held))
    }
}

impl Executor for FakeExecutor {
    fn steps_in_flight(&self) -> usize {
        self.steps_in_flight
    }

    fn launch(&mut self, plan: &StepPlan) -> Result<(), model::Error> {
        if let Some(abort) = &self.abort {
            while !abort.is_aborted() {
                std::thread::yield_now();
            }
            return Err(model::Error::Collective(comm::Error::Aborted));
        }
        if let Some(error) = self.broken {
            return Err(error());
        }
        let token = |slice: &SeqSlice| SampledToken { seq: slice.seq, id: slice.start, logprob: 0.0 };
        let tokens = plan.slices.iter().map(token).collect();
        assert!(self.running.len() < self.steps_in_flight, "more steps than it takes");
        self.running.push_back(StepOutput { epoch: plan.epoch, step: plan.step, tokens });
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<StepOutput>, model::Error> {
        assert_eq!(self.running.len(), self.steps_in_flight, "it would wait");
        Ok(self.running.pop_front())
    }

    fn is_ready(&mut self) -> Result<bool, model::Error> {
        Ok(self.running.len() == self.steps_in_flight)
    }

    fn largest_step(&self) -> Option<StepSize> {
        Some(StepSize { rows: 40, sampled: 9 })
    }

    fn kv_blocks(&self) -> usize {
        17
    }

    fn weight_bytes(&self) -> u64 {
        1 << 40
    }
}

impl Drop for FakeExecutor {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

//! Lets faults happen on the executor thread, around whatever loads and runs steps there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use cluster::{Assignment, Part};
use comm::{AbortHandle, WireFault, Wires};
use engine::{StepOutput, StepPlan};
use model::{Executor, Loaded, StepSize};
use rustix::process::{Signal, getpid, kill_process};
use tracing::warn;

use super::{Fault, Moment, What};
use crate::load::Load;

/// The faults of a process. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Faults {
    state: Arc<Mutex<State>>,
    /// Where a fault is one of wires.
    wires: Option<Wires>,
}

#[derive(Debug)]
struct State {
    /// Those that have not happened.
    pending: Vec<Fault>,
    /// Steps that were taken up so far.
    steps: u64,
    /// What each of them takes more.
    slowness: Duration,
}

impl Faults {
    /// None unless there are any.
    pub(crate) fn new(faults: &[Fault]) -> Option<Self> {
        let of_wires = |fault: &Fault| matches!(fault.what, What::Cut | What::Drop | What::Corrupt);
        let wires = faults.iter().any(of_wires).then(Wires::default);
        let state = State { pending: faults.to_vec(), steps: 0, slowness: Duration::ZERO };
        (!faults.is_empty()).then(|| Self { state: Arc::new(Mutex::new(state)), wires })
    }

    /// What connections are to lead over.
    pub(crate) fn wires(&self) -> Option<&Wires> {
        self.wires.as_ref()
    }

    fn begin_load(&self) {
        let due = self.state().due(Moment::Load);
        due.into_iter().for_each(|fault| self.strike(fault));
    }

    fn begin_step(&self) {
        let due = {
            let mut state = self.state();
            state.steps += 1;
            let step = state.steps;
            state.due(Moment::Step(step))
        };
        due.into_iter().for_each(|fault| self.strike(fault));
        let slowness = self.state().slowness;
        thread::sleep(slowness);
    }

    /// Nothing is locked meanwhile: this may not return.
    fn strike(&self, fault: Fault) {
        warn!(%fault, "breaks on purpose");
        let wire = |fault| {
            if let Some(wires) = &self.wires {
                wires.strike(fault);
            }
        };
        match fault.what {
            What::Kill => signal(Signal::KILL),
            What::Stop => signal(Signal::STOP),
            What::Hang(Some(time)) => thread::sleep(time),
            What::Hang(None) => loop {
                thread::park();
            },
            What::Slow(time) => self.state().slowness += time,
            What::Cut => wire(WireFault::Cut),
            What::Drop => wire(WireFault::Drop),
            What::Corrupt => wire(WireFault::Corrupt),
            What::Panic => panic!("{fault}: on purpose"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes what happens now.
    fn due(&mut self, moment: Moment) -> Vec<Fault> {
        self.pending.extract_if(.., |fault| fault.at == moment).collect()
    }
}

/// To this process.
fn signal(signal: Signal) {
    if let Err(error) = kill_process(getpid(), signal) {
        warn!(%error, ?signal, "the fault does not happen");
    }
}

/// Loads as another does, with faults.
pub(crate) struct FaultyLoad<L> {
    pub(crate) load: L,
    pub(crate) faults: Faults,
}

/// Runs steps as another does, with faults.
pub(crate) struct FaultyExecutor<E> {
    executor: E,
    faults: Faults,
}

impl<L: Load> Load for FaultyLoad<L> {
    type Connections = L::Connections;
    type Held = L::Held;
    type Formed = L::Formed;
    type Executor = FaultyExecutor<L::Executor>;

    fn connect(&self, assignment: &Assignment, abort: AbortHandle) -> Result<L::Connections, model::Error> {
        self.load.connect(assignment, abort)
    }

    fn open(&self) -> Result<L::Held, model::Error> {
        self.load.open()
    }

    fn load(
        &self,
        assignment: &Assignment,
        connections: L::Connections,
        abort: &AbortHandle,
        held: &mut L::Held,
    ) -> Result<(L::Formed, Loaded), model::Error> {
        self.faults.begin_load();
        self.load.load(assignment, connections, abort, held)
    }

    fn prepare(&self, part: &Part, abort: &AbortHandle, held: &mut L::Held) -> Result<Loaded, model::Error> {
        self.load.prepare(part, abort, held)
    }

    fn start(
        &self,
        assignment: &Assignment,
        formed: L::Formed,
        held: L::Held,
    ) -> Result<Self::Executor, model::Error> {
        let executor = self.load.start(assignment, formed, held)?;
        Ok(FaultyExecutor { executor, faults: self.faults.clone() })
    }

    fn leave(&self, executor: Self::Executor) -> Result<L::Held, model::Error> {
        self.load.leave(executor.executor)
    }
}

impl<E: Executor> Executor for FaultyExecutor<E> {
    fn steps_in_flight(&self) -> usize {
        self.executor.steps_in_flight()
    }

    fn launch(&mut self, plan: &StepPlan) -> Result<(), model::Error> {
        self.faults.begin_step();
        self.executor.launch(plan)
    }

    fn poll(&mut self) -> Result<Option<StepOutput>, model::Error> {
        self.executor.poll()
    }

    fn is_ready(&mut self) -> Result<bool, model::Error> {
        self.executor.is_ready()
    }

    fn largest_step(&self) -> Option<StepSize> {
        self.executor.largest_step()
    }

    fn kv_blocks(&self) -> usize {
        self.executor.kv_blocks()
    }

    fn weight_bytes(&self) -> u64 {
        self.executor.weight_bytes()
    }
}

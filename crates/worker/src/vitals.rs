//! What this worker does at the moment: written by the executor thread, read by the task that sends heartbeats.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cluster::{Activity, Progress};
use comm::AbortHandle;
use engine::{Epoch, StepId};

/// How far the worker is.
#[derive(Debug, Default)]
pub(crate) struct Vitals(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    epoch: Option<Epoch>,
    step: Option<StepId>,
    activity: Activity,
    /// Of the epoch's collective: it knows what is waited for.
    collective: AbortHandle,
    /// Bytes of weights that are there.
    held: u64,
}

impl Vitals {
    /// It connects and loads for `epoch`.
    pub(crate) fn load(&self, epoch: Epoch, collective: AbortHandle) {
        let mut state = self.state();
        let held = state.held;
        *state = State { epoch: Some(epoch), step: None, activity: Activity::Loading, collective, held };
    }

    /// It takes up a step.
    pub(crate) fn compute(&self, step: StepId) {
        let mut state = self.state();
        (state.step, state.activity) = (Some(step), Activity::Computing);
    }

    /// It has done all that it was told.
    pub(crate) fn rest(&self) {
        self.state().activity = Activity::Idle;
    }

    /// It has no part in a group any more.
    pub(crate) fn leave(&self) {
        let mut state = self.state();
        *state = State { held: state.held, ..State::default() };
    }

    /// Without a part in a group, it loads what it may need for one.
    pub(crate) fn prepare(&self) {
        let mut state = self.state();
        if state.epoch.is_none() {
            state.activity = Activity::Loading;
        }
    }

    /// It has done so, as far as it came.
    pub(crate) fn prepared(&self) {
        let mut state = self.state();
        if state.epoch.is_none() {
            state.activity = Activity::Idle;
        }
    }

    /// So many bytes of weights are there.
    pub(crate) fn holds(&self, bytes: u64) {
        self.state().held = bytes;
    }

    /// What a heartbeat tells.
    pub(crate) fn progress(&self) -> Progress {
        let State { epoch, step, activity, collective, held } = &*self.state();
        Progress {
            epoch: *epoch,
            step: *step,
            activity: *activity,
            waits_for: collective.waits_for(),
            calls: collective.calls(),
            held: *held,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
}

impl Vitals {
    /// It connects and loads for `epoch`.
    pub(crate) fn load(&self, epoch: Epoch, collective: AbortHandle) {
        *self.state() = State { epoch: Some(epoch), step: None, activity: Activity::Loading, collective };
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
        *self.state() = State::default();
    }

    /// What a heartbeat tells.
    pub(crate) fn progress(&self) -> Progress {
        let State { epoch, step, activity, collective } = &*self.state();
        Progress {
            epoch: *epoch,
            step: *step,
            activity: *activity,
            waits_for: collective.waits_for(),
            calls: collective.calls(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

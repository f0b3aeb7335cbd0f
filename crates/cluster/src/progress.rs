//! What heartbeats carry: how far a worker is, so that one that hangs is told from those that wait for it.

use engine::{Epoch, StepId};

use crate::proto;

/// How far a worker is in its part of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// What it has a part in; none: nothing.
    pub epoch: Option<Epoch>,
    /// The last step that it took up.
    pub step: Option<StepId>,
    /// What it does.
    pub activity: Activity,
    /// The member of the group without which it cannot go on: counted stage after stage, rank after rank.
    pub waits_for: Option<usize>,
    /// Exchanges with other ranks in this epoch, and parts of the weights that were loaded for it.
    pub calls: u64,
    /// Bytes of weights that it holds.
    pub held: u64,
}

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activity {
    /// Nothing: it waits for the coordinator.
    #[default]
    Idle,
    /// It connects with the other ranks, or loads.
    Loading,
    /// It runs a step.
    Computing,
}

impl From<Progress> for proto::Heartbeat {
    fn from(progress: Progress) -> Self {
        let Progress { epoch, step, activity, waits_for, calls, held } = progress;
        let activity = match activity {
            Activity::Idle => proto::Activity::Idle,
            Activity::Loading => proto::Activity::Loading,
            Activity::Computing => proto::Activity::Computing,
        };
        Self {
            epoch: epoch.map(Into::into),
            step: step.map(|step| step.0),
            activity: activity.into(),
            waits_for: waits_for.and_then(|rank| u32::try_from(rank).ok()),
            calls,
            held_bytes: held,
        }
    }
}

impl From<proto::Heartbeat> for Progress {
    fn from(heartbeat: proto::Heartbeat) -> Self {
        let activity = match heartbeat.activity() {
            proto::Activity::Idle => Activity::Idle,
            proto::Activity::Loading => Activity::Loading,
            proto::Activity::Computing => Activity::Computing,
        };
        let proto::Heartbeat { epoch, step, waits_for, calls, held_bytes: held, .. } = heartbeat;
        Self {
            epoch: epoch.map(Into::into),
            step: step.map(StepId),
            activity,
            waits_for: waits_for.map(|rank| rank as usize),
            calls,
            held,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_survives_the_wire() {
        for activity in [Activity::Idle, Activity::Loading, Activity::Computing] {
            let progress = Progress {
                epoch: Some(Epoch { term: 1, counter: 2 }),
                step: Some(StepId(3)),
                activity,
                waits_for: Some(4),
                calls: 5,
                held: 6,
            };
            assert_eq!(Progress::from(proto::Heartbeat::from(progress)), progress);
        }
        assert_eq!(Progress::from(proto::Heartbeat::default()), Progress::default());
    }
}

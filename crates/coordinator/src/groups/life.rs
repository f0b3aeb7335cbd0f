//! One group's epoch, from its assignments until it is over.

use std::collections::{BTreeMap, BTreeSet};

use cluster::WorkerId;
use engine::Epoch;

/// What a rank that has loaded its share can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    /// KV blocks.
    pub(crate) kv_blocks: u32,
    /// Steps before the first of them has ended.
    pub(crate) steps_in_flight: u32,
    /// Rows of a step, and of them those that are sampled from, where it has memory for no more.
    pub(crate) step_rows: Option<u32>,
    pub(crate) sampled_rows: Option<u32>,
}

impl Capacity {
    /// What both can take.
    fn common(self, other: Self) -> Self {
        let least = |a: Option<u32>, b: Option<u32>| a.into_iter().chain(b).min();
        Self {
            kv_blocks: self.kv_blocks.min(other.kv_blocks),
            steps_in_flight: self.steps_in_flight.min(other.steps_in_flight),
            step_rows: least(self.step_rows, other.step_rows),
            sampled_rows: least(self.sampled_rows, other.sampled_rows),
        }
    }
}

/// A group that loads or serves.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) epoch: Epoch,
    /// Stage after stage, rank after rank.
    pub(crate) members: Vec<WorkerId>,
    phase: Phase,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Ranks report one after the other.
    Loading {
        ready: BTreeMap<WorkerId, Capacity>,
        attached: BTreeSet<WorkerId>,
    },
    Serving,
}

impl Life {
    /// Its members begin to load.
    pub(crate) fn new(epoch: Epoch, members: Vec<WorkerId>) -> Self {
        let phase = Phase::Loading { ready: BTreeMap::new(), attached: BTreeSet::new() };
        Self { epoch, members, phase }
    }

    pub(crate) fn is_serving(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// A member has loaded its share.
    pub(crate) fn ready(&mut self, worker: WorkerId, capacity: Capacity) {
        if let Phase::Loading { ready, .. } = &mut self.phase {
            ready.insert(worker, capacity);
        }
    }

    /// A member has opened its Steps stream; false if that is not its turn.
    pub(crate) fn attach(&mut self, worker: WorkerId) -> bool {
        match &mut self.phase {
            Phase::Loading { attached, .. } => attached.insert(worker),
            Phase::Serving => false,
        }
    }

    /// Serves from now on, if it did not and all are ready and attached; what all of them can take.
    pub(crate) fn serve(&mut self) -> Option<Capacity> {
        let Phase::Loading { ready, attached } = &self.phase else { return None };
        if ready.len() < self.members.len() || attached.len() < self.members.len() {
            return None;
        }
        let capacity = ready.values().copied().reduce(Capacity::common)?;
        self.phase = Phase::Serving;
        Some(capacity)
    }
}

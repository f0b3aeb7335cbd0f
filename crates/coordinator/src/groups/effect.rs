//! What is to be done after something happened to the groups.

use std::fmt;

use cluster::{Assignment, Candidate, ModelReport, WorkerId};
use engine::Epoch;

use super::life::Capacity;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Give a worker its rank.
    Assign(WorkerId, Assignment),
    /// Take it back.
    Abandon(WorkerId, Epoch),
    /// End a worker's stream with this reason; it may join again.
    Dismiss(WorkerId, String),
    /// An epoch that loaded or served is over.
    Lost(Loss),
    /// All ranks of a group are there: run steps.
    Serve(Standing),
}

/// Why an epoch is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Whose.
    pub(crate) group: u32,
    /// The epoch.
    pub(crate) epoch: Epoch,
    /// Ranks of the group, in all stages.
    pub(crate) ranks: usize,
    /// Who was lost, and what it was; none: nobody, this is a planned change.
    pub(crate) member: Option<(Place, Candidate)>,
    /// In words.
    pub(crate) cause: String,
}

/// Where in its group a worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) stage: usize,
    pub(crate) rank: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of stage {}", self.rank, self.stage)
    }
}

/// A group that can run steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Its number.
    pub(crate) group: u32,
    pub(crate) epoch: Epoch,
    pub(crate) report: ModelReport,
    /// Its stages, and its ranks in all of them.
    pub(crate) stages: usize,
    pub(crate) ranks: usize,
    /// What every rank has.
    pub(crate) capacity: Capacity,
}

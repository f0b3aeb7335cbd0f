//! What groups are wanted, and why there are not so many.

use std::fmt;

use engine::ShardError;
use serde::{Deserialize, Serialize};

/// Stages of a group, at most: each has a step in flight.
pub const MAX_STAGES: usize = 16;
/// Ranks of a stage, and groups, at most.
pub(crate) const MAX_GROUP: usize = 4096;

/// What groups are to be formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How a group is cut.
    pub shape: Shape,
    /// Groups, at most.
    pub replicas: usize,
    /// Tokens of the longest context that every group must have room for; none: what the model was made for.
    pub context: Option<u32>,
}

/// How a group is cut: `stages` runs of layers, each over ranks that step together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// As people say.
    Fixed {
        /// Stages of a group.
        stages: usize,
        /// Ranks of a stage where there are enough workers; then their memory need only hold the weights and some tokens.
        ranks: usize,
        /// Ranks of a stage when there are not, as long as weights and one context fit.
        min_ranks: usize,
    },
    /// From the model, the context and the workers' memory: groups with as few stages as will do, and all workers in them.
    Auto {
        /// Stages of a group, at most.
        max_stages: usize,
    },
}

impl Shape {
    /// Whether there can be such groups, of some model; else why not.
    pub fn check(&self) -> Result<(), String> {
        let (_, stages) = self.stages();
        if !(1..=MAX_STAGES).contains(&stages) {
            return Err(format!("{stages} stages: use 1 to {MAX_STAGES}"));
        }
        match *self {
            Shape::Fixed { ranks, .. } if !(1..=MAX_GROUP).contains(&ranks) => {
                Err(format!("{ranks} ranks: use 1 to {MAX_GROUP}"))
            }
            Shape::Fixed { ranks, min_ranks, .. } if !(1..=ranks).contains(&min_ranks) => {
                Err(format!("{min_ranks} ranks at least: use 1 to {ranks}, the number of ranks"))
            }
            _ => Ok(()),
        }
    }

    /// Ranks of a stage: the fewest, and the most of a model with so many units.
    pub fn widths(&self, units: usize) -> (usize, usize) {
        match *self {
            Shape::Fixed { ranks, min_ranks, .. } => (min_ranks.clamp(1, ranks.max(1)), ranks),
            Shape::Auto { .. } => (1, units),
        }
    }

    /// Stages of a group: the fewest and the most.
    pub fn stages(&self) -> (usize, usize) {
        match *self {
            Shape::Fixed { stages, .. } => (stages, stages),
            Shape::Auto { max_stages } => (1, max_stages),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "up to {} groups of ", self.replicas)?;
        match self.shape {
            Shape::Fixed { stages, ranks, min_ranks } if min_ranks < ranks => {
                write!(f, "{stages} stages of {min_ranks} to {ranks} ranks")
            }
            Shape::Fixed { stages, ranks, .. } => write!(f, "{stages} stages of {ranks} ranks"),
            Shape::Auto { max_stages } => {
                write!(f, "up to {max_stages} stages of as many ranks as there are")
            }
        }
    }
}

/// What is missing for (another) group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// Too few workers.
    #[error("waiting for workers: {joined} of {wanted} joined")]
    Workers {
        /// Workers there are.
        joined: usize,
        /// Workers the smallest group takes.
        wanted: usize,
    },
    /// Enough of them, too few in any one zone.
    #[error(
        "{joined} workers joined, but at most {largest} in one zone, and a stage takes {wanted}: \
         give those that are close to each other the same --zone, or lower --min-ranks"
    )]
    Zones {
        /// Workers there are.
        joined: usize,
        /// Workers of the largest zone.
        largest: usize,
        /// Workers the smallest stage takes.
        wanted: usize,
    },
    /// Their memory is too small.
    #[error(
        "the workers that joined ({joined}) have memory for {fitting} of the model's {units} units beside {tokens} tokens of context, \
         which would take {bytes} bytes in all: add workers or memory (--memory, --kv-memory), or lower --max-context"
    )]
    Memory {
        /// Workers of the zone that has most room.
        joined: usize,
        /// Units that fit there.
        fitting: u64,
        /// Units of the model.
        units: u32,
        /// Tokens that must fit too.
        tokens: u64,
        /// What all takes, on one rank.
        bytes: u64,
    },
    /// Ranks that the model cannot be cut to.
    #[error(transparent)]
    Width(#[from] ShardError),
    /// Stages that it cannot be cut to.
    #[error("{stages} stages asked for, but the model has {layers} layers: use 1 to {layers}")]
    Stages {
        /// Stages asked for.
        stages: usize,
        /// Layers that there are.
        layers: u32,
    },
}

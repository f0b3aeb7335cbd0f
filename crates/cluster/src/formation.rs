//! Forming a group: which workers, in which order, with which units. Pure.

use std::fmt;
use std::ops::Range;

use engine::{Epoch, ShardError, rank_ranges};

use crate::convert::{self, Malformed};
use crate::{Difference, ModelReport, proto};

/// A worker's number with its coordinator; a worker that joins again gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A worker that could take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its number.
    pub id: WorkerId,
    /// Where its collectives listen.
    pub address: String,
    /// What it serves.
    pub report: ModelReport,
}

/// A group: its ranks in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Formation {
    /// What all of them serve.
    pub report: ModelReport,
    /// Who has which rank.
    pub workers: Vec<WorkerId>,
    /// Where each rank listens and what it holds.
    pub members: Vec<Member>,
}

/// One rank of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where its collectives listen.
    pub address: String,
    /// Its shard units.
    pub units: Range<usize>,
}

/// What one rank is told of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The group's life that begins.
    pub epoch: Epoch,
    /// Name of the group.
    pub group: String,
    /// The rank of whoever reads this; below `members.len()`.
    pub rank: usize,
    /// All ranks.
    pub members: Vec<Member>,
}

/// Why no group stands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormationError {
    /// Too few workers.
    #[error("waiting for workers: {joined} of {wanted} joined")]
    Missing {
        /// Workers there are.
        joined: usize,
        /// Workers a group takes.
        wanted: usize,
    },
    /// A worker that serves something else.
    #[error("worker at {address} {difference}")]
    Differs {
        /// Where it listens.
        address: String,
        /// What is not the same.
        difference: Difference,
    },
    /// A width that the model cannot be cut to.
    #[error(transparent)]
    Width(#[from] ShardError),
}

/// Forms a group of `width` ranks out of `candidates`; the first come serve, the rest are spares. The first
/// candidate's model is the group's.
pub fn form<'a>(
    candidates: impl ExactSizeIterator<Item = &'a Candidate>,
    width: usize,
) -> Result<Formation, FormationError> {
    let joined = candidates.len();
    let chosen: Vec<_> = candidates.take(width).collect();
    let Some(first) = chosen.first().filter(|_| joined >= width) else {
        return Err(FormationError::Missing { joined, wanted: width });
    };
    for worker in &chosen {
        worker
            .report
            .agree(&first.report)
            .map_err(|difference| FormationError::Differs { address: worker.address.clone(), difference })?;
    }
    let ranges = rank_ranges(first.report.units as usize, width)?;
    let member = |(worker, units): (&&Candidate, _)| Member { address: worker.address.clone(), units };
    Ok(Formation {
        report: first.report.clone(),
        workers: chosen.iter().map(|worker| worker.id).collect(),
        members: chosen.iter().zip(ranges).map(member).collect(),
    })
}

impl From<Assignment> for proto::Assignment {
    fn from(assignment: Assignment) -> Self {
        let member = |member: Member| proto::Member {
            collective_address: member.address,
            first_unit: member.units.start as u32,
            end_unit: member.units.end as u32,
        };
        Self {
            epoch: Some(assignment.epoch.into()),
            group: assignment.group,
            rank: assignment.rank as u32,
            members: assignment.members.into_iter().map(member).collect(),
        }
    }
}

impl TryFrom<proto::Assignment> for Assignment {
    type Error = Malformed;

    fn try_from(assignment: proto::Assignment) -> Result<Self, Malformed> {
        let proto::Assignment { epoch, group, rank, members } = assignment;
        let rank = rank as usize;
        convert::check("assignment.rank", rank < members.len(), "is not one of the members")?;
        let member = |member: proto::Member| {
            let proto::Member { collective_address, first_unit, end_unit } = member;
            convert::check("assignment.members.end_unit", first_unit < end_unit, "leaves no units")?;
            let address = convert::text("assignment.members.collective_address", collective_address)?;
            Ok(Member { address, units: first_unit as usize..end_unit as usize })
        };
        let members = members.into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
        let tiles = members.windows(2).all(|pair| pair[0].units.end == pair[1].units.start);
        convert::check("assignment.members", tiles && members[0].units.start == 0, "do not tile the model")?;
        Ok(Self {
            epoch: convert::epoch("assignment.epoch", epoch)?,
            group: convert::text("assignment.group", group)?,
            rank,
            members,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(id: u64, fingerprint: &str) -> Candidate {
        let report = ModelReport {
            name: "yi".into(),
            vocabulary: 64_000,
            max_context: 4096,
            units: 4,
            block_size: 16,
            eos: vec![2],
            fingerprint: fingerprint.into(),
        };
        Candidate { id: WorkerId(id), address: format!("host{id}:1"), report }
    }

    fn form_of(candidates: &[Candidate], width: usize) -> Result<Formation, FormationError> {
        form(candidates.iter(), width)
    }

    #[test]
    fn the_first_come_serve() {
        let formation =
            form_of(&[candidate(1, "a"), candidate(2, "a"), candidate(5, "a"), candidate(6, "a")], 3);
        let formation = formation.unwrap();
        assert_eq!(formation.workers, [WorkerId(1), WorkerId(2), WorkerId(5)]);
        assert_eq!(formation.members[0], Member { address: "host1:1".into(), units: 0..2 });
        assert_eq!(formation.members[2], Member { address: "host5:1".into(), units: 3..4 });
    }

    #[test]
    fn what_is_missing_is_said() {
        let error = form_of(&[candidate(1, "a")], 2).unwrap_err();
        assert_eq!(error.to_string(), "waiting for workers: 1 of 2 joined");
        assert!(matches!(form_of(&[], 0), Err(FormationError::Missing { joined: 0, wanted: 0 })));
    }

    #[test]
    fn what_differs_is_said() {
        let error = form_of(&[candidate(1, "a"), candidate(2, "b")], 2).unwrap_err();
        assert_eq!(error.to_string(), "worker at host2:1 serves fingerprint b, the group a");
        let mut other = candidate(2, "a");
        other.report.block_size = 32;
        let error = form_of(&[candidate(1, "a"), other], 2).unwrap_err();
        assert_eq!(error.to_string(), "worker at host2:1 serves block_size 32, the group 16");
    }

    #[test]
    fn a_width_that_the_model_does_not_have_is_said() {
        let candidates: Vec<_> = (1..=5).map(|id| candidate(id, "a")).collect();
        let error = form_of(&candidates, 5).unwrap_err();
        assert!(error.to_string().starts_with("5 workers asked for, but the model has 4 units"), "{error}");
    }

    #[test]
    fn an_assignment_survives_the_wire_and_must_tile() {
        let members = form_of(&[candidate(1, "a"), candidate(2, "a")], 2).unwrap().members;
        let assignment =
            Assignment { epoch: Epoch { term: 1, counter: 2 }, group: "yi".into(), rank: 1, members };
        let mut wire = proto::Assignment::from(assignment.clone());
        assert_eq!(Assignment::try_from(wire.clone()), Ok(assignment));
        wire.members[1].first_unit = 3;
        assert_eq!(Assignment::try_from(wire.clone()).unwrap_err().field, "assignment.members");
        wire.rank = 2;
        assert_eq!(Assignment::try_from(wire).unwrap_err().field, "assignment.rank");
    }
}

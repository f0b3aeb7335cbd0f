//! What a rank is told of its group.

use std::ops::Range;

use engine::Epoch;

use crate::convert::{self, Malformed};
use crate::proto;

/// Members of a group: far above any real one.
const MAX_MEMBERS: usize = 4096;

/// One rank of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where its collectives listen.
    pub address: String,
    /// Its shard units.
    pub units: Range<usize>,
}

/// One stage of a group's pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StageMembers {
    /// The decoder layers that all of its ranks hold.
    pub layers: Range<usize>,
    /// Its ranks in order; their units tile the model.
    pub members: Vec<Member>,
}

/// What one rank is told of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The group's life that begins.
    pub epoch: Epoch,
    /// Name of the group.
    pub group: String,
    /// The stage of whoever reads this; below `stages.len()`.
    pub stage: usize,
    /// Its rank there; below the stage's number of members.
    pub rank: usize,
    /// All stages in order; their layers tile the model.
    pub stages: Vec<StageMembers>,
}

impl Assignment {
    /// The stage of whoever reads this.
    pub fn own_stage(&self) -> &StageMembers {
        &self.stages[self.stage]
    }

    /// The shard units of whoever reads this.
    pub fn own_units(&self) -> &Range<usize> {
        &self.own_stage().members[self.rank].units
    }

    /// The number of a rank among all members, which are counted stage after stage.
    pub fn number(&self, stage: usize, rank: usize) -> usize {
        self.stages.iter().take(stage).map(|stage| stage.members.len()).sum::<usize>() + rank
    }
}

impl From<Assignment> for proto::Assignment {
    fn from(assignment: Assignment) -> Self {
        let Assignment { epoch, group, stage, rank, stages } = assignment;
        let member = |member: Member| proto::Member {
            collective_address: member.address,
            first_unit: member.units.start as u32,
            end_unit: member.units.end as u32,
        };
        let one = |stage: StageMembers| proto::Stage {
            first_layer: stage.layers.start as u32,
            end_layer: stage.layers.end as u32,
            members: stage.members.into_iter().map(member).collect(),
        };
        Self {
            epoch: Some(epoch.into()),
            group,
            stage: stage as u32,
            rank: rank as u32,
            stages: stages.into_iter().map(one).collect(),
        }
    }
}

impl TryFrom<proto::Assignment> for Assignment {
    type Error = Malformed;

    fn try_from(assignment: proto::Assignment) -> Result<Self, Malformed> {
        let proto::Assignment { epoch, group, stage, rank, stages } = assignment;
        let (stage, rank) = (stage as usize, rank as usize);
        let members = stages.iter().map(|stage| stage.members.len()).sum::<usize>();
        convert::check("assignment.stages", members <= MAX_MEMBERS, "have too many members")?;
        convert::check("assignment.stage", stage < stages.len(), "is not one of the stages")?;
        convert::check("assignment.rank", rank < stages[stage].members.len(), "is not one of the members")?;
        let stages = stages.into_iter().map(StageMembers::try_from).collect::<Result<Vec<_>, _>>()?;
        let tiled = tile(stages.iter().map(|stage| &stage.layers));
        convert::check("assignment.stages", tiled, "do not tile the model's layers")?;
        let end = |stage: &StageMembers| stage.members.last().map(|member| member.units.end);
        let alike = stages.iter().all(|stage| end(stage) == end(&stages[0]));
        convert::check("assignment.stages", alike, "differ in the model's units")?;
        let epoch = convert::epoch("assignment.epoch", epoch)?;
        Ok(Self { epoch, group: convert::text("assignment.group", group)?, stage, rank, stages })
    }
}

impl TryFrom<proto::Stage> for StageMembers {
    type Error = Malformed;

    fn try_from(stage: proto::Stage) -> Result<Self, Malformed> {
        let proto::Stage { first_layer, end_layer, members } = stage;
        let member = |member: proto::Member| {
            let proto::Member { collective_address, first_unit, end_unit } = member;
            let address = convert::text("assignment.members.collective_address", collective_address)?;
            Ok(Member { address, units: first_unit as usize..end_unit as usize })
        };
        let members = members.into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
        let tiled = tile(members.iter().map(|member| &member.units));
        convert::check("assignment.members", tiled, "do not tile the model's units")?;
        Ok(Self { layers: first_layer as usize..end_layer as usize, members })
    }
}

/// Whether these follow each other from 0 on, none of them empty; at least one.
fn tile<'a>(ranges: impl Iterator<Item = &'a Range<usize>>) -> bool {
    let mut end = 0;
    for range in ranges {
        if range.start != end || range.is_empty() {
            return false;
        }
        end = range.end;
    }
    end > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assignment_survives_the_wire_and_must_tile() {
        let member = |units| Member { address: "here:1".into(), units };
        let stage = |layers, members| StageMembers { layers, members };
        let stages = vec![
            stage(0..3, vec![member(0..4)]),
            stage(3..5, vec![member(0..1), member(1..3), member(3..4)]),
            stage(5..8, vec![member(0..2), member(2..4)]),
        ];
        let epoch = Epoch { term: 1, counter: 2 };
        let assignment = Assignment { epoch, group: "yi".into(), stage: 1, rank: 2, stages };
        assert_eq!((assignment.number(0, 0), assignment.number(1, 2), assignment.number(2, 1)), (0, 3, 5));
        assert_eq!((assignment.own_units(), &assignment.own_stage().layers), (&(3..4), &(3..5)));
        let wire = proto::Assignment::from(assignment.clone());
        assert_eq!(Assignment::try_from(wire.clone()), Ok(assignment));

        let refused = |change: &dyn Fn(&mut proto::Assignment)| {
            let mut wire = wire.clone();
            change(&mut wire);
            Assignment::try_from(wire).unwrap_err().to_string()
        };
        let units = "malformed message: assignment.members do not tile the model's units";
        assert_eq!(refused(&|wire| wire.stages[1].members[1].first_unit = 2), units);
        assert_eq!(refused(&|wire| wire.stages[1].members[1].end_unit = 1), units);
        assert_eq!(refused(&|wire| wire.stages[2].members.clear()), units);
        let layers = "malformed message: assignment.stages do not tile the model's layers";
        assert_eq!(refused(&|wire| wire.stages[2].first_layer = 4), layers);
        assert_eq!(refused(&|wire| wire.stages[0].end_layer = 0), layers);
        let alike = "malformed message: assignment.stages differ in the model's units";
        assert_eq!(refused(&|wire| drop(wire.stages[2].members.pop())), alike);
        assert_eq!(
            refused(&|wire| wire.rank = 3),
            "malformed message: assignment.rank is not one of the members"
        );
        assert_eq!(
            refused(&|wire| wire.stage = 3),
            "malformed message: assignment.stage is not one of the stages"
        );
    }
}

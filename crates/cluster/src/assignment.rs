//! What a rank is told of its group.

use std::ops::Range;

use engine::Epoch;

use crate::convert::{self, Malformed};
use crate::proto;

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

    #[test]
    fn an_assignment_survives_the_wire_and_must_tile() {
        let member = |units| Member { address: "here:1".into(), units };
        let members = vec![member(0..2), member(2..4)];
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

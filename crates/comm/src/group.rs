//! Who belongs to a group, and who connects to whom.
//!
//! A group is a pipeline of stages, each of which has ranks. Ranks of a stage all connect with each other; between neighbouring
//! stages there is a connection wherever a rank gets the hidden state from another.

use std::fmt;
use std::iter::StepBy;
use std::ops::Range;

use auth::Secret;

use crate::collective::{Error, Result};
use crate::handshake::MAX_NAME;

/// The group that is to form.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// Its name, of at most 64 bytes.
    pub group: String,
    /// Its epoch: election term and counter.
    pub epoch: (u64, u64),
    /// The stage of this rank.
    pub stage: usize,
    /// Its number within the stage.
    pub rank: usize,
    /// `host:port` of every rank of every stage, in order.
    pub stages: Vec<Vec<String>>,
    /// What its members know.
    pub secret: Secret,
}

/// A rank of a stage. Lower ones are connected to, higher ones are awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Member {
    pub(crate) stage: usize,
    pub(crate) rank: usize,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of stage {}", self.rank, self.stage)
    }
}

impl GroupSpec {
    pub(crate) fn check(&self) -> Result<()> {
        let own = self.own();
        let detail = if own.stage >= self.stages.len() || own.rank >= self.width(own.stage) {
            format!("{own} in stages of {:?} ranks", self.widths().collect::<Vec<_>>())
        } else if self.widths().any(|width| width == 0) {
            format!("stages of {:?} ranks", self.widths().collect::<Vec<_>>())
        } else if self.group.len() > MAX_NAME {
            format!("the group's name has {} bytes, {MAX_NAME} are allowed", self.group.len())
        } else {
            return Ok(());
        };
        Err(Error::Shape { op: "form", detail })
    }

    /// The number of a rank among all members, which are counted stage after stage.
    pub fn number(&self, stage: usize, rank: usize) -> usize {
        self.widths().take(stage).sum::<usize>() + rank
    }

    pub(crate) fn own(&self) -> Member {
        Member { stage: self.stage, rank: self.rank }
    }

    /// Ranks of a stage; none where there is no such stage.
    pub(crate) fn width(&self, stage: usize) -> usize {
        self.stages.get(stage).map_or(0, Vec::len)
    }

    fn widths(&self) -> impl Iterator<Item = usize> {
        self.stages.iter().map(Vec::len)
    }

    pub(crate) fn address(&self, member: Member) -> &str {
        &self.stages[member.stage][member.rank]
    }

    /// The rank that this one gets the hidden state from; none in the first stage.
    pub(crate) fn sender(&self) -> Option<Member> {
        let stage = self.stage.checked_sub(1)?;
        Some(Member { stage, rank: sender(self.rank, self.width(stage)) })
    }

    /// The ranks that get the hidden state from this one.
    pub(crate) fn receivers(&self) -> impl Iterator<Item = Member> {
        let stage = self.stage + 1;
        let ranks = receivers(self.rank, self.width(self.stage), self.width(stage));
        ranks.map(move |rank| Member { stage, rank })
    }

    /// Whom this rank connects to.
    pub(crate) fn below(&self) -> Vec<Member> {
        let stage = self.stage;
        self.sender().into_iter().chain((0..self.rank).map(|rank| Member { stage, rank })).collect()
    }

    /// Who connects to this rank.
    pub(crate) fn above(&self) -> Vec<Member> {
        let stage = self.stage;
        let ranks = self.rank + 1..self.width(stage);
        ranks.map(|rank| Member { stage, rank }).chain(self.receivers()).collect()
    }

    /// An error that names a rank: of this rank's stage, unless it says another.
    pub(crate) fn of(&self, member: Member, error: Error) -> Error {
        if member.stage == self.stage { error } else { error.of_stage(member.stage) }
    }
}

/// The rank that sends to rank `rank` of the next stage, of a stage of `width` ranks, all of which hold the whole hidden state.
pub(crate) fn sender(rank: usize, width: usize) -> usize {
    rank % width
}

/// The ranks of the next stage, which has `next` ranks, that rank `rank` of `width` sends to.
pub(crate) fn receivers(rank: usize, width: usize, next: usize) -> StepBy<Range<usize>> {
    (rank..next.max(rank)).step_by(width)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(widths: &[usize], stage: usize, rank: usize) -> GroupSpec {
        let stages = widths.iter().map(|&width| vec![String::new(); width]).collect();
        GroupSpec { group: "a".into(), epoch: (1, 1), stage, rank, stages, secret: Secret::random() }
    }

    /// Every connection has one end that makes it and one that awaits it, and every rank has one that sends to it.
    #[test]
    fn both_ends_of_a_connection_know_of_it() {
        for widths in [&[1][..], &[4], &[1, 3], &[3, 2], &[2, 5, 1, 4]] {
            let seats = widths.iter().enumerate();
            let members: Vec<Member> = seats
                .flat_map(|(stage, &width)| (0..width).map(move |rank| Member { stage, rank }))
                .collect();
            let of = |member: Member| spec(widths, member.stage, member.rank);
            for &member in &members {
                let own = of(member);
                own.check().unwrap();
                assert!(own.below().iter().all(|&lower| lower < member));
                for &other in &members {
                    assert_eq!(own.below().contains(&other), of(other).above().contains(&member));
                    assert_eq!(own.sender() == Some(other), of(other).receivers().any(|it| it == member));
                }
            }
        }
    }

    #[test]
    fn ranks_and_stages_that_are_not_there_are_refused() {
        for (widths, stage, rank) in
            [(&[][..], 0, 0), (&[1], 0, 1), (&[1, 2], 2, 0), (&[2, 1], 1, 1), (&[1, 0], 0, 0)]
        {
            assert!(spec(widths, stage, rank).check().is_err(), "{widths:?}");
        }
    }
}

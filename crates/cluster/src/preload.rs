//! What spares hold, so that little is to be loaded when one takes a lost rank's place. Pure.

use std::ops::Range;

use crate::convert::{self, Malformed};
use crate::{Candidate, GroupFormation, proto};

/// A part of a model: units of a run of layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Decoder layers.
    pub layers: Range<usize>,
    /// Shard units.
    pub units: Range<usize>,
}

/// What the `number`-th spare should hold beside these groups: of the first one that it could have a part in as much as fits, since any
/// rank may be lost. A spare needs no room for keys and values, and so holds more than a rank. Where not everything fits, spares differ.
pub fn preload<'a>(
    spare: &Candidate,
    number: usize,
    groups: impl IntoIterator<Item = &'a GroupFormation>,
) -> Option<Part> {
    groups.into_iter().find_map(|group| {
        spare.report.agree(&group.report).ok()?;
        let stages: Vec<_> = group.stages.iter().filter(|stage| stage.zone == spare.resources.zone).collect();
        let (first, last) = (stages.first()?, stages.last()?);
        let all = group.report.units as usize;
        // Stages of a zone follow each other, or nearly: what is between them may be lost as well.
        let whole = first.layers.start..last.layers.end;
        if capacity(spare, &whole) >= all {
            return Some(Part { layers: whole, units: 0..all });
        }
        let stage = stages[number % stages.len()];
        let count = capacity(spare, &stage.layers).min(all);
        let rank = &stage.ranks[number / stages.len() % stage.ranks.len()];
        let start = rank.member.units.start.min(all - count);
        (count > 0).then(|| Part { layers: stage.layers.clone(), units: start..start + count })
    })
}

/// Units of these layers that a worker has memory for, without any keys and values.
fn capacity(worker: &Candidate, layers: &Range<usize>) -> usize {
    usize::try_from(worker.report.needs.capacity(layers, 0, worker.resources.memory, 0)).unwrap_or(usize::MAX)
}

impl From<Part> for proto::Part {
    fn from(Part { layers, units }: Part) -> Self {
        Self {
            first_layer: layers.start as u32,
            end_layer: layers.end as u32,
            first_unit: units.start as u32,
            end_unit: units.end as u32,
        }
    }
}

impl TryFrom<proto::Part> for Part {
    type Error = Malformed;

    fn try_from(part: proto::Part) -> Result<Self, Malformed> {
        let proto::Part { first_layer, end_layer, first_unit, end_unit } = part;
        convert::check("part.layers", first_layer < end_layer, "are none")?;
        convert::check("part.units", first_unit < end_unit, "are none")?;
        Ok(Self {
            layers: first_layer as usize..end_layer as usize,
            units: first_unit as usize..end_unit as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ModelReport, Policy, Resources, Shape, WorkerId, form};
    use engine::MemoryNeeds;

    /// A worker with memory for so many units of ten layers.
    fn worker(id: u64, zone: &str, units: u64) -> Candidate {
        let needs = MemoryNeeds { layers: 10, layer_unit: 10, kv_token: 0, ..MemoryNeeds::default() };
        let report = ModelReport {
            name: "yi".into(),
            vocabulary: 100,
            max_context: 64,
            units: 4,
            block_size: 16,
            eos: vec![2],
            fingerprint: "a".into(),
            needs,
        };
        let memory = units * 100;
        let resources = Resources { zone: zone.into(), device: "cpu".into(), memory, kv_memory: memory };
        Candidate { id: WorkerId(id), address: format!("w{id}:1"), host: "h".into(), report, resources }
    }

    fn groups(workers: &[Candidate], stages: usize, ranks: usize) -> Vec<GroupFormation> {
        let shape = Shape::Fixed { stages, ranks, min_ranks: ranks };
        let policy = Policy { shape, replicas: 1, context: None };
        form(workers, &policy, &Default::default()).groups
    }

    #[test]
    fn a_spare_holds_everything_if_it_can() {
        let workers: Vec<_> = (0..4).map(|id| worker(id, "", 4)).collect();
        for (stages, ranks) in [(1, 4), (2, 2)] {
            let groups = groups(&workers, stages, ranks);
            let part = preload(&worker(9, "", 4), 0, &groups);
            assert_eq!(part, Some(Part { layers: 0..10, units: 0..4 }), "{stages} stages");
        }
    }

    #[test]
    fn spares_that_cannot_hold_different_parts() {
        let workers: Vec<_> = (0..4).map(|id| worker(id, "", 2)).collect();
        let wide = groups(&workers, 1, 4);
        let units = |number| preload(&worker(9, "", 2), number, &wide).unwrap().units;
        assert_eq!([0, 1, 2, 3, 4].map(units), [0..2, 1..3, 2..4, 2..4, 0..2]);
        let deep = groups(&workers, 2, 2);
        let part = |number| preload(&worker(9, "", 3), number, &deep).unwrap();
        assert_eq!(part(0), Part { layers: 0..5, units: 0..4 });
        assert_eq!(part(1), Part { layers: 5..10, units: 0..4 });
        assert_eq!(preload(&worker(9, "", 0), 0, &wide), None);
    }

    #[test]
    fn what_it_can_have_no_part_in_a_spare_does_not_hold() {
        let workers: Vec<_> = (0..2).map(|id| worker(id, "here", 4)).collect();
        let groups = groups(&workers, 1, 2);
        assert_eq!(preload(&worker(9, "there", 4), 0, &groups), None);
        let mut other = worker(9, "here", 4);
        other.report.fingerprint = "b".into();
        assert_eq!(preload(&other, 0, &groups), None);
        assert_eq!(preload(&worker(9, "here", 4), 0, &[]), None);
    }

    #[test]
    fn a_part_survives_the_wire_and_is_not_empty() {
        let part = Part { layers: 2..5, units: 1..4 };
        let wire = proto::Part::from(part.clone());
        assert_eq!(Part::try_from(wire), Ok(part));
        assert!(Part::try_from(proto::Part { end_layer: 2, ..wire }).is_err());
        assert!(Part::try_from(proto::Part { end_unit: 0, ..wire }).is_err());
    }
}

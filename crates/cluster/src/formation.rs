//! Forming groups: which workers, in which order, with which units. Pure.
//!
//! What stands keeps standing. Groups that lost members close ranks, those that lost least first, with free workers of the same
//! zones or narrower. New groups are made of the rest, as many as memory allows, and then the narrowest take in whoever is left,
//! up to the width that is wanted. Everybody else is a spare.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use engine::{Epoch, ShardError};

use crate::policy::{Policy, Shape, Shortage};
use crate::ranges::{Holder, share_out};
use crate::{Assignment, Candidate, Member, ModelReport, StageMembers, WorkerId};

#[cfg(test)]
mod tests;

/// All groups, and who is in none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Formation {
    /// Complete groups, by their numbers.
    pub groups: Vec<GroupFormation>,
    /// Workers without a group.
    pub spares: Vec<WorkerId>,
    /// Why there are fewer groups than the policy asks for.
    pub shortage: Option<Shortage>,
}

/// A group: one copy of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupFormation {
    /// Tells it from the others, as long as it stands.
    pub number: u32,
    /// What all of its workers serve.
    pub report: ModelReport,
    /// Its stages in order; their layers tile the model.
    pub stages: Vec<Stage>,
}

/// A run of layers and the ranks that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Its layers.
    pub layers: Range<usize>,
    /// Where its ranks are.
    pub zone: String,
    /// Its ranks in order; their units tile the model.
    pub ranks: Vec<Rank>,
}

/// A worker in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rank {
    /// Who.
    pub worker: WorkerId,
    /// Where it listens and what it holds.
    pub member: Member,
}

impl fmt::Display for GroupFormation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<_> = self.stages.iter().map(|stage| stage.ranks.len().to_string()).collect();
        write!(f, "group {} has {} ranks", self.number, widths.join(" + "))
    }
}

impl GroupFormation {
    /// All of its workers: stage after stage, rank after rank.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.stages.iter().flat_map(|stage| stage.ranks.iter().map(|rank| rank.worker))
    }

    /// Stage and rank of a member, by its number among all of them.
    pub fn place(&self, number: usize) -> Option<(usize, usize)> {
        let mut first = 0;
        self.stages.iter().enumerate().find_map(|(stage, ranks)| {
            let rank = number - first;
            first += ranks.ranks.len();
            (number < first).then_some((stage, rank))
        })
    }

    /// What each of its workers is told when `epoch` begins.
    pub fn assignments(&self, epoch: Epoch) -> impl Iterator<Item = (WorkerId, Assignment)> + '_ {
        let members = |stage: &Stage| StageMembers {
            layers: stage.layers.clone(),
            members: stage.ranks.iter().map(|rank| rank.member.clone()).collect(),
        };
        let stages: Vec<_> = self.stages.iter().map(members).collect();
        let group = format!("group {}", self.number);
        let seats = self.stages.iter().enumerate().flat_map(|(stage, ranks)| {
            ranks.ranks.iter().enumerate().map(move |(rank, place)| (stage, rank, place.worker))
        });
        seats.map(move |(stage, rank, worker)| {
            let (group, stages) = (group.clone(), stages.clone());
            (worker, Assignment { epoch, group, stage, rank, stages })
        })
    }
}

/// Forms groups out of `workers`, whose order does not matter. `previous` is what stood before; its members may be gone.
pub fn form<'a>(
    workers: impl IntoIterator<Item = &'a Candidate>,
    policy: &Policy,
    previous: &Formation,
) -> Formation {
    let free = workers.into_iter().map(|worker| (worker.id, worker)).collect();
    let mut draft = Draft { policy: *policy, free, claimed: BTreeSet::new(), groups: Vec::new() };
    let (standing, broken): (Vec<_>, Vec<_>) =
        previous.groups.iter().partition(|group| group.workers().all(|id| draft.free.contains_key(&id)));
    standing.into_iter().for_each(|group| draft.close_ranks(group));
    let mut broken: Vec<(usize, &GroupFormation)> = broken
        .into_iter()
        .map(|group| (group.workers().filter(|id| !draft.free.contains_key(id)).count(), group))
        .collect();
    broken.sort_by_key(|(lost, group)| (*lost, group.number));
    draft.claimed = broken.iter().flat_map(|(_, group)| group.workers()).collect();
    broken.into_iter().for_each(|(_, group)| draft.close_ranks(group));
    draft.claimed.clear();
    while draft.groups.len() < policy.replicas && draft.found(previous) {}
    while draft.widen() {}
    draft.finish()
}

/// Groups in the making.
struct Draft<'a> {
    policy: Policy,
    free: BTreeMap<WorkerId, &'a Candidate>,
    /// Members of groups that lost others: taken into another group after all who are in none.
    claimed: BTreeSet<WorkerId>,
    groups: Vec<Group<'a>>,
}

struct Group<'a> {
    number: u32,
    report: &'a ModelReport,
    teams: Vec<Team<'a>>,
}

/// The workers of a stage. A team that would not hold every stage of its group does not stand: so it is of no matter which zone
/// has which stage.
struct Team<'a> {
    layers: Range<usize>,
    /// The layers of all stages.
    cut: Rc<[Range<usize>]>,
    zone: &'a str,
    members: Vec<&'a Candidate>,
    /// The stage as it stood before, if it did.
    before: Option<&'a Stage>,
}

impl<'a> Draft<'a> {
    /// Puts a group of before together again, out of those who are left and as few others as will do.
    fn close_ranks(&mut self, before: &'a GroupFormation) {
        let stages = before.stages.len();
        let (fewest, most) = self.policy.shape.stages();
        if self.groups.len() >= self.policy.replicas || stages < fewest || stages > most {
            return;
        }
        let cut: Rc<[_]> = before.stages.iter().map(|stage| stage.layers.clone()).collect();
        let survivors = |stage: &'a Stage| {
            let members = stage.ranks.iter().filter_map(|rank| self.free.remove(&rank.worker)).collect();
            let (layers, cut) = (stage.layers.clone(), cut.clone());
            Team { layers, cut, zone: &stage.zone, members, before: Some(stage) }
        };
        let mut teams: Vec<_> = before.stages.iter().map(survivors).collect();
        if !teams.iter_mut().all(|team| self.complete(team, &before.report)) {
            return self.give_back(teams);
        }
        self.groups.push(Group { number: before.number, report: &before.report, teams });
    }

    /// Makes a new group out of free workers; false if that cannot be.
    fn found(&mut self, previous: &Formation) -> bool {
        let mut kinds: BTreeMap<&str, (usize, &'a ModelReport)> = BTreeMap::new();
        for worker in self.free.values() {
            kinds.entry(&worker.report.fingerprint).or_insert((0, &worker.report)).0 += 1;
        }
        let stands = |kind: &str| previous.groups.iter().any(|group| group.report.fingerprint == kind);
        let mut kinds: Vec<_> = kinds.into_iter().collect();
        kinds.sort_by_key(|(kind, (count, _))| (!stands(kind), Reverse(*count)));
        let (fewest, most) = self.policy.shape.stages();
        let group = (fewest..=most)
            .find_map(|stages| kinds.iter().find_map(|(_, (_, report))| self.teams(report, stages)));
        let Some((report, teams)) = group else { return false };
        let taken: BTreeSet<u32> = self.groups.iter().map(|group| group.number).collect();
        let number = (0..).find(|number| !taken.contains(number)).unwrap_or_default();
        self.groups.push(Group { number, report, teams });
        true
    }

    /// Frees the members of teams that came to nothing.
    fn give_back(&mut self, teams: Vec<Team<'a>>) {
        let members = teams.into_iter().flat_map(|team| team.members);
        self.free.extend(members.map(|worker| (worker.id, worker)));
    }

    /// The teams of a new group, in as few zones as can be; none, and nobody taken, if there are too few workers.
    fn teams(&mut self, report: &'a ModelReport, stages: usize) -> Option<(&'a ModelReport, Vec<Team<'a>>)> {
        let cut: Rc<[_]> = report.needs.stage_layers(stages)?.into();
        let mut zones = self.zones(report).into_iter();
        let mut zone = zones.next()?.0;
        let mut teams = Vec::with_capacity(stages);
        for layers in cut.iter().cloned() {
            let mut team = Team { layers, cut: cut.clone(), zone, members: Vec::new(), before: None };
            while !self.complete(&mut team, report) {
                let Some((next, _)) = zones.next() else {
                    self.give_back(teams);
                    return None;
                };
                zone = next;
                team.zone = zone;
            }
            teams.push(team);
        }
        Some((report, teams))
    }

    /// Zones of free workers of this kind, with their numbers; those with most first.
    fn zones(&self, report: &ModelReport) -> Vec<(&'a str, usize)> {
        let mut zones: BTreeMap<&'a str, usize> = BTreeMap::new();
        for worker in self.free.values().filter(|worker| worker.report.agree(report).is_ok()) {
            *zones.entry(&worker.resources.zone).or_default() += 1;
        }
        let mut zones: Vec<_> = zones.into_iter().collect();
        zones.sort_by_key(|(_, count)| Reverse(*count));
        zones
    }

    /// Takes free workers of the team's zone into it, the roomiest first, until it holds the model; false, and nobody taken, if it
    /// never does.
    fn complete(&mut self, team: &mut Team<'a>, report: &ModelReport) -> bool {
        let before = team.members.len();
        while self.room(team, &team.members, report).is_none() {
            let Some(next) = self.roomiest(team, report) else {
                self.free.extend(team.members.drain(before..).map(|worker| (worker.id, worker)));
                return false;
            };
            team.members.push(next);
            self.free.remove(&next.id);
        }
        true
    }

    /// Takes a free worker into the narrowest team that may be wider; false if there is none.
    fn widen(&mut self) -> bool {
        let mut places: Vec<_> = self
            .groups
            .iter()
            .enumerate()
            .flat_map(|(g, group)| {
                group.teams.iter().enumerate().map(move |(t, team)| (team.members.len(), g, t))
            })
            .collect();
        places.sort_unstable();
        for (_, g, t) in places {
            let (report, team) = (self.groups[g].report, &self.groups[g].teams[t]);
            let (_, most) = self.policy.shape.widths(report.units as usize);
            if team.members.len() >= most {
                continue;
            }
            let Some(next) = self.roomiest(team, report) else { continue };
            let wider: Vec<_> = team.members.iter().copied().chain([next]).collect();
            if self.room(team, &wider, report) >= self.room(team, &team.members, report) {
                self.free.remove(&next.id);
                self.groups[g].teams[t].members = wider;
                return true;
            }
        }
        false
    }

    /// The free worker of a team's zone and kind that has most room.
    fn roomiest(&self, team: &Team<'a>, report: &ModelReport) -> Option<&'a Candidate> {
        let [context, some] = self.tokens(report);
        let fitting = self
            .free
            .values()
            .filter(|worker| worker.resources.zone == team.zone && worker.report.agree(report).is_ok())
            .map(|worker| (capacity(worker, report, &team.cut, context), *worker))
            .filter(|(_, worker)| capacity(worker, report, &team.cut, some) > 0);
        let rank = |(capacity, worker): &(usize, &Candidate)| {
            (!self.claimed.contains(&worker.id), *capacity, Reverse(worker.id))
        };
        fitting.max_by_key(rank).map(|(_, worker)| worker)
    }

    /// The tokens for which a team of `members` has room beside its weights, if it is a team that may stand.
    fn room(&self, team: &Team<'_>, members: &[&Candidate], report: &ModelReport) -> Option<u64> {
        let units = report.units as usize;
        let (fewest, most) = self.policy.shape.widths(units);
        let width = members.len();
        if width < fewest || width > most {
            return None;
        }
        let fits = |tokens| {
            let capacities = members.iter().map(|worker| capacity(worker, report, &team.cut, tokens));
            let all = capacities.clone().all(|capacity| capacity > 0);
            all && width <= units && capacities.sum::<usize>() >= units
        };
        let [context, some] = self.tokens(report);
        let as_asked = matches!(self.policy.shape, Shape::Fixed { ranks, .. } if ranks == width);
        [context, some].into_iter().find(|&tokens| (as_asked || tokens == context) && fits(tokens))
    }

    /// Tokens of the context that every group must have room for, and those of one block, which will do for the shape asked for.
    fn tokens(&self, report: &ModelReport) -> [u64; 2] {
        let context =
            self.policy.context.map_or(report.max_context, |context| context.min(report.max_context));
        let block = u64::from(report.block_size.max(1));
        [u64::from(context).next_multiple_of(block), block]
    }

    fn finish(mut self) -> Formation {
        let shortage = if self.groups.len() < self.policy.replicas { self.shortage() } else { None };
        let mut groups = std::mem::take(&mut self.groups);
        groups.sort_by_key(|group| group.number);
        let groups = groups.into_iter().map(|group| self.placed(group)).collect();
        Formation { groups, spares: self.free.into_keys().collect(), shortage }
    }

    fn placed(&self, group: Group<'_>) -> GroupFormation {
        let Group { number, report, teams } = group;
        let stages = teams.into_iter().map(|team| self.place(team, report)).collect();
        GroupFormation { number, report: report.clone(), stages }
    }

    /// Gives a team's members their units: a stage whose members are as before stays as it was.
    fn place(&self, team: Team<'_>, report: &ModelReport) -> Stage {
        let held = |worker: WorkerId| {
            let rank = team.before?.ranks.iter().find(|rank| rank.worker == worker)?;
            Some(rank.member.units.clone())
        };
        let tokens = self.room(&team, &team.members, report).unwrap_or_default();
        let holder = |worker: &&Candidate| Holder {
            capacity: capacity(worker, report, &team.cut, tokens),
            held: held(worker.id),
        };
        let holders: Vec<_> = team.members.iter().map(holder).collect();
        // A team has room for all units.
        let shares = share_out(report.units as usize, &holders).unwrap_or_default();
        let rank = |(at, units): (usize, Range<usize>)| {
            let worker = team.members[at];
            Rank { worker: worker.id, member: Member { address: worker.address.clone(), units } }
        };
        let ranks = shares.into_iter().map(rank).collect();
        Stage { layers: team.layers.clone(), zone: team.zone.to_owned(), ranks }
    }

    /// What is missing for another group of the kind and zone that come closest.
    fn shortage(&self) -> Option<Shortage> {
        let mut kinds: BTreeMap<&str, Vec<&Candidate>> = BTreeMap::new();
        for worker in self.free.values() {
            kinds.entry(&worker.report.fingerprint).or_default().push(worker);
        }
        let (stages, _) = self.policy.shape.stages();
        let Some(workers) = kinds.into_values().max_by_key(Vec::len) else {
            let (fewest, _) = self.policy.shape.widths(1);
            return Some(Shortage::Workers { joined: 0, wanted: fewest * stages });
        };
        let (report, joined) = (&workers[0].report, workers.len());
        let (fewest, most) = self.policy.shape.widths(report.units as usize);
        if most > report.units as usize {
            return Some(ShardError::Width { width: most, units: report.units as usize }.into());
        }
        let Some(cut) = report.needs.stage_layers(stages) else {
            return Some(Shortage::Stages { stages, layers: report.needs.layers });
        };
        if joined < fewest * stages {
            return Some(Shortage::Workers { joined, wanted: fewest * stages });
        }
        let [context, some] = self.tokens(report);
        let (zone, largest) = self.zones(report).into_iter().next()?;
        if largest < fewest {
            return Some(Shortage::Zones { joined, largest, wanted: fewest });
        }
        let tokens = if largest >= most { some } else { context };
        let near = workers.iter().filter(|worker| worker.resources.zone == zone);
        let fitting = near.map(|worker| capacity(worker, report, &cut, tokens) as u64).sum();
        let bytes = report.needs.total(report.units.into(), tokens);
        Some(Shortage::Memory { joined: largest, fitting, units: report.units, tokens, bytes })
    }
}

/// Units of any stage of a group that fit into a worker's memory beside so many tokens; at most all.
fn capacity(worker: &Candidate, report: &ModelReport, cut: &[Range<usize>], tokens: u64) -> usize {
    let resources = &worker.resources;
    let units = |stage| report.needs.capacity(stage, tokens, resources.memory, resources.kv_memory);
    let least = cut.iter().map(units).min().unwrap_or_default();
    least.min(report.units.into()) as usize
}

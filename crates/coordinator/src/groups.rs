//! The life of all groups: who has joined, which epochs load or serve, and what to tell whom. Pure.
//!
//! Who holds what is `cluster::form`'s to say. Here a loss ends a group's epoch and begins its next at once, as `form` closes the
//! ranks. Groups whose members are all there stay as they are: a wider formation, which somebody who joined makes possible, is a change
//! that waits until it is asked for.

mod effect;
mod life;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use cluster::{
    Candidate, Formation, GroupFormation, ModelReport, Policy, Resources, Shape, Shortage, WorkerId, form,
};
use engine::{Epoch, ShardError};

pub(crate) use effect::{Effect, Loss, Place, Standing};
pub(crate) use life::Capacity;
use life::Life;

use crate::state::State;

/// A worker that wants to take part.
#[derive(Debug)]
pub(crate) struct Newcomer {
    /// Where its collectives listen.
    pub(crate) address: String,
    /// The machine that it runs on.
    pub(crate) host: String,
    pub(crate) report: ModelReport,
    pub(crate) resources: Resources,
}

/// The workers of one coordinator and the groups that they form.
#[derive(Debug)]
pub(crate) struct Groups {
    policy: Policy,
    /// The last epoch of any group: so a worker's epochs ascend, whatever groups it comes to.
    epoch: Epoch,
    next_worker: u64,
    workers: BTreeMap<WorkerId, Candidate>,
    /// Addresses of workers that are to have no part.
    drained: BTreeSet<String>,
    /// The last groups there were, which `form` holds on to.
    formation: Formation,
    /// Those that load or serve.
    lives: BTreeMap<u32, Life>,
    /// The group of whoever has a part in one.
    seats: BTreeMap<WorkerId, u32>,
    /// What was served first: requests in flight go on with the same model or not at all.
    served: Option<ModelReport>,
    /// Why the last formation did not come to serve.
    failure: Option<String>,
}

impl Groups {
    /// No groups yet. A later coordinator has a higher `term`.
    pub(crate) fn new(policy: Policy, term: u64) -> Self {
        Self {
            policy,
            epoch: Epoch { term, counter: 0 },
            next_worker: 1,
            workers: BTreeMap::new(),
            drained: BTreeSet::new(),
            formation: Formation::default(),
            lives: BTreeMap::new(),
            seats: BTreeMap::new(),
            served: None,
            failure: None,
        }
    }

    /// Has the workers at these addresses, should they come, no part in any group.
    pub(crate) fn hold_back(&mut self, addresses: impl IntoIterator<Item = String>) {
        self.drained.extend(addresses);
    }

    /// A worker wants to take part: its number, or why it cannot.
    pub(crate) fn join(&mut self, newcomer: Newcomer) -> Result<WorkerId, String> {
        let Newcomer { address, host, report, resources } = newcomer;
        let units = report.units as usize;
        let (_, width) = self.policy.shape.widths(units);
        if width == 0 || width > units {
            let reason = ShardError::Width { width, units }.to_string();
            self.failure = Some(reason.clone());
            return Err(reason);
        }
        if let Some(served) = self.served.as_ref().or(self.workers.values().next().map(|w| &w.report)) {
            report.is_same_model(served).map_err(|difference| format!("worker at {address} {difference}"))?;
        }
        let id = WorkerId(self.next_worker);
        self.next_worker += 1;
        self.workers.insert(id, Candidate { id, address, host, report, resources });
        Ok(id)
    }

    /// The worker that listens at `address`.
    pub(crate) fn at(&self, address: &str) -> Option<WorkerId> {
        self.workers.values().find(|worker| worker.address == address).map(|worker| worker.id)
    }

    /// Forms what groups can be formed beside those that stand. A new one waits for the width that is wanted, unless nobody else is
    /// expected.
    pub(crate) fn muster(&mut self, all_there: bool) -> Vec<Effect> {
        let known: BTreeSet<u32> = self.formation.groups.iter().map(|group| group.number).collect();
        let mut effects = Vec::new();
        for group in self.form().groups {
            let closes_ranks = self.served.is_some() && known.contains(&group.number);
            if !self.lives.contains_key(&group.number) && (all_there || closes_ranks || self.is_full(&group))
            {
                effects.extend(self.begin(group));
            }
        }
        effects
    }

    /// Serving groups that would have more ranks if they were formed anew now, with how many.
    pub(crate) fn could_be_wider(&self) -> Vec<(u32, usize)> {
        let may_change = |group: &GroupFormation| self.is_serving(group.number) && !self.is_full(group);
        if self.seats.len() == self.candidates().count() || !self.formation.groups.iter().any(may_change) {
            return Vec::new();
        }
        let ranks = |group: &GroupFormation| group.workers().count();
        let wider = |group: &GroupFormation| {
            self.is_serving(group.number) && ranks(group) > self.members(group.number).len()
        };
        self.form()
            .groups
            .iter()
            .filter(|group| wider(group))
            .map(|group| (group.number, ranks(group)))
            .collect()
    }

    /// Forms a group anew with all who are there.
    pub(crate) fn reform(&mut self, number: u32, cause: String) -> Vec<Effect> {
        let Some(group) = self.form().groups.into_iter().find(|group| group.number == number) else {
            return Vec::new();
        };
        let mut effects = self.end(number, None, cause);
        effects.extend(self.begin(group));
        effects
    }

    /// Takes another policy: groups that it wants otherwise are formed anew. Fails, and changes nothing, if no group could be formed
    /// by it.
    pub(crate) fn scale(&mut self, policy: Policy) -> Result<Vec<Effect>, Shortage> {
        let before = std::mem::replace(&mut self.policy, policy);
        let formed = self.form();
        if let Some(shortage) = &formed.shortage
            && formed.groups.is_empty()
            && !self.lives.is_empty()
        {
            self.policy = before;
            return Err(shortage.clone());
        }
        let wanted = formed.groups.clone();
        let stays = |group: &GroupFormation| wanted.contains(group);
        Ok(self.change("another policy", formed, stays))
    }

    /// Has the worker at `address` no part in any group from now on, or again (`drain` false). Fails, and changes nothing, if there is
    /// no such worker, or no group could be formed without it.
    pub(crate) fn drain(&mut self, address: &str, drain: bool) -> Result<Vec<Effect>, String> {
        if !drain {
            let was_drained = self.drained.remove(address);
            let effects = self.muster(self.served.is_some());
            return was_drained
                .then_some(effects)
                .ok_or_else(|| format!("no worker at {address} is drained"));
        }
        let worker = self.at(address).ok_or_else(|| format!("no worker has joined at {address}"))?;
        self.drained.insert(address.to_owned());
        let formed = self.form();
        if formed.groups.is_empty() && !self.lives.is_empty() {
            self.drained.remove(address);
            let missing = formed.shortage.map_or_else(String::new, |shortage| format!(": {shortage}"));
            return Err(format!("the worker at {address} cannot be spared{missing}"));
        }
        let stays = |group: &GroupFormation| group.workers().all(|member| member != worker);
        Ok(self.change(&format!("drained: {address}"), formed, stays))
    }

    /// A worker has loaded its share.
    pub(crate) fn ready(&mut self, worker: WorkerId, epoch: Epoch, capacity: Capacity) -> Vec<Effect> {
        if capacity.kv_blocks == 0 {
            return self.fail(worker, epoch, "has no room for KV blocks", None);
        }
        let Some((number, life)) = self.life_of(worker, epoch) else { return Vec::new() };
        life.ready(worker, capacity);
        self.serve(number)
    }

    /// A worker opens its Steps stream; false if that is not its turn.
    pub(crate) fn attach(&mut self, worker: WorkerId, epoch: Epoch) -> bool {
        self.life_of(worker, epoch).is_some_and(|(_, life)| life.attach(worker))
    }

    /// Once all ranks of a worker's group are ready and attached, steps can run.
    pub(crate) fn attached(&mut self, worker: WorkerId) -> Vec<Effect> {
        self.seats.get(&worker).copied().map_or_else(Vec::new, |number| self.serve(number))
    }

    /// A worker is gone.
    pub(crate) fn leave(&mut self, worker: WorkerId, cause: &str) -> Vec<Effect> {
        let mut effects = self.disband(worker, cause);
        self.workers.remove(&worker);
        effects.extend(self.muster(false));
        effects
    }

    /// A worker did not do its part in `epoch`, for its own sake or because of the member `at_member`. Whose fault it is counts no
    /// longer, until it joins again.
    pub(crate) fn fail(
        &mut self,
        worker: WorkerId,
        epoch: Epoch,
        reason: &str,
        at_member: Option<usize>,
    ) -> Vec<Effect> {
        let Some((_, life)) = self.life_of(worker, epoch) else { return Vec::new() };
        let culprit = at_member.and_then(|number| life.members.get(number)).copied().unwrap_or(worker);
        let mut effects = vec![Effect::Dismiss(culprit, reason.to_owned())];
        effects.extend(self.disband(culprit, reason));
        // What happens before a group ever served is told to whoever waits for it.
        let candidate = self.workers.remove(&culprit).filter(|_| self.served.is_none());
        if let Some(candidate) = candidate {
            self.failure = Some(format!("worker at {}: {reason}", candidate.address));
        }
        effects.extend(self.muster(false));
        effects
    }

    /// The epoch that a group serves, and the worker that samples for it.
    pub(crate) fn sampler(&self, number: u32) -> Option<(Epoch, WorkerId)> {
        let life = self.lives.get(&number).filter(|life| life.is_serving())?;
        let group = self.formation.groups.iter().find(|group| group.number == number)?;
        Some((life.epoch, group.stages.last()?.ranks.first()?.worker))
    }

    /// Where the groups stand, if none serves.
    pub(crate) fn state(&self) -> Option<State> {
        if self.lives.values().any(Life::is_serving) {
            return None;
        }
        if !self.lives.is_empty() {
            return Some(State::Loading);
        }
        if let Some(reason) = &self.failure {
            return Some(State::Failed(reason.clone()));
        }
        let joined = self.candidates().count();
        Some(match (self.form(), self.policy.shape) {
            (Formation { groups, shortage: Some(shortage), .. }, _) if groups.is_empty() => {
                State::Waiting(shortage)
            }
            (_, Shape::Fixed { stages, ranks, .. }) => {
                State::Waiting(Shortage::Workers { joined, wanted: stages * ranks })
            }
            (_, Shape::Auto { .. }) => State::Gathering { joined },
        })
    }

    /// The epoch in which a worker has a part, with the number of its group.
    pub(crate) fn seat(&self, worker: WorkerId) -> Option<(u32, Epoch)> {
        let number = *self.seats.get(&worker)?;
        Some((number, self.lives.get(&number)?.epoch))
    }

    /// The groups that load or serve, with their epochs.
    pub(crate) fn standing(&self) -> impl Iterator<Item = (&GroupFormation, Epoch)> {
        let groups = self.formation.groups.iter();
        groups.filter_map(|group| Some((group, self.lives.get(&group.number)?.epoch)))
    }

    /// Everybody who has joined.
    pub(crate) fn workers(&self) -> impl Iterator<Item = &Candidate> {
        self.workers.values()
    }

    /// Somebody who has joined.
    pub(crate) fn worker(&self, worker: WorkerId) -> Option<&Candidate> {
        self.workers.get(&worker)
    }

    /// Whoever waits for a part in a group.
    pub(crate) fn spares(&self) -> impl Iterator<Item = &Candidate> {
        self.candidates().filter(|worker| !self.seats.contains_key(&worker.id))
    }

    /// Whether a worker is to have no part in a group.
    pub(crate) fn is_drained(&self, worker: &Candidate) -> bool {
        self.drained.contains(&worker.address)
    }

    /// The policy in force.
    pub(crate) fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Whether a group runs steps.
    pub(crate) fn is_serving(&self, number: u32) -> bool {
        self.lives.get(&number).is_some_and(Life::is_serving)
    }

    /// Whether it does, or will.
    pub(crate) fn stands(&self, number: u32) -> bool {
        self.lives.contains_key(&number)
    }

    /// The members of a group, stage after stage; none unless it loads or serves.
    pub(crate) fn members(&self, number: u32) -> &[WorkerId] {
        self.lives.get(&number).map_or(&[], |life| &life.members)
    }

    /// The group, and its epoch, in which a worker has a part, if that is `epoch`.
    fn life_of(&mut self, worker: WorkerId, epoch: Epoch) -> Option<(u32, &mut Life)> {
        let number = *self.seats.get(&worker)?;
        let life = self.lives.get_mut(&number).filter(|life| life.epoch == epoch)?;
        Some((number, life))
    }

    /// Whether a group is as wide as the policy asks for, or the model allows.
    fn is_full(&self, group: &GroupFormation) -> bool {
        let (_, width) = self.policy.shape.widths(group.report.units as usize);
        group.stages.iter().all(|stage| stage.ranks.len() >= width)
    }

    fn candidates(&self) -> impl Iterator<Item = &Candidate> {
        self.workers.values().filter(|worker| !self.is_drained(worker))
    }

    fn form(&self) -> Formation {
        form(self.candidates(), &self.policy, &self.formation)
    }

    /// Goes over to a formation: ends the groups that do not stay and begins those of `formed` that do not stand.
    fn change(
        &mut self,
        cause: &str,
        formed: Formation,
        stays: impl Fn(&GroupFormation) -> bool,
    ) -> Vec<Effect> {
        let over = self.standing().filter(|(group, _)| !stays(group));
        let over: Vec<u32> = over.map(|(group, _)| group.number).collect();
        let mut effects: Vec<_> =
            over.into_iter().flat_map(|number| self.end(number, None, cause.to_owned())).collect();
        effects.extend(formed.groups.into_iter().flat_map(|group| self.begin(group)));
        effects
    }

    /// Begins a group's next epoch, unless it stands, or whoever it is of has a part in another.
    fn begin(&mut self, group: GroupFormation) -> Vec<Effect> {
        if self.stands(group.number) || group.workers().any(|worker| self.seats.contains_key(&worker)) {
            return Vec::new();
        }
        self.epoch.counter += 1;
        let members: Vec<WorkerId> = group.workers().collect();
        // Of a group that is not there any more, nothing is left to hold on to once its members are elsewhere.
        let gone = |other: &GroupFormation| {
            other.number == group.number || other.workers().any(|worker| members.contains(&worker))
        };
        self.formation.groups.retain(|other| self.lives.contains_key(&other.number) || !gone(other));
        let effects =
            group.assignments(self.epoch).map(|(worker, told)| Effect::Assign(worker, told)).collect();
        self.seats.extend(members.iter().map(|worker| (*worker, group.number)));
        self.lives.insert(group.number, Life::new(self.epoch, members));
        self.formation.groups.push(group);
        self.formation.groups.sort_by_key(|group| group.number);
        effects
    }

    /// Once all ranks of a group are ready and attached, steps can run.
    fn serve(&mut self, number: u32) -> Vec<Effect> {
        let Some(life) = self.lives.get_mut(&number) else { return Vec::new() };
        let group = self.formation.groups.iter().find(|group| group.number == number);
        let Some((group, capacity)) = group.zip(life.serve()) else { return Vec::new() };
        let report = group.report.clone();
        self.failure = None;
        self.served.get_or_insert_with(|| report.clone());
        let (stages, ranks) = (group.stages.len(), life.members.len());
        vec![Effect::Serve(Standing { group: number, epoch: life.epoch, report, stages, ranks, capacity })]
    }

    /// Ends the epoch in which `lost` has a part, if it has: whoever else does is told.
    fn disband(&mut self, lost: WorkerId, cause: &str) -> Vec<Effect> {
        let number = self.seats.get(&lost).copied();
        number.map_or_else(Vec::new, |number| self.end(number, Some(lost), cause.to_owned()))
    }

    fn end(&mut self, number: u32, lost: Option<WorkerId>, cause: String) -> Vec<Effect> {
        let member =
            lost.and_then(|worker| Some((self.place(number, worker)?, self.workers.get(&worker)?.clone())));
        let Some(Life { epoch, members, .. }) = self.lives.remove(&number) else { return Vec::new() };
        self.seats.retain(|_, group| *group != number);
        let ranks = members.len();
        let survivors = members.into_iter().filter(|&worker| Some(worker) != lost);
        let loss = Effect::Lost(Loss { group: number, epoch, ranks, member, cause });
        [loss].into_iter().chain(survivors.map(|worker| Effect::Abandon(worker, epoch))).collect()
    }

    fn place(&self, number: u32, worker: WorkerId) -> Option<Place> {
        let group = self.formation.groups.iter().find(|group| group.number == number)?;
        group.stages.iter().enumerate().find_map(|(stage, ranks)| {
            let rank = ranks.ranks.iter().position(|rank| rank.worker == worker)?;
            Some(Place { stage, rank })
        })
    }
}

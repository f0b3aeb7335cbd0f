//! The life of a group: who has joined, which epoch is loading or serving, and what to tell whom. Pure.
//!
//! Who holds what is `cluster::form`'s to say. Here a loss ends the epoch and begins the next at once, as `form` closes the ranks;
//! a wider formation, which somebody who joined makes possible, is the same but waits until it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use cluster::{
    Assignment, Candidate, Formation, GroupFormation, ModelReport, Policy, Resources, Shape, Shortage,
    WorkerId, form,
};
use engine::{Epoch, ShardError};

use crate::api::{ModelInfo, whereabouts};

#[cfg(test)]
mod tests;

/// Where the group stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Another coordinator leads; where its public service is, if it is known.
    Standby(Option<String>),
    /// No group can be formed.
    Waiting(Shortage),
    /// A group could be formed, but it is early, and more workers would make it wider.
    Gathering {
        /// Workers there are.
        joined: usize,
    },
    /// The workers load their shares and connect.
    Loading,
    /// Steps run.
    Serving(ModelInfo),
    /// A worker could not do its part, and there are too few without it.
    Failed(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Standby(leader) => write!(f, "standing by: {}", whereabouts(leader.as_deref())),
            State::Waiting(shortage) => shortage.fmt(f),
            State::Gathering { joined } => write!(f, "waiting for more workers: {joined} joined"),
            State::Loading => f.write_str("the workers are loading the model"),
            State::Serving(model) => write!(f, "serving {} on {} ranks", model.name, model.ranks),
            State::Failed(reason) => f.write_str(reason),
        }
    }
}

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

/// What is to be done after something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Give a worker its rank.
    Assign(WorkerId, Assignment),
    /// Take it back.
    Abandon(WorkerId, Epoch),
    /// End a worker's stream with this reason; it may join again.
    Dismiss(WorkerId, String),
    /// The epoch that loaded or served is over, for the sake of this worker.
    Lost(Loss),
    /// All ranks are there: run steps.
    Serve(Standing),
}

/// Why an epoch is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Loss {
    /// The epoch.
    pub(crate) epoch: Epoch,
    /// Ranks of its group.
    pub(crate) ranks: usize,
    /// Who was lost, and which rank that was; none: nobody, this is a planned change.
    pub(crate) member: Option<(usize, Candidate)>,
    /// In words.
    pub(crate) cause: String,
}

/// A group that can run steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) epoch: Epoch,
    pub(crate) report: ModelReport,
    /// Its ranks.
    pub(crate) ranks: usize,
    /// What every rank has.
    pub(crate) capacity: Capacity,
}

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

/// The workers of one coordinator and the group that they form.
#[derive(Debug)]
pub(crate) struct Group {
    policy: Policy,
    epoch: Epoch,
    next_worker: u64,
    workers: BTreeMap<WorkerId, Candidate>,
    /// What was served first: requests in flight go on with the same model or not at all.
    served: Option<ModelReport>,
    /// The last group there was, which `form` holds on to.
    formation: Formation,
    phase: Phase,
    /// Why the last formation did not come to serve.
    failure: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    /// Ranks report one after the other.
    Loading {
        ready: BTreeMap<WorkerId, Capacity>,
        attached: BTreeSet<WorkerId>,
    },
    Serving,
}

impl Group {
    /// A group of this shape; of the policy's replicas it is one. A later coordinator has a higher `term`.
    pub(crate) fn new(policy: Policy, term: u64) -> Self {
        Self {
            policy: Policy { replicas: 1, ..policy },
            epoch: Epoch { term, counter: 0 },
            next_worker: 1,
            workers: BTreeMap::new(),
            served: None,
            formation: Formation::default(),
            phase: Phase::Waiting,
            failure: None,
        }
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
        if let Some(group) = self.served.as_ref().or(self.workers.values().next().map(|w| &w.report)) {
            report.agree(group).map_err(|difference| format!("worker at {address} {difference}"))?;
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

    /// Forms a group if none stands and there are enough workers. The first one waits for the width that is wanted, unless
    /// nobody else is expected.
    pub(crate) fn muster(&mut self, all_there: bool) -> Vec<Effect> {
        if self.phase != Phase::Waiting {
            return Vec::new();
        }
        // What is missing, `state` tells.
        let formation = self.form();
        match formation.groups.first() {
            Some(group) if all_there || self.served.is_some() || self.is_full(group) => {
                self.assign(formation)
            }
            _ => Vec::new(),
        }
    }

    /// The ranks that the group would have if it were formed anew now, where they are more than it has.
    pub(crate) fn could_have(&self) -> Option<usize> {
        let group = self.formation().filter(|group| self.phase == Phase::Serving && !self.is_full(group))?;
        if group.workers().count() == self.workers.len() {
            return None;
        }
        let ranks = self.form().groups.first()?.workers().count();
        (ranks > self.members().count()).then_some(ranks)
    }

    /// Forms the group anew with all who are there, whether one serves or not.
    pub(crate) fn reform(&mut self, cause: String) -> Vec<Effect> {
        let mut effects = Vec::new();
        if self.phase != Phase::Waiting {
            effects.push(Effect::Lost(self.loss(None, cause)));
            effects.extend(self.members().map(|worker| Effect::Abandon(worker, self.epoch)));
            self.phase = Phase::Waiting;
        }
        effects.extend(self.muster(true));
        effects
    }

    /// A worker has loaded its share.
    pub(crate) fn ready(&mut self, worker: WorkerId, epoch: Epoch, capacity: Capacity) -> Vec<Effect> {
        if capacity.kv_blocks == 0 {
            return self.fail(worker, epoch, "has no room for KV blocks", None);
        }
        let ours = epoch == self.epoch && self.is_member(worker);
        match &mut self.phase {
            Phase::Loading { ready, .. } if ours => {
                ready.insert(worker, capacity);
                self.serve()
            }
            _ => Vec::new(),
        }
    }

    /// A worker opens its Steps stream; false if that is not its turn.
    pub(crate) fn attach(&mut self, worker: WorkerId, epoch: Epoch) -> bool {
        let ours = epoch == self.epoch && self.is_member(worker);
        match &mut self.phase {
            Phase::Loading { attached, .. } => ours && attached.insert(worker),
            _ => false,
        }
    }

    /// Once all ranks are ready and attached, steps can run.
    pub(crate) fn serve(&mut self) -> Vec<Effect> {
        let Some(group) = self.formation.groups.first() else { return Vec::new() };
        let ranks = group.workers().count();
        let capacity = match &self.phase {
            Phase::Loading { ready, attached } if ready.len() == ranks && attached.len() == ranks => {
                ready.values().copied().reduce(Capacity::common)
            }
            _ => return Vec::new(),
        };
        let Some(capacity) = capacity else { return Vec::new() };
        let report = group.report.clone();
        self.failure = None;
        self.served = Some(report.clone());
        self.phase = Phase::Serving;
        vec![Effect::Serve(Standing { epoch: self.epoch, report, ranks, capacity })]
    }

    /// A worker is gone.
    pub(crate) fn leave(&mut self, worker: WorkerId, cause: &str) -> Vec<Effect> {
        let effects = self.disband(worker, cause);
        self.workers.remove(&worker);
        self.then_muster(effects)
    }

    /// A worker did not do its part in `epoch`, for its own sake or because of the rank `at_member`. Whose fault it is counts no
    /// longer, until it joins again.
    pub(crate) fn fail(
        &mut self,
        worker: WorkerId,
        epoch: Epoch,
        reason: &str,
        at_member: Option<usize>,
    ) -> Vec<Effect> {
        if epoch != self.epoch || !self.is_member(worker) {
            return Vec::new();
        }
        let culprit = at_member.and_then(|rank| self.members().nth(rank)).unwrap_or(worker);
        let effects = self.disband(culprit, reason);
        let Some(candidate) = self.workers.remove(&culprit) else { return effects };
        // What happens before a group ever served is told to whoever waits for it.
        if self.served.is_none() {
            self.failure = Some(format!("worker at {}: {reason}", candidate.address));
        }
        let dismissed = [Effect::Dismiss(culprit, reason.to_owned())];
        self.then_muster(dismissed.into_iter().chain(effects).collect())
    }

    /// The epoch that serves, and the worker that samples for it.
    pub(crate) fn sampler(&self) -> Option<(Epoch, WorkerId)> {
        let last = self.formation.groups.first()?.stages.last()?;
        (self.phase == Phase::Serving).then_some((self.epoch, last.ranks.first()?.worker))
    }

    /// Where the group stands, if it does not serve.
    pub(crate) fn state(&self) -> Option<State> {
        match (&self.phase, &self.failure) {
            (Phase::Serving, _) => None,
            (Phase::Loading { .. }, _) => Some(State::Loading),
            (Phase::Waiting, Some(reason)) => Some(State::Failed(reason.clone())),
            (Phase::Waiting, None) => Some(match (self.form().shortage, self.policy.shape) {
                (Some(shortage), _) => State::Waiting(shortage),
                (None, Shape::Fixed { stages, ranks, .. }) => {
                    State::Waiting(Shortage::Workers { joined: self.workers.len(), wanted: stages * ranks })
                }
                (None, Shape::Auto { .. }) => State::Gathering { joined: self.workers.len() },
            }),
        }
    }

    /// The current epoch.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The group that loads or serves.
    pub(crate) fn formation(&self) -> Option<&GroupFormation> {
        self.formation.groups.first().filter(|_| self.phase != Phase::Waiting)
    }

    /// Everybody who has joined.
    pub(crate) fn workers(&self) -> impl Iterator<Item = &Candidate> {
        self.workers.values()
    }

    /// Its members by rank; none while no group loads or serves.
    pub(crate) fn members(&self) -> impl Iterator<Item = WorkerId> + '_ {
        self.formation().into_iter().flat_map(GroupFormation::workers)
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.members().any(|member| member == worker)
    }

    /// Whether a group is as wide as the policy asks for, or the model allows.
    fn is_full(&self, group: &GroupFormation) -> bool {
        let (_, width) = self.policy.shape.widths(group.report.units as usize);
        group.stages.iter().all(|stage| stage.ranks.len() >= width)
    }

    fn form(&self) -> Formation {
        form(self.workers.values(), &self.policy, &self.formation)
    }

    /// Begins the next epoch.
    fn assign(&mut self, formation: Formation) -> Vec<Effect> {
        self.epoch.counter += 1;
        self.formation = formation;
        self.phase = Phase::Loading { ready: BTreeMap::new(), attached: BTreeSet::new() };
        let Some(group) = self.formation.groups.first() else { return Vec::new() };
        let assign = |(worker, assignment)| Effect::Assign(worker, assignment);
        group.assignments(self.epoch).map(assign).collect()
    }

    /// Ends the epoch if `lost` takes part in it: whoever else does is told.
    fn disband(&mut self, lost: WorkerId, cause: &str) -> Vec<Effect> {
        if !self.is_member(lost) {
            return Vec::new();
        }
        let mut effects = vec![Effect::Lost(self.loss(Some(lost), cause.to_owned()))];
        let survivors = self.members().filter(|&worker| worker != lost);
        effects.extend(survivors.map(|worker| Effect::Abandon(worker, self.epoch)));
        self.phase = Phase::Waiting;
        effects
    }

    fn loss(&self, lost: Option<WorkerId>, cause: String) -> Loss {
        let place = |worker| self.members().position(|member| member == worker);
        let member = lost.and_then(|worker| Some((place(worker)?, self.workers.get(&worker)?.clone())));
        Loss { epoch: self.epoch, ranks: self.members().count(), member, cause }
    }

    fn then_muster(&mut self, mut effects: Vec<Effect>) -> Vec<Effect> {
        effects.extend(self.muster(false));
        effects
    }
}

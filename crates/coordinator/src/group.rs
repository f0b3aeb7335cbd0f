//! The life of a group: who has joined, which epoch is loading or serving, and what to tell whom. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use cluster::{Assignment, Candidate, Formation, ModelReport, WorkerId, form};
use engine::{Epoch, rank_ranges};

use crate::api::{ModelInfo, whereabouts};

/// Where the group stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Another coordinator leads; where its public service is, if it is known.
    Standby(Option<String>),
    /// Too few workers.
    Waiting {
        /// Workers there are.
        joined: usize,
        /// Workers it takes.
        wanted: usize,
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
            State::Waiting { joined, wanted } => {
                write!(f, "waiting for workers: {joined} of {wanted} joined")
            }
            State::Loading => f.write_str("the workers are loading the model"),
            State::Serving(model) => write!(f, "serving {} on {} ranks", model.name, model.ranks),
            State::Failed(reason) => f.write_str(reason),
        }
    }
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
    /// All ranks are there: run steps.
    Serve(Standing),
}

/// A group that can run steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Standing {
    pub(crate) epoch: Epoch,
    pub(crate) report: ModelReport,
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
    width: usize,
    epoch: Epoch,
    next_worker: u64,
    workers: BTreeMap<WorkerId, Candidate>,
    /// What was served first: requests in flight go on with the same model or not at all.
    served: Option<ModelReport>,
    phase: Phase,
    /// Why the last formation did not come to serve.
    failure: Option<String>,
}

#[derive(Debug)]
enum Phase {
    Waiting,
    Loading(Muster),
    Serving(Muster),
}

/// A formation whose ranks report one after the other.
#[derive(Debug)]
struct Muster {
    formation: Formation,
    ready: BTreeMap<WorkerId, Capacity>,
    attached: BTreeSet<WorkerId>,
}

impl Group {
    /// A group of `width` ranks. A later coordinator has a higher `term`.
    pub(crate) fn new(width: usize, term: u64) -> Self {
        Self {
            width,
            epoch: Epoch { term, counter: 0 },
            next_worker: 1,
            workers: BTreeMap::new(),
            served: None,
            phase: Phase::Waiting,
            failure: None,
        }
    }

    /// A worker wants to take part: its number, or why it cannot.
    pub(crate) fn join(&mut self, address: String, report: ModelReport) -> Result<WorkerId, String> {
        let units = report.units as usize;
        if let Err(error) = rank_ranges(units, self.width) {
            self.failure = Some(error.to_string());
            return Err(error.to_string());
        }
        if let Some(group) = self.served.as_ref().or(self.workers.values().next().map(|w| &w.report)) {
            report.agree(group).map_err(|difference| format!("worker at {address} {difference}"))?;
        }
        let id = WorkerId(self.next_worker);
        self.next_worker += 1;
        self.workers.insert(id, Candidate { id, address, report });
        Ok(id)
    }

    /// The worker that listens at `address`.
    pub(crate) fn at(&self, address: &str) -> Option<WorkerId> {
        self.workers.values().find(|worker| worker.address == address).map(|worker| worker.id)
    }

    /// Forms a group if none stands and there are enough workers.
    pub(crate) fn muster(&mut self) -> Vec<Effect> {
        let Phase::Waiting = self.phase else { return Vec::new() };
        // What is missing, `state` tells; `join` lets nobody in that could not be used.
        let Ok(formation) = form(self.workers.values(), self.width) else { return Vec::new() };
        self.epoch.counter += 1;
        let assign = |(rank, worker): (usize, &WorkerId)| {
            let assignment = Assignment {
                epoch: self.epoch,
                group: formation.report.name.clone(),
                rank,
                members: formation.members.clone(),
            };
            Effect::Assign(*worker, assignment)
        };
        let effects = formation.workers.iter().enumerate().map(assign).collect();
        self.phase = Phase::Loading(Muster { formation, ready: BTreeMap::new(), attached: BTreeSet::new() });
        effects
    }

    /// A worker has loaded its share.
    pub(crate) fn ready(&mut self, worker: WorkerId, epoch: Epoch, capacity: Capacity) -> Vec<Effect> {
        if capacity.kv_blocks == 0 {
            return self.fail(worker, epoch, "has no room for KV blocks");
        }
        match &mut self.phase {
            Phase::Loading(muster) if epoch == self.epoch && muster.formation.workers.contains(&worker) => {
                muster.ready.insert(worker, capacity);
                self.serve()
            }
            _ => Vec::new(),
        }
    }

    /// A worker opens its Steps stream; false if that is not its turn.
    pub(crate) fn attach(&mut self, worker: WorkerId, epoch: Epoch) -> bool {
        match &mut self.phase {
            Phase::Loading(muster) => {
                epoch == self.epoch
                    && muster.formation.workers.contains(&worker)
                    && muster.attached.insert(worker)
            }
            _ => false,
        }
    }

    /// Once all ranks are ready and attached, steps can run.
    pub(crate) fn serve(&mut self) -> Vec<Effect> {
        let (muster, capacity) = match std::mem::replace(&mut self.phase, Phase::Waiting) {
            Phase::Loading(m)
                if m.ready.len() == self.width
                    && m.attached.len() == self.width
                    && let Some(capacity) = m.ready.values().copied().reduce(Capacity::common) =>
            {
                (m, capacity)
            }
            phase => {
                self.phase = phase;
                return Vec::new();
            }
        };
        let report = muster.formation.report.clone();
        self.failure = None;
        self.served = Some(report.clone());
        self.phase = Phase::Serving(muster);
        vec![Effect::Serve(Standing { epoch: self.epoch, report, capacity })]
    }

    /// A worker is gone.
    pub(crate) fn leave(&mut self, worker: WorkerId) -> Vec<Effect> {
        self.workers.remove(&worker);
        let effects = self.disband(worker);
        self.then_muster(effects)
    }

    /// A worker did not do its part in `epoch`: it counts no longer, until it joins again.
    pub(crate) fn fail(&mut self, worker: WorkerId, epoch: Epoch, reason: &str) -> Vec<Effect> {
        if epoch != self.epoch || !self.is_member(worker) {
            return Vec::new();
        }
        let Some(candidate) = self.workers.remove(&worker) else { return Vec::new() };
        if let Phase::Loading(_) = self.phase {
            self.failure = Some(format!("worker at {}: {reason}", candidate.address));
        }
        let mut effects = vec![Effect::Dismiss(worker, reason.to_owned())];
        effects.extend(self.disband(worker));
        self.then_muster(effects)
    }

    /// The epoch that serves, and the worker that samples for it.
    pub(crate) fn sampler(&self) -> Option<(Epoch, WorkerId)> {
        match &self.phase {
            Phase::Serving(muster) => Some((self.epoch, *muster.formation.workers.first()?)),
            _ => None,
        }
    }

    /// Where the group stands, if it does not serve.
    pub(crate) fn state(&self) -> Option<State> {
        match (&self.phase, &self.failure) {
            (Phase::Serving(_), _) => None,
            (Phase::Loading(_), _) => Some(State::Loading),
            (Phase::Waiting, Some(reason)) => Some(State::Failed(reason.clone())),
            (Phase::Waiting, None) => Some(State::Waiting { joined: self.workers.len(), wanted: self.width }),
        }
    }

    fn members(&self) -> &[WorkerId] {
        match &self.phase {
            Phase::Loading(muster) | Phase::Serving(muster) => &muster.formation.workers,
            Phase::Waiting => &[],
        }
    }

    fn is_member(&self, worker: WorkerId) -> bool {
        self.members().contains(&worker)
    }

    /// Ends the epoch if `lost` took part in it: whoever else did is told.
    fn disband(&mut self, lost: WorkerId) -> Vec<Effect> {
        if !self.is_member(lost) {
            return Vec::new();
        }
        let survivors = self.members().iter().filter(|&&worker| worker != lost);
        let effects = survivors.map(|&worker| Effect::Abandon(worker, self.epoch)).collect();
        self.phase = Phase::Waiting;
        effects
    }

    fn then_muster(&mut self, mut effects: Vec<Effect>) -> Vec<Effect> {
        effects.extend(self.muster());
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> ModelReport {
        ModelReport {
            name: "yi".into(),
            vocabulary: 100,
            max_context: 64,
            units: 4,
            block_size: 16,
            eos: vec![2],
            fingerprint: "a".into(),
        }
    }

    fn group_of_two() -> (Group, WorkerId, WorkerId) {
        let mut group = Group::new(2, 9);
        let first = group.join("host1:1".into(), report()).unwrap();
        assert_eq!(group.muster(), []);
        assert_eq!(group.state().unwrap().to_string(), "waiting for workers: 1 of 2 joined");
        let second = group.join("host2:1".into(), report()).unwrap();
        (group, first, second)
    }

    fn epoch(counter: u64) -> Epoch {
        Epoch { term: 9, counter }
    }

    fn capacity(kv_blocks: u32, steps_in_flight: u32) -> Capacity {
        Capacity { kv_blocks, steps_in_flight, step_rows: None, sampled_rows: Some(10 * kv_blocks) }
    }

    fn serving() -> (Group, WorkerId, WorkerId) {
        let (mut group, first, second) = group_of_two();
        assert_eq!(group.muster().len(), 2);
        assert_eq!(group.state(), Some(State::Loading));
        assert!(group.attach(first, epoch(1)) && group.attach(second, epoch(1)));
        assert_eq!(group.ready(first, epoch(1), capacity(10, 1)), []);
        let effects = group.ready(second, epoch(1), capacity(7, 2));
        let standing = Standing { epoch: epoch(1), report: report(), capacity: capacity(7, 1) };
        assert_eq!(effects, [Effect::Serve(standing)]);
        assert_eq!(group.sampler(), Some((epoch(1), first)));
        (group, first, second)
    }

    #[test]
    fn a_lost_member_ends_the_epoch_and_a_new_one_begins_the_next() {
        let (mut group, first, second) = serving();
        assert_eq!(group.leave(second), [Effect::Abandon(first, epoch(1))]);
        assert_eq!(group.state(), Some(State::Waiting { joined: 1, wanted: 2 }));
        let third = group.join("host2:1".into(), report()).unwrap();
        assert_ne!(third, second);
        let effects = group.muster();
        assert!(matches!(&effects[0], Effect::Assign(worker, a) if *worker == first && a.epoch == epoch(2)));
        assert!(matches!(&effects[1], Effect::Assign(worker, a) if *worker == third && a.rank == 1));
        // What comes late from the epoch before changes nothing.
        assert_eq!(group.ready(first, epoch(1), capacity(10, 1)), []);
        assert_eq!(group.fail(first, epoch(1), "late"), []);
        assert!(!group.attach(first, epoch(1)));
        assert_eq!(group.state(), Some(State::Loading));
    }

    #[test]
    fn a_spare_takes_over_at_once() {
        let (mut group, first, second) = serving();
        let spare = group.join("host3:1".into(), report()).unwrap();
        assert_eq!(group.muster(), []);
        let effects = group.fail(first, epoch(1), "lost rank 1");
        assert_eq!(effects[0], Effect::Dismiss(first, "lost rank 1".into()));
        assert_eq!(effects[1], Effect::Abandon(second, epoch(1)));
        assert!(matches!(&effects[2], Effect::Assign(worker, a) if *worker == second && a.rank == 0));
        assert!(matches!(&effects[3], Effect::Assign(worker, _) if *worker == spare));
    }

    #[test]
    fn a_worker_whose_load_failed_does_not_count_until_it_joins_again() {
        let (mut group, first, second) = group_of_two();
        group.muster();
        let effects = group.fail(second, epoch(1), "no memory");
        assert_eq!(effects, [Effect::Dismiss(second, "no memory".into()), Effect::Abandon(first, epoch(1))]);
        assert_eq!(group.state(), Some(State::Failed("worker at host2:1: no memory".into())));
        assert_eq!(group.leave(second), []);
        group.join("host2:1".into(), report()).unwrap();
        assert_eq!(group.muster().len(), 2);
        assert_eq!(group.state(), Some(State::Loading));
    }

    #[test]
    fn only_the_same_model_joins() {
        let (mut group, first, second) = serving();
        let other = ModelReport { fingerprint: "b".into(), ..report() };
        let refusal = "worker at host3:1 serves fingerprint b, the group a";
        assert_eq!(group.join("host3:1".into(), other.clone()), Err(refusal.into()));
        // Requests may be in flight when nobody is there.
        group.leave(first);
        group.leave(second);
        assert_eq!(group.join("host3:1".into(), other), Err(refusal.into()));
    }

    #[test]
    fn a_width_that_the_model_does_not_have_is_refused() {
        let mut group = Group::new(5, 1);
        let refusal = group.join("host1:1".into(), report()).unwrap_err();
        assert!(refusal.starts_with("5 workers asked for"), "{refusal}");
        assert_eq!(group.state(), Some(State::Failed(refusal)));
    }
}

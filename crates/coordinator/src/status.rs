//! How things stand, as the public service tells it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant, UNIX_EPOCH};

use cluster::proto::{ClusterStatus, GroupStatus, Incident, Loss, RankStatus, WorkerStatus};
use cluster::{Activity, Candidate, GroupFormation, Progress, Rank, Stage};
use engine::Epoch;

use crate::groups::{self, Groups};
use crate::heartbeats::Heartbeats;
use crate::incidents::{self, Incidents};
use crate::replica::Replica;
use crate::state::State;

/// Rates are over so many seconds.
const WINDOW: u64 = 10;

/// Everything that a status tells of.
pub(crate) struct View<'a> {
    pub(crate) state: &'a State,
    pub(crate) groups: &'a Groups,
    pub(crate) heartbeats: &'a Heartbeats,
    pub(crate) incidents: &'a Incidents,
    pub(crate) replicas: &'a BTreeMap<u32, Replica>,
    pub(crate) complaints: &'a [String],
    pub(crate) now: Instant,
}

impl View<'_> {
    /// The status.
    pub(crate) fn status(&self) -> ClusterStatus {
        let spare = |worker: &&Candidate| self.groups.seat(worker.id).is_none();
        let loads = || self.replicas.values().map(Replica::load);
        ClusterStatus {
            serving: matches!(self.state, State::Serving(_)),
            state: self.state.to_string(),
            policy: self.groups.policy().to_string(),
            groups: self.groups.standing().map(|(group, epoch)| self.group(group, epoch)).collect(),
            spares: self.groups.workers().filter(spare).map(|worker| self.worker(worker, None)).collect(),
            running: loads().map(|load| load.running as u32).sum(),
            waiting: loads().map(|load| load.waiting as u32).sum(),
            incidents: self.incidents.iter().map(incident).collect(),
            complaints: self.complaints.to_vec(),
        }
    }

    fn group(&self, group: &GroupFormation, epoch: Epoch) -> GroupStatus {
        let ranks = |(number, stage): (usize, &Stage)| -> Vec<RankStatus> {
            let one = |(rank, place): (usize, &Rank)| RankStatus {
                stage: number as u32,
                rank: rank as u32,
                first_layer: stage.layers.start as u32,
                end_layer: stage.layers.end as u32,
                first_unit: place.member.units.start as u32,
                end_unit: place.member.units.end as u32,
                worker: self.groups.worker(place.worker).map(|worker| self.worker(worker, Some(group))),
            };
            stage.ranks.iter().enumerate().map(one).collect()
        };
        let replica = self.replicas.get(&group.number);
        // Before the group serves, what was held went with the group before.
        let load = replica.filter(|_| self.groups.is_serving(group.number)).map(Replica::load);
        let (tokens_per_second, rows_per_second) =
            replica.map_or((0.0, 0.0), |replica| replica.rates.per_second(self.now));
        GroupStatus {
            number: group.number,
            model: group.report.name.clone(),
            fingerprint: group.report.fingerprint.clone(),
            term: epoch.term,
            counter: epoch.counter,
            ranks: group.stages.iter().enumerate().flat_map(ranks).collect(),
            kv_blocks_used: load
                .map_or(0, |load| (load.blocks - load.free_blocks - load.cached_blocks) as u32),
            kv_blocks: load.map_or(0, |load| load.blocks as u32),
            kv_block_tokens: group.report.block_size,
            tokens_per_second,
            rows_per_second,
        }
    }

    /// A worker; `group`: the one in which it has a part.
    fn worker(&self, worker: &Candidate, group: Option<&GroupFormation>) -> WorkerStatus {
        let heard = self.heartbeats.last(worker.id);
        let age = heard.map_or(Duration::ZERO, |seen| self.now.saturating_duration_since(seen.heard));
        WorkerStatus {
            worker: worker.id.0,
            address: worker.address.clone(),
            host: worker.host.clone(),
            zone: worker.resources.zone.clone(),
            device: worker.resources.device.clone(),
            memory: worker.resources.memory,
            activity: heard.map_or_else(String::new, |seen| activity(&seen.progress, group)),
            heartbeat_millis: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
            drained: self.groups.is_drained(worker),
            held_bytes: heard.map_or(0, |seen| seen.progress.held),
        }
    }
}

fn activity(progress: &Progress, group: Option<&GroupFormation>) -> String {
    let rank = |number: usize| match group.and_then(|group| group.place(number)) {
        Some((stage, rank)) if group.is_some_and(|group| group.stages.len() > 1) => {
            format!("rank {rank} of stage {stage}")
        }
        _ => format!("rank {number}"),
    };
    let what = match (progress.activity, progress.waits_for) {
        (Activity::Idle, _) => return "idle".into(),
        (Activity::Loading, None) => return "loading".into(),
        (Activity::Loading, Some(number)) => return format!("waiting for {} to connect", rank(number)),
        (Activity::Computing, None) => "computing".into(),
        (Activity::Computing, Some(number)) => format!("waiting for {} in", rank(number)),
    };
    progress.step.map_or(what.clone(), |step| format!("{what} step {step}"))
}

fn incident(incident: &incidents::Incident) -> Incident {
    let loss = |(loss, _): &(groups::Loss, Duration)| Loss {
        cause: loss.cause.clone(),
        worker: loss.member.as_ref().map(|(_, worker)| worker.id.0),
        stage: loss.member.as_ref().map(|(place, _)| place.stage as u32),
        rank: loss.member.as_ref().map(|(place, _)| place.rank as u32),
        address: loss.member.as_ref().map_or_else(String::new, |(_, worker)| worker.address.clone()),
    };
    let first = incident.losses.first().map(|(loss, _)| loss);
    Incident {
        at_millis: incident.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
        losses: incident.losses.iter().map(loss).collect(),
        ranks_before: first.map_or(0, |loss| loss.ranks as u32),
        ranks_after: incident.ranks as u32,
        counter_before: first.map_or(0, |loss| loss.epoch.counter),
        counter_after: incident.epoch.map_or(0, |epoch| epoch.counter),
        detect_micros: micros(incident.detect()),
        form_micros: incident.form.map(micros),
        load_micros: incident.load.map(micros),
        recompute_micros: incident.recompute.map(micros),
        group: first.map_or(0, |loss| loss.group),
        loaded_bytes: incident.bytes,
        moved_requests: u32::try_from(incident.moved).unwrap_or(u32::MAX),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// How many tokens are generated and rows computed in a second.
#[derive(Debug)]
pub(crate) struct Rates {
    start: Instant,
    /// Seconds since the start with what was done in them; the last ones.
    seconds: VecDeque<(u64, u64, u64)>,
}

impl Rates {
    /// Nothing was done yet.
    pub(crate) fn new(start: Instant) -> Self {
        Self { start, seconds: VecDeque::new() }
    }

    /// A step was applied.
    pub(crate) fn count(&mut self, tokens: usize, rows: usize, now: Instant) {
        let second = now.saturating_duration_since(self.start).as_secs();
        match self.seconds.back_mut() {
            Some((last, t, r)) if *last == second => {
                *t += tokens as u64;
                *r += rows as u64;
            }
            _ => self.seconds.push_back((second, tokens as u64, rows as u64)),
        }
        while self.seconds.front().is_some_and(|(first, ..)| first + WINDOW < second) {
            self.seconds.pop_front();
        }
    }

    /// Tokens and rows per second, over the last whole seconds.
    pub(crate) fn per_second(&self, now: Instant) -> (f64, f64) {
        let second = now.saturating_duration_since(self.start).as_secs();
        let window = WINDOW.min(second);
        if window == 0 {
            return (0.0, 0.0);
        }
        let recent = self.seconds.iter().filter(|(at, ..)| (second - window..second).contains(at));
        let (tokens, rows) = recent.fold((0, 0), |(t, r), (_, tokens, rows)| (t + tokens, r + rows));
        (tokens as f64 / window as f64, rows as f64 / window as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::StepId;

    #[test]
    fn rates_are_of_the_last_whole_seconds() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut rates = Rates::new(start);
        assert_eq!(rates.per_second(at(10)), (0.0, 0.0));
        rates.count(2, 3, at(100));
        rates.count(2, 3, at(900));
        rates.count(50, 50, at(1100));
        assert_eq!(rates.per_second(at(1200)), (4.0, 6.0));
        assert_eq!(rates.per_second(at(2000)), (27.0, 28.0));
        assert_eq!(rates.per_second(at(11_500)), (5.0, 5.0));
        assert_eq!(rates.per_second(at(60_000)), (0.0, 0.0));
        (0..100).for_each(|second| rates.count(1, 1, at(second * 1000)));
        assert!(rates.seconds.len() <= WINDOW as usize + 1);
    }

    #[test]
    fn what_a_worker_does_is_said_in_words() {
        let progress = Progress { step: Some(StepId(12)), ..Progress::default() };
        assert_eq!(activity(&progress, None), "idle");
        let computing = Progress { activity: Activity::Computing, ..progress };
        assert_eq!(activity(&computing, None), "computing step 12");
        assert_eq!(
            activity(&Progress { waits_for: Some(1), ..computing }, None),
            "waiting for rank 1 in step 12"
        );
        let loading = Progress { activity: Activity::Loading, waits_for: Some(0), ..progress };
        assert_eq!(activity(&loading, None), "waiting for rank 0 to connect");
    }
}

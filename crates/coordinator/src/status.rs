//! How things stand, as the public service tells it.

use std::collections::VecDeque;
use std::time::{Duration, Instant, UNIX_EPOCH};

use cluster::proto::{ClusterStatus, GroupStatus, Incident, Loss, RankStatus, WorkerStatus};
use cluster::{Activity, Candidate, GroupFormation, Progress, Rank, Stage};
use engine::{Load, Scheduler};

use crate::detector::Detector;
use crate::group::{Group, State};
use crate::incidents::{self, Incidents};

/// Rates are over so many seconds.
const WINDOW: u64 = 10;

/// Everything that a status tells of.
pub(crate) struct View<'a> {
    pub(crate) state: &'a State,
    pub(crate) group: &'a Group,
    pub(crate) detector: &'a Detector,
    pub(crate) incidents: &'a Incidents,
    pub(crate) scheduler: Option<&'a Scheduler>,
    pub(crate) rates: &'a Rates,
    pub(crate) now: Instant,
}

impl View<'_> {
    /// The status.
    pub(crate) fn status(&self) -> ClusterStatus {
        let load = self.scheduler.map(Scheduler::load);
        let spare = |worker: &&Candidate| !self.group.members().any(|member| member == worker.id);
        ClusterStatus {
            serving: matches!(self.state, State::Serving(_)),
            state: self.state.to_string(),
            groups: self.group.formation().map(|group| self.group(group, load)).into_iter().collect(),
            spares: self.group.workers().filter(spare).map(|worker| self.worker(worker)).collect(),
            running: load.map_or(0, |load| load.running as u32),
            waiting: load.map_or(0, |load| load.waiting as u32),
            incidents: self.incidents.iter().map(incident).collect(),
        }
    }

    fn group(&self, group: &GroupFormation, load: Option<Load>) -> GroupStatus {
        let epoch = self.group.epoch();
        let ranks = |(number, stage): (usize, &Stage)| -> Vec<RankStatus> {
            let one = |(rank, place): (usize, &Rank)| RankStatus {
                stage: number as u32,
                rank: rank as u32,
                first_layer: stage.layers.start as u32,
                end_layer: stage.layers.end as u32,
                first_unit: place.member.units.start as u32,
                end_unit: place.member.units.end as u32,
                worker: self.group.workers().find(|w| w.id == place.worker).map(|worker| self.worker(worker)),
            };
            stage.ranks.iter().enumerate().map(one).collect()
        };
        // Before the group serves, what was held went with the group before.
        let load = load.filter(|_| matches!(self.state, State::Serving(_)));
        let (tokens_per_second, rows_per_second) = self.rates.per_second(self.now);
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

    fn worker(&self, worker: &Candidate) -> WorkerStatus {
        let heard = self.detector.last_heard(worker.id);
        let age = heard.map_or(Duration::ZERO, |(at, _)| self.now.saturating_duration_since(at));
        WorkerStatus {
            worker: worker.id.0,
            address: worker.address.clone(),
            host: worker.host.clone(),
            zone: worker.resources.zone.clone(),
            device: worker.resources.device.clone(),
            memory: worker.resources.memory,
            activity: heard.map_or_else(String::new, |(_, progress)| activity(&progress)),
            heartbeat_millis: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
        }
    }
}

fn activity(progress: &Progress) -> String {
    let what = match (progress.activity, progress.waits_for) {
        (Activity::Idle, _) => return "idle".into(),
        (Activity::Loading, None) => return "loading".into(),
        (Activity::Loading, Some(rank)) => return format!("waiting for rank {rank} to connect"),
        (Activity::Computing, None) => "computing".into(),
        (Activity::Computing, Some(rank)) => format!("waiting for rank {rank} in"),
    };
    progress.step.map_or(what.clone(), |step| format!("{what} step {step}"))
}

fn incident(incident: &incidents::Incident) -> Incident {
    let loss = |(loss, _): &(crate::group::Loss, Duration)| Loss {
        cause: loss.cause.clone(),
        worker: loss.member.as_ref().map(|(_, worker)| worker.id.0),
        rank: loss.member.as_ref().map(|(rank, _)| *rank as u32),
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
        assert_eq!(activity(&progress), "idle");
        let computing = Progress { activity: Activity::Computing, ..progress };
        assert_eq!(activity(&computing), "computing step 12");
        assert_eq!(activity(&Progress { waits_for: Some(1), ..computing }), "waiting for rank 1 in step 12");
        let loading = Progress { activity: Activity::Loading, waits_for: Some(0), ..progress };
        assert_eq!(activity(&loading), "waiting for rank 0 to connect");
    }
}

//! What the leader does without being told: gives up ranks that hang, stops waiting for more workers, takes in those that came.

use std::time::{Duration, Instant};

use cluster::WorkerId;
use engine::{Event, Scheduler, StepId};
use tracing::info;

use super::Leader;
use crate::clock;
use crate::incidents::Incident;

/// Several workers that join one after the other are taken in at once.
const SETTLE: Duration = Duration::from_millis(500);
/// While requests run, the group serves for so many times what its last formation took before it is formed anew for the sake of
/// another rank: planned changes take a tenth of the time at most.
const WORTH: u32 = 10;

/// When things last changed, and how long forming a group takes.
#[derive(Debug)]
pub(super) struct Pace {
    joined: Instant,
    /// When the last epoch was over, or the coordinator started.
    lost: Instant,
    /// Since when the group serves, and how long it took to form it.
    serves: Option<(Instant, Duration)>,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { joined: now, lost: now, serves: None }
    }

    /// A worker joined.
    pub(super) fn joined(&mut self, now: Instant) {
        self.joined = now;
    }

    /// An epoch is over.
    pub(super) fn lost(&mut self, now: Instant) {
        (self.lost, self.serves) = (now, None);
    }

    /// The next one serves. Before the first, the last worker was waited for.
    pub(super) fn serves(&mut self, now: Instant) {
        let took = now.saturating_duration_since(self.lost.max(self.joined));
        self.serves = Some((now, took));
    }

    /// Whether nobody has joined for so long.
    fn settled(&self, time: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.joined) >= time
    }

    /// Whether what a formation costs the requests is little beside how long they have been served.
    fn worth_a_change(&self, now: Instant) -> bool {
        self.serves.is_some_and(|(since, took)| now.saturating_duration_since(since) >= took * WORTH)
    }
}

impl Leader {
    /// Looks after the group, once in a heartbeat's interval.
    pub(super) fn tend(&mut self, now: Instant) {
        let ranks: Vec<WorkerId> = self.group.members().collect();
        let epoch = self.group.epoch();
        if let Some(hang) = self.detector.hang(epoch, &ranks, now) {
            return self.fail(ranks[hang.rank], epoch, &hang.reason, None);
        }
        if self.pace.settled(self.config.gather, now) {
            let effects = self.group.muster(true);
            self.perform(effects);
        }
        let good_time = self.requests() == 0 || self.pace.worth_a_change(now);
        if good_time
            && self.pace.settled(SETTLE, now)
            && let Some(wider) = self.group.could_have()
        {
            let effects = self.group.reform(format!("wider: from {} to {wider} ranks", ranks.len()));
            self.perform(effects);
        }
    }

    /// Requests that run or wait.
    pub(super) fn requests(&self) -> usize {
        self.scheduler.as_ref().map(Scheduler::load).map_or(0, |load| load.running + load.waiting)
    }

    /// Takes note of a step that was applied.
    pub(super) fn applied(&mut self, step: StepId, events: &[Event]) {
        let now = clock::now();
        let tokens = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        if let Some((rows, _)) = self.detector.applied(step, now) {
            self.rates.count(tokens, rows, now);
        }
        if tokens > 0 {
            report(self.incidents.token(now));
        }
    }
}

/// Logs an incident that is over.
pub(super) fn report(incident: Option<&Incident>) {
    let Some(Incident { losses, epoch, ranks, form, load, recompute, .. }) = incident else { return };
    let detect = incident.map(Incident::detect);
    let causes: Vec<_> = losses.iter().map(|(loss, _)| loss.cause.as_str()).collect();
    let members: Vec<_> = losses.iter().filter_map(|(loss, _)| loss.member.as_ref()).collect();
    let lost: Vec<_> =
        members.iter().map(|(rank, worker)| format!("rank {rank} (worker {})", worker.id)).collect();
    let before = losses.first().map(|(loss, _)| loss.ranks);
    info!(
        ?causes,
        ?lost,
        ?before,
        ranks,
        ?epoch,
        ?detect,
        ?form,
        ?load,
        ?recompute,
        "the group stands again"
    );
}

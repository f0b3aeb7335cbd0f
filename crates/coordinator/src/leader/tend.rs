//! What the leader does without being told: gives up ranks that hang, stops waiting for more workers, takes in those that came.

use std::time::{Duration, Instant};

use engine::{Epoch, Event, StepId};
use tracing::info;

use super::Leader;
use crate::clock;
use crate::detector::hangs_in_loading;
use crate::incidents::Incident;
use crate::replica::Replica;

/// Several workers that join one after the other are taken in at once.
const SETTLE: Duration = Duration::from_millis(500);

impl Leader {
    /// Looks after the groups, once in a heartbeat's interval.
    pub(super) fn tend(&mut self, now: Instant) {
        let standing: Vec<_> = self.groups.standing().map(|(group, epoch)| (group.number, epoch)).collect();
        for (number, epoch) in standing {
            self.give_up_a_hang(number, epoch, now);
        }
        let settled = |time| now.saturating_duration_since(self.joined) >= time;
        if settled(self.config.gather) {
            let effects = self.groups.muster(true);
            self.perform(effects);
        }
        if now.saturating_duration_since(self.joined) >= SETTLE {
            for (number, ranks) in self.groups.could_be_wider() {
                let good_time = self.replicas.get(&number).is_none_or(|replica| replica.worth_a_change(now));
                if good_time {
                    let before = self.groups.members(number).len();
                    let effects =
                        self.groups.reform(number, format!("wider: from {before} to {ranks} ranks"));
                    self.perform(effects);
                }
            }
        }
    }

    /// Dismisses the member that keeps a group from getting on.
    fn give_up_a_hang(&mut self, number: u32, epoch: Epoch, now: Instant) {
        let (members, heartbeats) = (self.groups.members(number), &self.heartbeats);
        let sampler = self.groups.sampler(number).map(|(_, sampler)| sampler);
        let sampler = members.iter().position(|member| Some(*member) == sampler);
        let replica = self.replicas.get(&number).zip(sampler);
        let in_step =
            || replica.and_then(|(r, sampler)| r.detector.hang(heartbeats, epoch, members, sampler, now));
        let in_loading = || hangs_in_loading(heartbeats, members, self.config.progress_timeout);
        let hang = heartbeats.lingers(epoch, members, now).or_else(in_step).or_else(in_loading);
        if let Some(hang) = hang {
            self.fail(members[hang.rank], epoch, &hang.reason, None);
        }
    }

    /// Takes note of a step that was applied.
    pub(super) fn applied(&mut self, group: u32, step: StepId, events: &[Event]) {
        let now = clock::now();
        let tokens = events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
        if let Some(Replica { detector, rates, .. }) = self.replicas.get_mut(&group)
            && let Some((rows, _)) = detector.applied(step, now)
        {
            rates.count(tokens, rows, now);
        }
        if tokens > 0 {
            report(self.incidents.token(group, now));
        }
    }
}

/// Logs an incident that is over.
pub(super) fn report(incident: Option<&Incident>) {
    let Some(Incident { losses, epoch, ranks, form, load, recompute, moved, .. }) = incident else { return };
    let detect = incident.map(Incident::detect);
    let causes: Vec<_> = losses.iter().map(|(loss, _)| loss.cause.as_str()).collect();
    let members: Vec<_> = losses.iter().filter_map(|(loss, _)| loss.member.as_ref()).collect();
    let lost: Vec<_> =
        members.iter().map(|(place, worker)| format!("{place} (worker {})", worker.id)).collect();
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
        moved,
        "the group stands again"
    );
}

//! What workers told of themselves, and when. Pure.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cluster::{Activity, Progress, WorkerId};
use engine::Epoch;

use crate::detector::Hang;

/// The last heartbeat of every worker.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats(BTreeMap<WorkerId, Seen>);

/// A worker's last heartbeat.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// What it said.
    pub(crate) progress: Progress,
    /// When that was new.
    pub(crate) changed: Instant,
    /// When it was said last.
    pub(crate) heard: Instant,
    /// When it was told to leave its group, and how long what it was in may still have taken.
    leaves: Option<(Instant, Duration)>,
}

impl Heartbeats {
    /// A heartbeat came.
    pub(crate) fn heard(&mut self, worker: WorkerId, progress: Progress, now: Instant) {
        let seen = self.0.entry(worker).or_insert(Seen { progress, changed: now, heard: now, leaves: None });
        if seen.progress != progress {
            seen.changed = now;
        }
        (seen.progress, seen.heard) = (progress, now);
    }

    /// The last one of a worker.
    pub(crate) fn last(&self, worker: WorkerId) -> Option<Seen> {
        self.0.get(&worker).copied()
    }

    /// A worker is told to leave its group; what it is in may still take so long.
    pub(crate) fn leaves(&mut self, worker: WorkerId, now: Instant, may_take: Duration) {
        if let Some(seen) = self.0.get_mut(&worker) {
            seen.leaves = Some((now, may_take));
        }
    }

    /// The member that keeps a group of `members` from forming, for it hangs in a step of an epoch that is over: it was told so, but what
    /// it holds is free only when that step has ended.
    pub(crate) fn lingers(&self, epoch: Epoch, members: &[WorkerId], now: Instant) -> Option<Hang> {
        let lingers = |(rank, worker): (usize, &WorkerId)| {
            let Seen { progress, changed, leaves, .. } = self.0.get(worker)?;
            let past = progress.epoch.filter(|past| *past != epoch)?;
            let (told, may_take) = (*leaves)?;
            let time = now.saturating_duration_since(told.max(*changed));
            let hangs = progress.activity == Activity::Computing && time >= may_take;
            let reason =
                || format!("does not leave epoch {past}, which is over, for {:.1} s", time.as_secs_f64());
            hangs.then(|| Hang { rank, reason: reason() })
        };
        members.iter().enumerate().find_map(lingers)
    }

    /// A worker is gone.
    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.0.remove(&worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::StepId;

    const SECOND: Duration = Duration::from_secs(1);
    const MEMBERS: [WorkerId; 3] = [WorkerId(7), WorkerId(8), WorkerId(9)];

    #[test]
    fn whoever_does_not_leave_an_epoch_that_is_over_is_named() {
        let (mut heartbeats, begun) = (Heartbeats::default(), Instant::now());
        let past = Epoch { term: 1, counter: 4 };
        let next = Epoch { counter: 5, ..past };
        let in_step = Progress {
            epoch: Some(past),
            step: Some(StepId(1)),
            activity: Activity::Computing,
            ..Progress::default()
        };
        // One has heard of the next epoch, one hangs in a step of the last, one loads for that, and is not cut short.
        let next_one = Progress { epoch: Some(next), activity: Activity::Loading, ..Progress::default() };
        let loads = Progress { activity: Activity::Loading, ..in_step };
        for (worker, progress) in MEMBERS.into_iter().zip([next_one, in_step, loads]) {
            heartbeats.heard(worker, progress, begun);
            assert!(heartbeats.lingers(next, &MEMBERS, begun + 100 * SECOND).is_none(), "nobody was told");
        }
        MEMBERS.into_iter().for_each(|worker| heartbeats.leaves(worker, begun + SECOND, 5 * SECOND));
        let hang = |seconds: u32| {
            let hang = heartbeats.lingers(next, &MEMBERS, begun + seconds * SECOND);
            hang.map(|hang| (hang.rank, hang.reason))
        };
        assert_eq!(hang(5), None);
        assert_eq!(hang(6), Some((1, "does not leave epoch 1.4, which is over, for 5.0 s".into())));
    }
}

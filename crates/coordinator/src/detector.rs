//! Tells a group that hangs from one that computes for long, and in it the rank that hangs from those that wait for it. Pure.
//!
//! Workers whose connection breaks or that fall silent are noticed by their streams. This is about those that still send
//! heartbeats: while a step is in flight some rank must get on, or the step is given up after a deadline that grows with the
//! step's rows and with what a row has taken so far.

mod loading;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use cluster::{Activity, WorkerId};
use engine::{Epoch, StepId};

use crate::heartbeats::Heartbeats;

pub(crate) use loading::hangs_in_loading;

/// A step may take so many times what its rows took at their slowest.
const SLACK: u32 = 8;
/// A step takes as long as for so many rows if it has fewer: it reads all weights whatever its rows, so one says little of a row.
const FEWEST: usize = 16;
/// How long the first steps may take, of which nothing is known.
const UNMEASURED: Duration = Duration::from_secs(120);
/// How much of an old measurement is left when a faster one comes: a single slow step is forgotten after a while.
const MEMORY: f64 = 0.95;

/// What the coordinator knows of how a group gets on.
#[derive(Debug)]
pub(crate) struct Detector {
    /// No rank is given up before it has made no progress for so long.
    shortest: Duration,
    /// Seconds of a row, at its slowest.
    pace: Option<f64>,
    /// Planned and not applied, oldest first.
    in_flight: VecDeque<Planned>,
    /// When the oldest step in flight was the only thing left to wait for.
    since: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Planned {
    step: StepId,
    rows: usize,
}

/// A member that hangs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hang {
    /// Its number in the group, through all stages.
    pub(crate) rank: usize,
    /// How it shows.
    pub(crate) reason: String,
}

impl Detector {
    /// Gives no rank up before it has made no progress for `shortest`.
    pub(crate) fn new(shortest: Duration) -> Self {
        Self { shortest, pace: None, in_flight: VecDeque::new(), since: None }
    }

    /// A step is on its way to all ranks.
    pub(crate) fn planned(&mut self, step: StepId, rows: usize, now: Instant) {
        self.since.get_or_insert(now);
        self.in_flight.push_back(Planned { step, rows });
    }

    /// Its output has come. Returns its rows, and how long it took.
    pub(crate) fn applied(&mut self, step: StepId, now: Instant) -> Option<(usize, Duration)> {
        let Planned { rows, .. } = self.in_flight.pop_front_if(|planned| planned.step == step)?;
        let took = now.saturating_duration_since(self.since?);
        let row = took.as_secs_f64() / rows.max(FEWEST) as f64;
        self.pace = Some(self.pace.map_or(row, |slowest| row.max(slowest * MEMORY + row * (1.0 - MEMORY))));
        self.since = (!self.in_flight.is_empty()).then_some(now);
        Some((rows, took))
    }

    /// No step is in flight any more: the group was lost. Returns how long its ranks may still take for what they are in.
    pub(crate) fn reset(&mut self) -> Duration {
        let rows = self.in_flight.drain(..).map(|planned| planned.rows).max().unwrap_or(0);
        self.since = None;
        self.deadline(rows)
    }

    /// The rank that keeps the group of `ranks`, those of all stages, of which `sampler` sends the outputs, from getting on, if none has for too long.
    pub(crate) fn hang(
        &self,
        heartbeats: &Heartbeats,
        epoch: Epoch,
        ranks: &[WorkerId],
        sampler: usize,
        now: Instant,
    ) -> Option<Hang> {
        let (step, since) = (self.in_flight.front()?, self.since?);
        let deadline = self.deadline(step.rows);
        let seen: Vec<_> = ranks.iter().map(|worker| heartbeats.last(*worker)).collect();
        let last = seen.iter().flatten().map(|seen| seen.changed).max().unwrap_or(since).max(since);
        let idle = now.saturating_duration_since(last);
        if idle < deadline {
            return None;
        }
        let step = step.step;
        let of_epoch = |rank: usize| seen[rank].map(|seen| seen.progress).filter(|p| p.epoch == Some(epoch));
        let hang = |rank: usize, how: &str| {
            Some(Hang { rank, reason: format!("{how} step {step} for {:.1} s", idle.as_secs_f64()) })
        };
        for rank in 0..ranks.len() {
            match of_epoch(rank) {
                Some(p) if p.activity == Activity::Computing && p.waits_for.is_none() => {
                    return hang(rank, "makes no progress in");
                }
                Some(p) if p.activity != Activity::Computing && p.step.is_none_or(|taken| taken < step) => {
                    return hang(rank, "has not begun");
                }
                None => return hang(rank, "does not tell of"),
                Some(_) => {}
            }
        }
        let mut waiters = vec![0; ranks.len()];
        let waited_for = (0..ranks.len()).filter_map(|rank| of_epoch(rank)?.waits_for);
        waited_for.for_each(|rank| waiters[rank.min(ranks.len() - 1)] += 1);
        let most = (0..ranks.len()).max_by_key(|&rank| waiters[rank])?;
        if waiters[most] > 0 {
            return hang(most, "is waited for by others that wait for each other in");
        }
        // All have done their part.
        hang(sampler, "has sent no output of")
    }

    fn deadline(&self, rows: usize) -> Duration {
        let Some(row) = self.pace else { return UNMEASURED.max(self.shortest) };
        // Far below what a Duration holds, however slow a row was.
        let seconds = (row * rows.max(FEWEST) as f64 * f64::from(SLACK)).min(1e6);
        Duration::from_secs_f64(seconds).max(self.shortest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heartbeats::Seen;
    use cluster::Progress;

    const EPOCH: Epoch = Epoch { term: 1, counter: 4 };
    const RANKS: [WorkerId; 3] = [WorkerId(7), WorkerId(8), WorkerId(9)];
    const SAMPLER: usize = 2;
    const SECOND: Duration = Duration::from_secs(1);

    struct Scene {
        detector: Detector,
        heartbeats: Heartbeats,
        now: Instant,
    }

    impl Scene {
        fn unmeasured(shortest: Duration) -> Self {
            let heartbeats = Heartbeats::default();
            Self { detector: Detector::new(shortest), heartbeats, now: Instant::now() }
        }

        /// One step of a hundred rows, which took a second, was applied; the second one is on its way.
        fn new() -> Self {
            let mut scene = Self::unmeasured(5 * SECOND);
            scene.detector.planned(StepId(0), 100, scene.now);
            scene.now += SECOND;
            assert_eq!(scene.detector.applied(StepId(0), scene.now), Some((100, SECOND)));
            scene
        }

        fn hear(&mut self, rank: usize, activity: Activity, step: u64, waits_for: Option<usize>) {
            let progress = Progress {
                epoch: Some(EPOCH),
                step: Some(StepId(step)),
                activity,
                waits_for,
                calls: 3,
                held: 0,
            };
            self.heartbeats.heard(RANKS[rank], progress, self.now);
        }

        fn hang(&self) -> Option<(usize, String)> {
            let hang = self.detector.hang(&self.heartbeats, EPOCH, &RANKS, SAMPLER, self.now);
            hang.map(|hang| (hang.rank, hang.reason))
        }

        /// Goes on for so long, with the same heartbeats.
        fn pass(&mut self, time: Duration) {
            self.now += time;
            for worker in RANKS {
                if let Some(Seen { progress, .. }) = self.heartbeats.last(worker) {
                    self.heartbeats.heard(worker, progress, self.now);
                }
            }
        }
    }

    #[test]
    fn the_rank_that_hangs_is_told_from_those_that_wait_for_it() {
        for culprit in 0..3 {
            let mut scene = Scene::new();
            scene.detector.planned(StepId(1), 1, scene.now);
            for rank in 0..3 {
                scene.hear(rank, Activity::Computing, 1, (rank != culprit).then_some(culprit));
            }
            scene.pass(4 * SECOND);
            assert_eq!(scene.hang(), None);
            scene.pass(SECOND);
            assert_eq!(scene.hang(), Some((culprit, "makes no progress in step 1 for 5.0 s".into())));
        }
    }

    #[test]
    fn a_long_prefill_is_no_hang() {
        let mut scene = Scene::new();
        // A row took 10 ms, so ten thousand may take 800 s.
        scene.detector.planned(StepId(1), 10_000, scene.now);
        for rank in 0..3 {
            scene.hear(rank, Activity::Computing, 1, None);
        }
        scene.pass(799 * SECOND);
        assert_eq!(scene.hang(), None);
        scene.pass(SECOND);
        assert!(scene.hang().is_some());
    }

    #[test]
    fn a_small_step_that_was_slow_says_little_of_large_ones() {
        let mut scene = Scene::unmeasured(5 * SECOND);
        scene.detector.planned(StepId(0), 1, scene.now);
        scene.now += SECOND;
        scene.detector.applied(StepId(0), scene.now);
        assert_eq!(scene.detector.deadline(1), 8 * SECOND);
        assert_eq!(scene.detector.deadline(512), 256 * SECOND);
    }

    #[test]
    fn who_gets_on_is_left_alone() {
        let mut scene = Scene::new();
        scene.detector.planned(StepId(1), 1, scene.now);
        for calls in 0..10 {
            let progress = Progress { epoch: Some(EPOCH), calls, ..Progress::default() };
            scene.heartbeats.heard(RANKS[2], progress, scene.now);
            scene.pass(4 * SECOND);
            assert_eq!(scene.hang(), None);
        }
        // Nothing is expected of a group without a step.
        let mut scene = Scene::new();
        scene.hear(0, Activity::Idle, 0, None);
        scene.pass(1000 * SECOND);
        assert_eq!(scene.hang(), None);
    }

    #[test]
    fn nothing_is_known_of_the_first_step() {
        let mut scene = Scene::unmeasured(SECOND);
        scene.detector.planned(StepId(0), 1, scene.now);
        scene.pass(UNMEASURED - SECOND);
        assert_eq!(scene.hang(), None);
        scene.pass(SECOND);
        assert_eq!(scene.hang(), Some((0, "does not tell of step 0 for 120.0 s".into())));
        assert_eq!(scene.detector.reset(), UNMEASURED);
        assert_eq!(scene.hang(), None);
    }

    #[test]
    fn whoever_did_not_begin_or_answer_is_named() {
        let mut scene = Scene::new();
        scene.detector.planned(StepId(1), 1, scene.now);
        scene.hear(0, Activity::Computing, 1, Some(1));
        scene.hear(1, Activity::Idle, 0, None);
        scene.hear(2, Activity::Computing, 1, Some(1));
        scene.pass(5 * SECOND);
        assert_eq!(scene.hang(), Some((1, "has not begun step 1 for 5.0 s".into())));
        (0..3).for_each(|rank| scene.hear(rank, Activity::Idle, 1, None));
        scene.pass(5 * SECOND);
        assert_eq!(scene.hang(), Some((SAMPLER, "has sent no output of step 1 for 5.0 s".into())));
        // A cut link: each waits for another.
        scene.hear(0, Activity::Computing, 1, Some(2));
        scene.hear(1, Activity::Computing, 1, Some(2));
        scene.hear(2, Activity::Computing, 1, Some(0));
        scene.pass(5 * SECOND);
        assert_eq!(scene.hang().map(|(rank, _)| rank), Some(2));
    }

    #[test]
    fn one_slow_step_is_forgotten() {
        let mut scene = Scene::new();
        for step in 1..200 {
            scene.detector.planned(StepId(step), 10, scene.now);
            scene.now += Duration::from_millis(10);
            scene.detector.applied(StepId(step), scene.now);
        }
        scene.detector.planned(StepId(200), 1000, scene.now);
        (0..3).for_each(|rank| scene.hear(rank, Activity::Computing, 200, None));
        scene.pass(9 * SECOND);
        assert!(scene.hang().is_some());
    }
}

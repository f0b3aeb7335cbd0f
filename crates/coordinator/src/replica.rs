//! One group's share of the requests, and the steps in which it runs them. It outlives its group: what ran goes on when the group stands
//! again, or in another one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use engine::{Load, Scheduler, SchedulerConfig, StepId};
use tracing::Span;

use crate::detector::Detector;
use crate::requests::Requests;
use crate::status::Rates;

/// While requests run, a group serves for so many times what its last formation took before it is formed anew for the sake of
/// another rank: planned changes take a tenth of the time at most.
const WORTH: u32 = 10;

/// The requests of a group.
#[derive(Debug)]
pub(crate) struct Replica {
    /// The group's number.
    pub(crate) group: u32,
    /// What its group serves, or served last.
    pub(crate) fingerprint: String,
    /// Its limits, likewise.
    pub(crate) limits: SchedulerConfig,
    pub(crate) scheduler: Scheduler,
    pub(crate) requests: Requests,
    /// The steps in flight, oldest first.
    pub(crate) steps: VecDeque<Step>,
    pub(crate) detector: Detector,
    pub(crate) rates: Rates,
    pub(crate) pace: Pace,
}

/// A step whose output is awaited.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) id: StepId,
    pub(crate) span: Span,
    pub(crate) planned: Instant,
}

/// How long forming the group takes, and since when it serves.
#[derive(Debug)]
pub(crate) struct Pace {
    /// When the last epoch was over.
    lost: Option<Instant>,
    /// Since when the group serves, and how long it took to form it.
    serves: Option<(Instant, Duration)>,
}

impl Replica {
    /// Without requests.
    pub(crate) fn new(
        group: u32,
        fingerprint: String,
        limits: SchedulerConfig,
        scheduler: Scheduler,
        detector: Detector,
        now: Instant,
    ) -> Self {
        Self {
            group,
            fingerprint,
            limits,
            scheduler,
            requests: Requests::default(),
            steps: VecDeque::new(),
            detector,
            rates: Rates::new(now),
            pace: Pace { lost: None, serves: None },
        }
    }

    /// How much is going on.
    pub(crate) fn load(&self) -> Load {
        self.scheduler.load()
    }

    /// Requests that run or wait.
    pub(crate) fn request_count(&self) -> usize {
        let Load { running, waiting, .. } = self.load();
        running + waiting
    }

    /// The epoch is over: no step is in flight any more. Returns how long ranks may still take for those that were.
    pub(crate) fn lost(&mut self, now: Instant) -> Duration {
        self.steps.clear();
        (self.pace.lost, self.pace.serves) = (Some(now), None);
        self.detector.reset()
    }

    /// Whether what a formation costs the requests is little beside how long they have been served.
    pub(crate) fn worth_a_change(&self, now: Instant) -> bool {
        let worth = |(since, took): (Instant, Duration)| now.saturating_duration_since(since) >= took * WORTH;
        self.request_count() == 0 || self.pace.serves.is_some_and(worth)
    }
}

impl Pace {
    /// The next epoch serves. `joined`: when the last worker did, which was waited for.
    pub(crate) fn serves(&mut self, joined: Instant, now: Instant) {
        let began = self.lost.map_or(joined, |lost| lost.max(joined));
        self.serves = Some((now, now.saturating_duration_since(began)));
    }
}

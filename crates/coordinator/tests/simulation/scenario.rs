//! What a seed means: workers, policy, requests, and faults with their times.

use std::fmt;
use std::time::Duration;

use auth::Secret;
use cluster::proto::GroupStatus;
use cluster::{ModelReport, Policy, Resources, Shape};
use coordinator::CoordinatorConfig;
use engine::{MemoryNeeds, Request, SamplingParams};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::faults::{CoordinatorFault, Fault, WorkerFault};
use crate::orders::Wish;
use crate::worker::Pace;
use crate::worker::executor::Limits;
use crate::worker::model::{VOCABULARY, answer};

/// Tokens of the model's context.
pub(crate) const CONTEXT: u32 = 48;
const BLOCK_SIZE: u32 = 4;
const LAYERS: u32 = 4;
/// What the workers' bits depend on: most have the first, and in some runs others the second.
const FINGERPRINTS: [&str; 2] = ["this", "that"];
/// Bytes of a unit in a layer.
const LAYER_UNIT: u64 = 100;
/// Requests come, and faults begin, within this time.
const EVENTFUL: u64 = 12_000;

#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) coordinators: usize,
    pub(crate) policy: Policy,
    pub(crate) gather: Duration,
    pub(crate) max_batch_tokens: Option<u32>,
    pub(crate) max_sequences: Option<u32>,
    pub(crate) max_waiting: usize,
    pub(crate) progress_timeout: Duration,
    pub(crate) units: u32,
    pub(crate) workers: Vec<WorkerPlan>,
    pub(crate) requests: Vec<RequestPlan>,
    /// In the order of their times.
    pub(crate) faults: Vec<(Duration, Fault)>,
}

#[derive(Debug)]
pub(crate) struct WorkerPlan {
    pub(crate) starts: Duration,
    pub(crate) latency: Duration,
    pub(crate) fingerprint: &'static str,
    /// Units for which it has memory.
    pub(crate) fitting: u32,
    pub(crate) limits: Limits,
    pub(crate) pace: Pace,
}

#[derive(Debug)]
pub(crate) struct RequestPlan {
    pub(crate) comes: Duration,
    pub(crate) request: Request,
    pub(crate) hangs_up_after: Option<usize>,
}

impl Scenario {
    pub(crate) fn new(seed: u64) -> Self {
        Chance(StdRng::seed_from_u64(seed)).scenario()
    }

    pub(crate) fn report(&self, worker: &WorkerPlan) -> ModelReport {
        ModelReport {
            name: "simulated".into(),
            vocabulary: VOCABULARY,
            max_context: CONTEXT,
            units: self.units,
            block_size: BLOCK_SIZE,
            eos: vec![],
            fingerprint: worker.fingerprint.into(),
            needs: MemoryNeeds { layers: LAYERS, layer_unit: LAYER_UNIT, ..MemoryNeeds::default() },
        }
    }

    pub(crate) fn config(&self, secret: &Secret) -> CoordinatorConfig {
        CoordinatorConfig {
            policy: self.policy,
            gather: self.gather,
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            max_waiting: self.max_waiting,
            progress_timeout: self.progress_timeout,
            ..CoordinatorConfig::new(1, secret.clone())
        }
    }

    /// Whether a group is as wide as can be when all workers are there; several share them as they like.
    pub(crate) fn is_full_width(&self, group: &GroupStatus) -> bool {
        let (_, most) = self.policy.shape.widths(self.units as usize);
        let (_, stages) = self.policy.shape.stages();
        let alike = self.workers.iter().filter(|worker| worker.fingerprint == group.fingerprint).count();
        self.policy.replicas > 1 || stages > 1 || group.ranks.len() == most.min(alike)
    }
}

impl WorkerPlan {
    pub(crate) fn resources(&self) -> Resources {
        let memory = u64::from(self.fitting) * u64::from(LAYERS) * LAYER_UNIT;
        Resources { zone: "here".into(), device: "cpu".into(), memory, kv_memory: memory }
    }
}

/// For whoever looks into a failure; requests show in what happened.
impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { coordinators, policy, gather, max_batch_tokens, max_sequences, units, .. } = self;
        writeln!(f, "{coordinators} coordinators, {units} units, {:?}, gather {gather:?}", policy.shape)?;
        writeln!(f, "batch {max_batch_tokens:?}, sequences {max_sequences:?}")?;
        self.workers.iter().try_for_each(|worker| writeln!(f, "{worker:?}"))?;
        self.faults.iter().try_for_each(|(at, fault)| writeln!(f, "{at:?} {fault:?}"))
    }
}

struct Chance(StdRng);

impl Chance {
    fn scenario(mut self) -> Scenario {
        let workers = self.0.random_range(1..=6);
        let units: u32 = [2, 4, 8][self.0.random_range(0..3)];
        // Others may form groups too, but need not suffice for one.
        let others = if workers > 1 && self.often(0.36) { self.0.random_range(1..workers) } else { 0 };
        let alike = workers - others;
        let stages = if self.often(0.4) { self.0.random_range(1..=alike.min(3)) } else { 1 };
        let ranks = self.0.random_range(1..=(alike / stages).min(units as usize));
        let min_ranks = self.0.random_range(1..=ranks);
        let auto = self.often(0.3);
        let shape =
            if auto { Shape::Auto { max_stages: stages } } else { Shape::Fixed { stages, ranks, min_ranks } };
        // All together have room for the model, or each by itself.
        let needed = if auto { alike } else { ranks } as u32;
        let fitting = if self.often(0.3) { units.div_ceil(needed) } else { units };
        let mut faults: Vec<_> = (0..self.0.random_range(0..=10)).map(|_| self.fault(workers)).collect();
        let replicas = if self.often(0.4) { self.0.random_range(2..=3) } else { 1 };
        let orders = if self.often(0.4) { self.0.random_range(1..=4) } else { 0 };
        faults.extend((0..orders).map(|_| self.order(workers, units, replicas)));
        faults.sort_by_key(|(at, _)| *at);
        let max_waiting = if self.often(0.1) { 2 } else { 1024 };
        Scenario {
            coordinators: self.0.random_range(1..=3),
            policy: Policy { shape, replicas, context: None },
            gather: self.millis(200..3000),
            max_batch_tokens: self.maybe(4..64),
            max_sequences: self.maybe(1..8),
            max_waiting,
            progress_timeout: self.millis(2000..10_000),
            units,
            workers: (0..workers)
                .map(|at| self.worker(FINGERPRINTS[usize::from(at >= alike)], fitting))
                .collect(),
            requests: (0..self.0.random_range(1..=24)).map(|_| self.request()).collect(),
            faults,
        }
    }

    fn worker(&mut self, fingerprint: &'static str, fitting: u32) -> WorkerPlan {
        let limits = Limits {
            block_size: BLOCK_SIZE,
            // One context fits.
            kv_blocks: CONTEXT / BLOCK_SIZE + self.0.random_range(0..30),
            steps_in_flight: self.0.random_range(1..=3),
            step_rows: self.maybe(8..64).unwrap_or(0),
            sampled_rows: self.maybe(2..16).unwrap_or(0),
        };
        let pace = Pace {
            load: self.millis(1..2000),
            step: self.millis(1..80),
            row: Duration::from_micros(self.0.random_range(0..1000)),
        };
        let starts = if self.often(0.8) { self.millis(0..1500) } else { self.millis(0..EVENTFUL) };
        WorkerPlan { starts, latency: self.millis(0..8), fingerprint, fitting, limits, pace }
    }

    fn request(&mut self) -> RequestPlan {
        let prompt = (0..self.0.random_range(1..=24)).map(|_| self.0.random_range(0..VOCABULARY)).collect();
        let sampling = SamplingParams {
            temperature: if self.often(0.5) { 0.7 } else { 0.0 },
            seed: self.0.random_range(0..u64::MAX),
            ..SamplingParams::GREEDY
        };
        let max_tokens = self.0.random_range(1..=40);
        let mut request = Request { prompt, max_tokens, sampling, stop_ids: vec![], resume: None };
        if self.often(0.2) {
            let answer = answer(&request, CONTEXT, &[], FINGERPRINTS[0]);
            request.stop_ids.push(answer[self.0.random_range(0..answer.len())]);
        }
        let hangs_up_after = self.often(0.15).then(|| self.0.random_range(0..20));
        RequestPlan { comes: self.millis(0..EVENTFUL), request, hangs_up_after }
    }

    fn fault(&mut self, workers: usize) -> (Duration, Fault) {
        let at = self.millis(0..EVENTFUL);
        let time = if self.often(0.5) { self.millis(10..2000) } else { self.millis(10..15_000) };
        if self.often(0.25) {
            let what = match self.0.random_range(0..5) {
                0 => CoordinatorFault::Killed,
                1 => CoordinatorFault::Stopped,
                2 => CoordinatorFault::LeaseLost,
                3 => CoordinatorFault::RegistryAway,
                _ => CoordinatorFault::RegistryAwayForAll,
            };
            let place = if self.often(0.7) { None } else { Some(self.0.random_range(0..3)) };
            return (at, Fault::Coordinator { place, what, time });
        }
        let what = match self.0.random_range(0..13) {
            0 => WorkerFault::Killed,
            1 => WorkerFault::Vanished,
            2 => WorkerFault::Hung,
            3 => WorkerFault::Stopped,
            4 => WorkerFault::Slow(self.0.random_range(2..30)),
            5 => WorkerFault::Cut,
            6 => WorkerFault::Silenced,
            7 => WorkerFault::FailsToLoad,
            8 => WorkerFault::FailsInStep,
            9 => WorkerFault::Congested,
            10 => WorkerFault::Echoes,
            11 => WorkerFault::Garbles,
            _ => WorkerFault::Accuses,
        };
        (at, Fault::Worker { worker: self.0.random_range(0..workers), what, time })
    }

    /// Later orders replace earlier ones; taking one back restores the policy of the beginning.
    fn order(&mut self, workers: usize, units: u32, replicas: usize) -> (Duration, Fault) {
        let (at, time) = (self.millis(0..EVENTFUL), self.millis(10..6000));
        let stages = self.0.random_range(1..=2);
        let ranks = self.0.random_range(1..=workers.min(units as usize));
        let min_ranks = self.0.random_range(1..=ranks);
        let wish = match self.0.random_range(0..4) {
            0 | 1 => Wish::Drain(self.0.random_range(0..workers)),
            2 => Wish::Scale(Shape::Auto { max_stages: stages }, self.0.random_range(1..=replicas)),
            _ => Wish::Scale(Shape::Fixed { stages, ranks, min_ranks }, self.0.random_range(1..=replicas)),
        };
        (at, Fault::Ordered { wish, time })
    }

    fn often(&mut self, probability: f64) -> bool {
        self.0.random_bool(probability)
    }

    fn maybe(&mut self, range: std::ops::Range<u32>) -> Option<u32> {
        self.often(0.5).then(|| self.0.random_range(range))
    }

    fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.0.random_range(range))
    }
}

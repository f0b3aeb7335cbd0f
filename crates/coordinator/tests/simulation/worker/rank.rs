//! One rank in one epoch: it meets the others, loads, and runs plans, apart from the task that talks to the coordinator.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use cluster::{Activity, Assignment, Progress};
use engine::{Epoch, SampledToken, StepOutput, StepPlan};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::Worker;
use super::collective::{Lost, Seat, Vitals};
use super::control::strikes;
use super::executor::Executor;

/// A worker's place in its group.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) epoch: Epoch,
    /// Where all ranks listen, stage after stage.
    addresses: Vec<String>,
    /// Which of them it is.
    pub(super) rank: usize,
    stages: u64,
    samples: bool,
}

/// All that is read of an assignment.
pub(super) fn place(assignment: Assignment) -> Place {
    let (epoch, stages) = (assignment.epoch, assignment.stages.len());
    let members = assignment.stages.iter().flat_map(|stage| &stage.members);
    let addresses = members.map(|member| member.address.clone()).collect();
    let rank = assignment.number(assignment.stage, assignment.rank);
    let samples = assignment.stage + 1 == stages && assignment.rank == 0;
    Place { epoch, addresses, rank, stages: stages as u64, samples }
}

/// What a rank tells the worker that it is part of.
#[derive(Debug)]
pub(super) enum News {
    Ready,
    /// A step was run; its output where this rank samples.
    Ran(Option<StepOutput>),
    /// The share could not be loaded.
    LoadFailed,
    /// It cannot go on, maybe because of another rank.
    Failed {
        reason: String,
        at_rank: Option<usize>,
    },
}

/// A running rank. Dropping it ends it at once, as when its process ends.
pub(super) struct Rank {
    pub(super) place: Place,
    pub(super) news: mpsc::UnboundedReceiver<News>,
    plans: mpsc::UnboundedSender<StepPlan>,
    seat: Weak<Seat>,
    abort: CancellationToken,
    task: JoinSet<()>,
}

impl Rank {
    pub(super) fn start(worker: &Worker, place: Place, vitals: Vitals) -> Self {
        let Place { epoch, addresses, rank, .. } = place.clone();
        vitals.change(|progress| {
            *progress = Progress { epoch: Some(epoch), activity: Activity::Loading, ..Progress::default() };
        });
        let control = worker.control.clone();
        let seat = Arc::new(worker.rooms.enter(epoch, addresses, rank, worker.limits, control));
        let (plans, inbox) = mpsc::unbounded_channel();
        let (sender, news) = mpsc::unbounded_channel();
        let abort = CancellationToken::new();
        let mut task = JoinSet::new();
        let weak = Arc::downgrade(&seat);
        let running = Running { worker: worker.clone(), place: place.clone(), seat, vitals, news: sender };
        task.spawn(running.run(inbox, abort.clone()));
        Self { place, news, plans, seat: weak, abort, task }
    }

    /// Gives it a plan.
    pub(super) fn run(&self, worker: &Worker, plan: StepPlan) {
        if let Some(seat) = self.seat.upgrade() {
            let limit = seat.steps_in_flight() + self.place.stages - 1;
            if plan.step.0 >= seat.outputs() + limit {
                let journal = &worker.journal;
                journal.violation(format_args!("step {} while {} are in flight", plan.step, limit));
            }
        }
        let _ = self.plans.send(plan);
    }

    /// Frees it from what it waits for, and waits until it has ended: whatever it computes, or hangs in, ends first.
    pub(super) async fn stop(mut self) {
        self.abort.cancel();
        self.task.join_next().await;
    }
}

struct Running {
    worker: Worker,
    place: Place,
    seat: Arc<Seat>,
    vitals: Vitals,
    news: mpsc::UnboundedSender<News>,
}

impl Running {
    async fn run(self, mut plans: mpsc::UnboundedReceiver<StepPlan>, abort: CancellationToken) {
        let Some(outcome) = abort.run_until_cancelled(self.meet(0)).await else { return };
        if let Err(news) = outcome {
            return self.tell(news);
        }
        sleep(self.worker.pace.load).await;
        self.worker.control.hung.pass().await;
        self.worker.control.stopped.pass().await;
        if strikes(&self.worker.control.fails_load) {
            return self.tell(News::LoadFailed);
        }
        self.vitals.change(|progress| progress.activity = Activity::Idle);
        self.tell(News::Ready);
        let mut executor = Executor::new(self.worker.limits, &self.worker.report.fingerprint);
        while let Some(Some(plan)) = abort.run_until_cancelled(plans.recv()).await {
            match self.step(&mut executor, &plan, &abort).await {
                Some(Ok(tokens)) => self.tell(News::Ran(self.output(&plan, tokens))),
                Some(Err(news)) => {
                    self.tell(news);
                    // Its seat stays taken until the group is abandoned, or others would take this rank for the one that was lost.
                    return abort.cancelled().await;
                }
                None => return,
            }
        }
    }

    /// Runs a step; none if it was aborted meanwhile.
    async fn step(
        &self,
        executor: &mut Executor,
        plan: &StepPlan,
        abort: &CancellationToken,
    ) -> Option<Result<Vec<SampledToken>, News>> {
        let Worker { control, pace, journal, .. } = &self.worker;
        self.vitals.change(|progress| {
            (progress.step, progress.activity) = (Some(plan.step), Activity::Computing);
        });
        let slowness = control.slowness.load(Ordering::Relaxed);
        sleep((pace.step + pace.row * plan.rows() as u32) * slowness).await;
        control.hung.pass().await;
        control.stopped.pass().await;
        if strikes(&control.accuses) && self.place.addresses.len() > 1 {
            let other = (self.place.rank + 1) % self.place.addresses.len();
            journal.suspect(&self.place.addresses[other]);
            return Some(Err(lost(Lost(other))));
        }
        if strikes(&control.fails_step) {
            return Some(Err(News::Failed { reason: "ran out of luck".into(), at_rank: None }));
        }
        let tokens = match executor.run(plan) {
            Ok(tokens) => tokens,
            Err(wrong) => {
                let (address, epoch) = (&self.worker.address, journal.epoch(plan.epoch));
                journal.violation(format_args!("{address}, step {} of {epoch}: {wrong}", plan.step));
                return Some(Err(News::Failed { reason: wrong, at_rank: None }));
            }
        };
        if strikes(&control.garbles) && self.place.addresses.len() > 1 {
            self.seat.garble();
        }
        let met = abort.run_until_cancelled(self.meet(digest(&tokens))).await?;
        // What was met in while it was stopped is told when it goes on.
        control.stopped.pass().await;
        self.vitals.change(|progress| progress.activity = Activity::Idle);
        Some(met.map(|()| tokens))
    }

    async fn meet(&self, found: u64) -> Result<(), News> {
        self.seat.meet(found, &self.vitals, &self.worker.journal).await.map_err(lost)
    }

    fn output(&self, plan: &StepPlan, tokens: Vec<SampledToken>) -> Option<StepOutput> {
        self.place.samples.then(|| {
            self.seat.sent_output();
            StepOutput { epoch: plan.epoch, step: plan.step, tokens }
        })
    }

    fn tell(&self, news: News) {
        let _ = self.news.send(news);
    }
}

fn lost(lost: Lost) -> News {
    News::Failed { reason: format!("lost rank {}", lost.0), at_rank: Some(lost.0) }
}

fn digest(tokens: &[SampledToken]) -> u64 {
    let mut hasher = DefaultHasher::new();
    tokens.iter().for_each(|token| (token.seq, token.id).hash(&mut hasher));
    hasher.finish()
}

//! The executor thread: loads a share, then runs plans in order, beginning each as soon as the share takes it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self as blocking, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::Assignment;
use comm::AbortHandle;
use engine::{StepOutput, StepPlan};
use model::{Executor, StepSize};
use tokio::sync::mpsc;
use tracing::debug_span;

use crate::load::Load;
use crate::vitals::Vitals;

/// How long the thread looks without pause for a step's end or a plan, and how long it pauses then: little beside a step.
const AWAKE: Duration = Duration::from_micros(100);
const NAP: Duration = Duration::from_micros(20);

/// What the thread tells; its channel ends when the thread does.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Weights are loaded and the collective has formed.
    Ready {
        kv_blocks: usize,
        weight_bytes: u64,
        steps_in_flight: usize,
        largest_step: Option<StepSize>,
        connecting: Duration,
        loading: Duration,
    },
    /// A step was run; its output where this rank samples.
    Ran(Option<StepOutput>),
    /// The share could not be loaded.
    LoadFailed(model::Error),
    /// A step could not be run.
    StepFailed(model::Error),
}

/// A running executor thread. Dropping it tells the thread to end; [`ExecutorThread::stop`] also waits for that.
#[derive(Debug)]
pub(crate) struct ExecutorThread {
    plans: blocking::Sender<StepPlan>,
    /// One entry for each plan, and the coordinator sends no more plans than are taken before an output.
    progress: mpsc::UnboundedReceiver<Progress>,
    abort: AbortOnDrop,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ExecutorThread {
    /// Starts the thread, which begins to load.
    pub(crate) fn start<L: Load>(
        load: Arc<L>,
        assignment: Arc<Assignment>,
        vitals: Arc<Vitals>,
    ) -> io::Result<Self> {
        let abort = AbortHandle::default();
        vitals.load(assignment.epoch, abort.clone());
        let (plans, inbox) = blocking::channel::<StepPlan>();
        let (sender, progress) = mpsc::unbounded_channel();
        let raised = abort.clone();
        let thread = std::thread::Builder::new().name("executor".into()).spawn(move || {
            // Nobody listens once the group is abandoned: then the thread ends by its abort flag or its inbox.
            let tell = |progress| {
                let _ = sender.send(progress);
            };
            let begun = Instant::now();
            let transport = match load.connect(&assignment, raised.clone()) {
                Ok(transport) => transport,
                Err(error) => return tell(Progress::LoadFailed(error)),
            };
            let connecting = begun.elapsed();
            let mut executor = match load.load(&assignment, transport) {
                Ok(executor) => executor,
                Err(error) => return tell(Progress::LoadFailed(error)),
            };
            vitals.rest();
            tell(Progress::Ready {
                kv_blocks: executor.kv_blocks(),
                weight_bytes: executor.weight_bytes(),
                steps_in_flight: executor.steps_in_flight(),
                largest_step: executor.largest_step(),
                connecting,
                loading: begun.elapsed() - connecting,
            });
            if let Err(error) = run(&mut executor, &inbox, &raised, &vitals, tell) {
                tell(Progress::StepFailed(error));
                // Connections stay until the group is abandoned, or others would take this rank for the one that was lost.
                while !raised.is_aborted() && inbox.recv().is_ok() {}
            }
        })?;
        Ok(Self { plans, progress, abort: AbortOnDrop(abort), thread })
    }

    /// Gives it a plan. If the thread has ended, `progress` tells why.
    pub(crate) fn run(&self, plan: StepPlan) {
        let _ = self.plans.send(plan);
    }

    /// The next news; none if the thread has ended without a word.
    pub(crate) async fn progress(&mut self) -> Option<Progress> {
        self.progress.recv().await
    }

    /// Frees the thread from whatever it waits for and waits until it has ended and its memory is free. A load is not cut
    /// short.
    pub(crate) async fn stop(self) {
        let Self { plans, progress, abort, thread } = self;
        drop((plans, progress, abort));
        // A panic was printed when it happened.
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

/// Runs what comes until nothing more can come or the flag is raised.
fn run(
    executor: &mut impl Executor,
    inbox: &blocking::Receiver<StepPlan>,
    raised: &AbortHandle,
    vitals: &Vitals,
    tell: impl Fn(Progress),
) -> Result<(), model::Error> {
    let mut in_flight = 0;
    let mut patience = Patience::default();
    while !raised.is_aborted() {
        if in_flight > 0 && executor.is_ready()? {
            let output = executor.poll()?;
            in_flight -= 1;
            if in_flight == 0 {
                vitals.rest();
            }
            tell(Progress::Ran(output));
            patience = Patience::default();
            continue;
        }
        let plan = if in_flight == 0 {
            inbox.recv().map_err(|_| TryRecvError::Disconnected)
        } else if in_flight < executor.steps_in_flight() {
            inbox.try_recv()
        } else {
            Err(TryRecvError::Empty)
        };
        match plan {
            Ok(_) if raised.is_aborted() => {}
            Ok(plan) => {
                vitals.compute(plan.step);
                launch(executor, &plan)?;
                in_flight += 1;
                patience = Patience::default();
            }
            Err(TryRecvError::Empty) => patience.turn(),
            Err(TryRecvError::Disconnected) => break,
        }
    }
    Ok(())
}

fn launch(executor: &mut impl Executor, plan: &StepPlan) -> Result<(), model::Error> {
    let _span = debug_span!("step", epoch = %plan.epoch, step = %plan.step, rows = plan.rows()).entered();
    executor.launch(plan)
}

/// A wait for either of two things, a step's end or a plan: awake for a moment, then looking from time to time.
#[derive(Default)]
struct Patience {
    since: Option<Instant>,
}

impl Patience {
    fn turn(&mut self) {
        if self.since.get_or_insert_with(Instant::now).elapsed() < AWAKE {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

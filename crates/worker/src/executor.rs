//! The executor thread: loads a share, then runs one plan after the other.

use std::io;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::Assignment;
use comm::AbortHandle;
use engine::{StepOutput, StepPlan};
use model::Executor;
use tokio::sync::mpsc;
use tracing::debug_span;

use crate::load::Load;
use crate::vitals::Vitals;

/// What the thread tells; its channel ends when the thread does.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Weights are loaded and the collective has formed.
    Ready { kv_blocks: usize, weight_bytes: u64, connecting: Duration, loading: Duration },
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
    /// One entry for each plan, and the coordinator sends the next plan after the output.
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
        assignment: Assignment,
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
            let (kv_blocks, weight_bytes) = (executor.kv_blocks(), executor.weight_bytes());
            vitals.rest();
            tell(Progress::Ready {
                kv_blocks,
                weight_bytes,
                connecting,
                loading: begun.elapsed() - connecting,
            });
            while let Ok(plan) = inbox.recv()
                && !raised.is_aborted()
            {
                vitals.compute(plan.step);
                match step(&mut executor, &plan) {
                    Ok(output) => {
                        vitals.rest();
                        tell(Progress::Ran(output));
                    }
                    Err(error) => return tell(Progress::StepFailed(error)),
                }
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

fn step(executor: &mut impl Executor, plan: &StepPlan) -> Result<Option<StepOutput>, model::Error> {
    let _span = debug_span!("step", epoch = %plan.epoch, step = %plan.step, rows = plan.rows()).entered();
    executor.launch(plan)?;
    executor.poll()
}

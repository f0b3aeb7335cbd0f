//! The executor thread: epoch after epoch it loads what its share lacks, then runs plans in order, beginning each as soon as the share
//! takes it. Device and weights stay there in between.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self as blocking, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster::{Assignment, Part};
use comm::AbortHandle;
use engine::{StepOutput, StepPlan};
use model::{Executor, Loaded, StepSize};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tracing::{debug_span, info, warn};

use crate::WorkerError;
use crate::load::Load;
use crate::vitals::Vitals;

/// How long the thread looks without pause for a step's end or a plan, and how long it pauses then: little beside a step.
const AWAKE: Duration = Duration::from_micros(100);
const NAP: Duration = Duration::from_micros(20);

/// How long the thread may take to leave an epoch. Whatever waits for others is freed within milliseconds, and a load ends with the
/// request that is being read: what is left is one rank's part of a step, which nothing cuts short.
const LEAVE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });

/// What the thread tells of an epoch; the channel ends when it has left that.
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
        loaded: Loaded,
    },
    /// A step was run; its output where this rank samples.
    Ran(Option<StepOutput>),
    /// The share could not be loaded.
    LoadFailed(model::Error),
    /// A step could not be run.
    StepFailed(model::Error),
}

/// The thread, for as long as the worker lives. It has one epoch at a time. Dropping it tells it to end.
#[derive(Debug)]
pub(crate) struct ExecutorThread {
    tasks: blocking::Sender<Task>,
    thread: JoinHandle<()>,
    hung: Arc<Notify>,
}

/// What the thread has to do in an epoch. Dropping it tells the thread to leave that; [`EpochWork::stop`] also waits until it has.
#[derive(Debug)]
pub(crate) struct EpochWork {
    plans: blocking::Sender<StepPlan>,
    /// One entry for each plan, and the coordinator sends no more plans than are taken before an output.
    progress: mpsc::UnboundedReceiver<Progress>,
    abort: AbortOnDrop,
    hung: Arc<Notify>,
}

/// What the thread is told.
#[derive(Debug)]
enum Task {
    Epoch(Job),
    Prepare(Preparation),
}

/// A part of the model that may be needed. Dropping what [`ExecutorThread::prepare`] returned ends it.
#[derive(Debug)]
struct Preparation {
    part: Part,
    vitals: Arc<Vitals>,
    abort: AbortHandle,
}

/// The thread's end of an epoch.
#[derive(Debug)]
struct Job {
    assignment: Arc<Assignment>,
    vitals: Arc<Vitals>,
    plans: blocking::Receiver<StepPlan>,
    /// Nobody listens once the group is abandoned: then the job ends by its abort flag or its plans.
    progress: mpsc::UnboundedSender<Progress>,
    abort: AbortHandle,
}

/// Raises a flag when it is dropped.
#[derive(Debug)]
pub(crate) struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ExecutorThread {
    /// Starts the thread, which waits for its first epoch. Devices are opened there, since they belong to one thread.
    pub(crate) fn start(load: impl Load) -> io::Result<Self> {
        let (tasks, inbox) = blocking::channel();
        let thread = std::thread::Builder::new().name("executor".into()).spawn(move || {
            let mut held = None;
            while let Ok(task) = inbox.recv() {
                let run = || match task {
                    Task::Epoch(job) => job.run(&load, &mut held),
                    Task::Prepare(preparation) => preparation.run(&load, &mut held),
                };
                // A panic was printed when it happened. It took with it whatever was in use.
                if catch_unwind(AssertUnwindSafe(run)).is_err() {
                    held = None;
                }
            }
        })?;
        Ok(Self { tasks, thread, hung: Arc::default() })
    }

    /// Begins with an epoch; the one before was stopped.
    pub(crate) fn begin(&self, assignment: Arc<Assignment>, vitals: Arc<Vitals>) -> EpochWork {
        let abort = AbortHandle::default();
        vitals.load(assignment.epoch, abort.clone());
        let (plans, inbox) = blocking::channel();
        let (sender, progress) = mpsc::unbounded_channel();
        // If the thread has ended, so has the channel of progress.
        let job = Job { assignment, vitals, plans: inbox, progress: sender, abort: abort.clone() };
        let _ = self.tasks.send(Task::Epoch(job));
        EpochWork { plans, progress, abort: AbortOnDrop(abort), hung: self.hung.clone() }
    }

    /// Ends when the thread did not leave an epoch in time: it hangs, and only the end of the process frees what it holds.
    pub(crate) async fn hung(&self) -> WorkerError {
        self.hung.notified().await;
        WorkerError::Hung { seconds: LEAVE_LIMIT.as_secs() }
    }

    /// Begins to load a part of the model that may be needed, until what this returns is dropped: then the thread is free at the next
    /// request that it reads, and what had come stays.
    pub(crate) fn prepare(&self, part: Part, vitals: Arc<Vitals>) -> AbortOnDrop {
        let abort = AbortHandle::default();
        let _ = self.tasks.send(Task::Prepare(Preparation { part, vitals, abort: abort.clone() }));
        AbortOnDrop(abort)
    }

    /// Waits until the thread has ended and its memory is free; its epoch was stopped.
    pub(crate) async fn end(self) {
        let Self { tasks, thread, .. } = self;
        drop(tasks);
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

impl EpochWork {
    /// Gives it a plan. If the thread has left the epoch, `progress` tells why.
    pub(crate) fn run(&self, plan: StepPlan) {
        let _ = self.plans.send(plan);
    }

    /// The next news; none if the thread has left the epoch without a word.
    pub(crate) async fn progress(&mut self) -> Option<Progress> {
        self.progress.recv().await
    }

    /// Frees the thread from whatever it waits for and waits until it has left the epoch. KV cache and activations are free then;
    /// weights stay. A load ends with the request that is being read. From a thread that hangs, nobody comes back:
    /// [`ExecutorThread::hung`] says so.
    pub(crate) async fn stop(self) {
        let Self { plans, mut progress, abort, hung } = self;
        drop((plans, abort));
        let left = async { while progress.recv().await.is_some() {} };
        if timeout(LEAVE_LIMIT, left).await.is_err() {
            hung.notify_one();
            std::future::pending().await
        }
    }
}

impl Job {
    /// Takes part in the epoch until it is abandoned. `held` is what remains from one to the next: nothing at first, and after a failure
    /// of the device.
    fn run<L: Load>(self, load: &L, held: &mut Option<L::Held>) {
        let mut executor = match self.load(load, held) {
            Ok(executor) => executor,
            Err(error) => return self.tell(Progress::LoadFailed(error)),
        };
        let mut sound = true;
        if let Err(error) = self.steps(&mut executor) {
            sound = !in_doubt(&error);
            self.tell(Progress::StepFailed(error));
            // Connections stay until the group is abandoned, or others would take this rank for the one that was lost.
            while !self.abort.is_aborted() && self.plans.recv().is_ok() {}
        }
        if sound {
            *held = load.leave(executor).inspect_err(|error| warn!(%error, "weights are let go")).ok();
        }
    }

    fn load<L: Load>(&self, load: &L, held: &mut Option<L::Held>) -> Result<L::Executor, model::Error> {
        let Self { assignment, vitals, abort, .. } = self;
        let begun = Instant::now();
        let connections = load.connect(assignment, abort.clone())?;
        let connecting = begun.elapsed();
        let mut there = match held.take() {
            Some(there) => there,
            None => load.open()?,
        };
        let (formed, loaded) = match load.load(assignment, connections, abort, &mut there) {
            Ok(done) => done,
            Err(error) => {
                *held = Some(there).filter(|_| !in_doubt(&error));
                return Err(error);
            }
        };
        vitals.holds(loaded.kept + loaded.read);
        let executor = load.start(assignment, formed, there)?;
        vitals.rest();
        self.tell(Progress::Ready {
            kv_blocks: executor.kv_blocks(),
            weight_bytes: executor.weight_bytes(),
            steps_in_flight: executor.steps_in_flight(),
            largest_step: executor.largest_step(),
            connecting,
            loading: begun.elapsed() - connecting,
            loaded,
        });
        Ok(executor)
    }

    fn tell(&self, progress: Progress) {
        let _ = self.progress.send(progress);
    }

    /// Runs what comes until nothing more can come or the flag is raised.
    fn steps(&self, executor: &mut impl Executor) -> Result<(), model::Error> {
        let Self { plans, vitals, abort, .. } = self;
        let mut in_flight = 0;
        let mut patience = Patience::default();
        while !abort.is_aborted() {
            if in_flight > 0 && executor.is_ready()? {
                let output = executor.poll()?;
                in_flight -= 1;
                if in_flight == 0 {
                    vitals.rest();
                }
                self.tell(Progress::Ran(output));
                patience = Patience::default();
                continue;
            }
            let plan = if in_flight == 0 {
                plans.recv().map_err(|_| TryRecvError::Disconnected)
            } else if in_flight < executor.steps_in_flight() {
                plans.try_recv()
            } else {
                Err(TryRecvError::Empty)
            };
            match plan {
                Ok(_) if abort.is_aborted() => {}
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
}

impl Preparation {
    fn run<L: Load>(self, load: &L, held: &mut Option<L::Held>) {
        let Self { part, vitals, abort } = self;
        vitals.prepare();
        match prepare(load, &part, &abort, held) {
            Ok(Loaded { kept, read }) => {
                info!(?part, kept, read, "prepared");
                vitals.holds(kept + read);
            }
            Err(model::Error::Collective(comm::Error::Aborted)) => {}
            // It would show again when the part is needed.
            Err(error) => warn!(%error, ?part, "cannot prepare"),
        }
        vitals.prepared();
    }
}

fn prepare<L: Load>(
    load: &L,
    part: &Part,
    abort: &AbortHandle,
    held: &mut Option<L::Held>,
) -> Result<Loaded, model::Error> {
    if abort.is_aborted() {
        return Err(comm::Error::Aborted.into());
    }
    let mut there = match held.take() {
        Some(there) => there,
        None => load.open()?,
    };
    let loaded = load.prepare(part, abort, &mut there);
    let in_doubt = loaded.as_ref().is_err_and(in_doubt);
    *held = Some(there).filter(|_| !in_doubt);
    loaded
}

/// Whether the device cannot be relied on any more.
fn in_doubt(error: &model::Error) -> bool {
    matches!(error, model::Error::Kernel(_) | model::Error::Collective(comm::Error::Device(_)))
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

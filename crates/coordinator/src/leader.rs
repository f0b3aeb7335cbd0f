//! The one task that owns the scheduler and the group.

mod tend;

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use cluster::proto::coordinator_message::Message;
use cluster::proto::{ClusterStatus, CoordinatorMessage, StepFrame, Welcome};
use cluster::{Session, WorkerId, encode_plan};
use engine::{Epoch, Request, Scheduler, StepId, StepOutput, StepPlan};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{Span, debug, debug_span, info, warn};

use crate::api::{EngineError, ModelInfo, Submission};
use crate::clock;
use crate::command::{Command, JoinSender, PlanSender};
use crate::config::CoordinatorConfig;
use crate::detector::Detector;
use crate::group::{Effect, Group, Newcomer, Standing, State};
use crate::handle::CoordinatorHandle;
use crate::incidents::Incidents;
use crate::leader::tend::Pace;
use crate::limits::limits;
use crate::requests::Requests;
use crate::service::ClusterService;
use crate::status::{Rates, View};

/// Commands that wait for the leader; more hold up whoever sends them.
const COMMANDS: usize = 256;

/// Makes coordinators.
#[derive(Debug)]
pub struct Coordinator;

impl Coordinator {
    /// Starts the leader of `term` on the current runtime. The handle is for the gateway, the service for workers; the leader
    /// ends with `stop`, at once: it plans nothing more, fails its requests as unavailable, and sends its workers away.
    pub fn start(
        config: CoordinatorConfig,
        term: u64,
        stop: CancellationToken,
    ) -> (CoordinatorHandle, ClusterService) {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let group = Group::new(config.policy, term);
        let (state_sender, state) = watch::channel(group.state().unwrap_or(State::Loading));
        let (model_sender, model) = watch::channel(None);
        let service = ClusterService::new(&config, commands.clone());
        let now = clock::now();
        let leader = Leader {
            detector: Detector::new(config.progress_timeout),
            incidents: Incidents::default(),
            rates: Rates::new(now),
            pace: Pace::new(now),
            config,
            group,
            workers: BTreeMap::new(),
            scheduler: None,
            requests: Requests::default(),
            steps: VecDeque::new(),
            state: state_sender,
            model: model_sender,
        };
        tokio::spawn(leader.run(inbox, stop));
        (CoordinatorHandle { commands, state, model }, service)
    }
}

struct Leader {
    config: CoordinatorConfig,
    group: Group,
    detector: Detector,
    incidents: Incidents,
    rates: Rates,
    pace: Pace,
    workers: BTreeMap<WorkerId, Connection>,
    /// There is one from the first group on; it outlives every group.
    scheduler: Option<Scheduler>,
    requests: Requests,
    /// The steps in flight, oldest first.
    steps: VecDeque<Step>,
    state: watch::Sender<State>,
    model: watch::Sender<Option<ModelInfo>>,
}

/// A step whose output is awaited.
struct Step {
    id: StepId,
    span: Span,
    planned: Instant,
}

/// A worker's streams.
struct Connection {
    session: Session,
    join: JoinSender,
    plans: Option<PlanSender>,
}

impl Leader {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut ticks = interval(self.config.heartbeat_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return self.step_down(),
                command = inbox.recv() => match command {
                    Some(command) => self.handle(command),
                    None => return,
                },
                _ = ticks.tick() => self.tend(clock::now()),
            }
            // Whatever has arrived meanwhile takes part in the next step.
            while let Ok(command) = inbox.try_recv() {
                self.handle(command);
            }
            self.plan_steps();
        }
    }

    /// Leaves requests and workers to another leader.
    fn step_down(mut self) {
        let reason = "this coordinator does not lead any more";
        self.requests.fail_all(&EngineError::Unavailable(reason.into()));
        for worker in self.workers.keys().copied().collect::<Vec<_>>() {
            self.dismiss(worker, Status::aborted(reason));
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit { request, reply } => {
                // Whoever asked may be gone: then its events have no receiver, which cancels it.
                let _ = reply.send(self.submit(request));
            }
            Command::Status { reply } => {
                let _ = reply.send(self.status());
            }
            Command::Join { newcomer, session, down, reply } => {
                let _ = reply.send(self.join(*newcomer, session, down));
                let effects = self.group.muster(false);
                self.perform(effects);
            }
            Command::Heartbeat { worker, progress } => {
                if self.workers.contains_key(&worker) {
                    self.detector.heard(worker, progress, clock::now());
                }
            }
            Command::Ready { worker, epoch, capacity, loading } => {
                if epoch == self.group.epoch() {
                    self.incidents.loaded(loading);
                }
                let effects = self.group.ready(worker, epoch, capacity);
                self.perform(effects);
            }
            Command::Failed { worker, epoch, reason, at_rank } => self.fail(worker, epoch, &reason, at_rank),
            Command::Left { worker, reason } => {
                if self.workers.remove(&worker).is_some() {
                    warn!(%worker, reason, "a worker left");
                }
                let effects = self.group.leave(worker, &reason);
                self.perform(effects);
                self.detector.forget(worker);
            }
            Command::Attach { worker, epoch, proof, plans, reply } => {
                let _ = reply.send(self.attach(worker, epoch, &proof, plans));
                let effects = self.group.serve();
                self.perform(effects);
            }
            Command::Output { worker, epoch, output } => self.apply(worker, epoch, &output),
        }
    }

    fn submit(&mut self, request: Request) -> Result<Submission, EngineError> {
        let Some(scheduler) = &mut self.scheduler else {
            return Err(EngineError::Unavailable(self.state.borrow().to_string()));
        };
        let waiting = scheduler.load().waiting;
        // An answer that goes on was let in when it began.
        if waiting >= self.config.max_waiting && request.resume.is_none() {
            return Err(EngineError::Unavailable(format!(
                "the queue is full ({waiting} requests wait): try again later"
            )));
        }
        let prompt_tokens = request.prompt.len();
        let seq = scheduler.submit(request).map_err(|error| EngineError::Invalid(error.to_string()))?;
        Ok(Submission { events: self.requests.open(seq, prompt_tokens) })
    }

    fn join(&mut self, newcomer: Newcomer, session: Session, down: JoinSender) -> Result<WorkerId, Status> {
        // Two cannot listen at one address: the one that was there has come back on a new connection.
        let address = newcomer.address.clone();
        if let Some(before) = self.group.at(&address) {
            let reason = format!("another worker joined at {address}");
            self.dismiss(before, Status::already_exists(reason.clone()));
            let effects = self.group.leave(before, &reason);
            self.perform(effects);
        }
        let id = self.group.join(newcomer).map_err(|reason| {
            warn!(reason, "refused a worker");
            Status::failed_precondition(reason)
        })?;
        info!(worker = %id, address, "a worker joined");
        self.pace.joined(clock::now());
        let heartbeat_millis = self.config.heartbeat_interval.as_millis() as u32;
        let welcome = Message::Welcome(Welcome { worker_id: id.0, heartbeat_millis });
        let _ = down.send(Ok(CoordinatorMessage { message: Some(welcome) }));
        self.workers.insert(id, Connection { session, join: down, plans: None });
        Ok(id)
    }

    fn attach(
        &mut self,
        worker: WorkerId,
        epoch: Epoch,
        proof: &[u8],
        plans: PlanSender,
    ) -> Result<(), Status> {
        let connection = self.workers.get_mut(&worker);
        let proven = connection.filter(|connection| connection.session.verify_attach(worker, epoch, proof));
        let Some(connection) = proven else {
            return Err(Status::unauthenticated(format!("not worker {worker} of epoch {epoch}")));
        };
        if !self.group.attach(worker, epoch) {
            return Err(Status::failed_precondition(format!("epoch {epoch} is not loading")));
        }
        connection.plans = Some(plans);
        Ok(())
    }

    fn fail(&mut self, worker: WorkerId, epoch: Epoch, reason: &str, at_rank: Option<usize>) {
        let effects = self.group.fail(worker, epoch, reason, at_rank);
        if effects.is_empty() {
            return debug!(%worker, %epoch, reason, "a failure after the epoch was over");
        }
        warn!(%worker, %epoch, reason, "a worker failed");
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Lost(loss) => {
                    let now = clock::now();
                    let heard =
                        loss.member.as_ref().and_then(|(_, worker)| self.detector.last_heard(worker.id));
                    let detect = heard.map(|(at, _)| now.saturating_duration_since(at)).unwrap_or_default();
                    info!(epoch = %loss.epoch, cause = loss.cause, "the epoch is over");
                    self.incidents.lost(loss, detect, now);
                    self.detector.reset(now);
                    self.pace.lost(now);
                }
                Effect::Assign(worker, assignment) => {
                    info!(%worker, epoch = %assignment.epoch, rank = assignment.rank, "assigned");
                    self.tell(worker, Message::Assignment(assignment.into()));
                }
                Effect::Abandon(worker, epoch) => {
                    info!(%worker, %epoch, "abandoned");
                    if let Some(connection) = self.workers.get_mut(&worker) {
                        connection.plans = None;
                    }
                    self.tell(worker, Message::Abandon(epoch.into()));
                }
                Effect::Dismiss(worker, reason) => self.dismiss(worker, Status::aborted(reason)),
                Effect::Serve(standing) => self.serve(standing),
            }
        }
        if let Some(state) = self.group.state() {
            self.steps.clear();
            self.set_state(state);
        }
    }

    fn serve(&mut self, standing: Standing) {
        let Standing { epoch, report, ranks, capacity } = standing;
        let limits = limits(&self.config, &report, capacity);
        let max_context = limits.max_context;
        info!(%epoch, ?limits, ranks, "serving");
        match &mut self.scheduler {
            None => self.scheduler = Some(Scheduler::new(limits, epoch)),
            Some(scheduler) => {
                scheduler.restart(limits, epoch);
                for (seq, error) in scheduler.evict_unfit() {
                    self.requests.fail(seq, EngineError::Invalid(error.to_string()));
                }
            }
        }
        let model = ModelInfo {
            name: report.name,
            vocabulary: report.vocabulary,
            max_context,
            eos: report.eos,
            ranks: ranks as u32,
            fingerprint: report.fingerprint,
        };
        self.model.send_replace(Some(model.clone()));
        self.set_state(State::Serving(model));
        let (now, requests) = (clock::now(), self.requests());
        self.pace.serves(now);
        tend::report(self.incidents.served(epoch, ranks, requests, now));
    }

    fn apply(&mut self, worker: WorkerId, epoch: Epoch, output: &StepOutput) {
        let Some((serving, sampler)) = self.group.sampler() else { return };
        if epoch != serving || output.epoch != serving {
            return debug!(%worker, %epoch, "dropped an output of another epoch");
        }
        if worker != sampler {
            return self.fail(worker, epoch, "sent an output, but another rank samples", None);
        }
        let Some(scheduler) = &mut self.scheduler else { return };
        match scheduler.apply(output) {
            Ok(events) => {
                let applied = self.steps.pop_front_if(|step| step.id == output.step);
                if let Some(Step { span, planned, .. }) = applied {
                    span.in_scope(|| debug!(elapsed = ?clock::now().saturating_duration_since(planned), events = events.len(), "applied"));
                }
                self.applied(output.step, &events);
                events.into_iter().for_each(|event| self.requests.deliver(event));
            }
            Err(error) => self.fail(worker, epoch, &error.to_string(), None),
        }
    }

    /// Plans steps as long as the group stands and takes more, and sends each to every rank.
    fn plan_steps(&mut self) {
        let Some(scheduler) = &mut self.scheduler else { return };
        self.requests.hung_up().into_iter().for_each(|seq| scheduler.cancel(seq));
        while self.group.sampler().is_some()
            && let Some(plan) = self.scheduler.as_mut().and_then(Scheduler::plan)
        {
            self.send(&plan);
        }
    }

    fn send(&mut self, plan: &StepPlan) {
        let (epoch, step) = (plan.epoch, plan.step);
        let span = debug_span!("step", %epoch, %step, sequences = plan.slices.len(), rows = plan.rows());
        let frame = StepFrame { plan: encode_plan(plan) };
        let now = clock::now();
        self.detector.planned(step, plan.rows(), now);
        self.steps.push_back(Step { id: step, span, planned: now });
        let stuck = self.workers.iter().find_map(|(worker, connection)| {
            let plans = connection.plans.as_ref()?;
            plans.try_send(Ok(frame.clone())).is_err().then_some(*worker)
        });
        if let Some(worker) = stuck {
            self.fail(worker, epoch, "does not take plans", None);
        }
    }

    fn tell(&self, worker: WorkerId, message: Message) {
        if let Some(connection) = self.workers.get(&worker) {
            // If the stream has ended, `Left` is on its way.
            let _ = connection.join.send(Ok(CoordinatorMessage { message: Some(message) }));
        }
    }

    fn status(&self) -> ClusterStatus {
        let Self { group, detector, incidents, rates, .. } = self;
        let (scheduler, now) = (self.scheduler.as_ref(), clock::now());
        View { state: &self.state.borrow(), group, detector, incidents, scheduler, rates, now }.status()
    }

    fn dismiss(&mut self, worker: WorkerId, status: Status) {
        if let Some(connection) = self.workers.remove(&worker) {
            let _ = connection.join.send(Err(status));
        }
    }

    fn set_state(&self, state: State) {
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            if changed {
                info!(%state, "the group");
                *current = state;
            }
            changed
        });
    }
}

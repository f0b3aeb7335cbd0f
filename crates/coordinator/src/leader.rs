//! The one task that owns the groups and their requests.

mod examine;
mod operate;
mod serve;
mod tend;

use std::collections::BTreeMap;
use std::time::Instant;

use cluster::doctor::Findings;
use cluster::proto::coordinator_message::Message;
use cluster::proto::{ClusterStatus, CoordinatorMessage, Welcome};
use cluster::registry::orders::{OrderBook, StandingOrders};
use cluster::{Part, Session, WorkerId, preload};
use engine::Epoch;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, info, warn};

use crate::api::{EngineError, ModelInfo};
use crate::clock;
use crate::command::{Command, JoinSender, PlanSender};
use crate::config::CoordinatorConfig;
use crate::examination::Introduction;
use crate::groups::{Effect, Groups, Newcomer};
use crate::handle::CoordinatorHandle;
use crate::heartbeats::Heartbeats;
use crate::incidents::Incidents;
use crate::replica::Replica;
use crate::service::ClusterService;
use crate::state::State;
use crate::status::View;

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
        Self::succeed(config, term, StandingOrders::default(), None, stop)
    }

    /// Likewise a leader who holds to `orders` that were given to others, and has further ones put down in `book`.
    pub(crate) fn succeed(
        config: CoordinatorConfig,
        term: u64,
        orders: StandingOrders,
        book: Option<OrderBook>,
        stop: CancellationToken,
    ) -> (CoordinatorHandle, ClusterService) {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let mut groups = Groups::new(config.policy.scaled(orders.shape, orders.replicas), term);
        groups.hold_back(orders.drained.iter().cloned());
        let (state_sender, state) = watch::channel(groups.state().unwrap_or(State::Loading));
        let (model_sender, model) = watch::channel(None);
        let service = ClusterService::new(&config, book, commands.clone());
        let leader = Leader {
            config,
            groups,
            orders,
            heartbeats: Heartbeats::default(),
            incidents: Incidents::default(),
            joined: clock::now(),
            newcomers: false,
            workers: BTreeMap::new(),
            replicas: BTreeMap::new(),
            findings: None,
            complaints: Vec::new(),
            state: state_sender,
            model: model_sender,
        };
        tokio::spawn(leader.run(inbox, stop));
        (CoordinatorHandle { commands, state, model }, service)
    }
}

struct Leader {
    config: CoordinatorConfig,
    groups: Groups,
    /// What operators ordered that still holds.
    orders: StandingOrders,
    heartbeats: Heartbeats,
    incidents: Incidents,
    /// When the last worker joined, or the coordinator started.
    joined: Instant,
    /// Workers have joined since groups were formed: however many come at once, they are looked at once.
    newcomers: bool,
    workers: BTreeMap<WorkerId, Connection>,
    /// The requests of each group that has served.
    replicas: BTreeMap<u32, Replica>,
    /// Where findings of the last examination go.
    findings: Option<mpsc::Sender<(WorkerId, Findings)>>,
    /// What is odd about the members of groups.
    complaints: Vec<String>,
    state: watch::Sender<State>,
    model: watch::Sender<Option<ModelInfo>>,
}

/// A worker's streams.
struct Connection {
    session: Session,
    introduction: Introduction,
    join: JoinSender,
    plans: Option<PlanSender>,
    /// What it was told to hold for the time when it is needed.
    prepared: Option<Part>,
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
            if std::mem::take(&mut self.newcomers) {
                let effects = self.groups.muster(false);
                self.perform(effects);
                self.prepare_spares();
            }
            self.plan_steps();
        }
    }

    /// Leaves requests and workers to another leader.
    fn step_down(mut self) {
        let reason = "this coordinator does not lead any more";
        for replica in self.replicas.values_mut() {
            replica.requests.fail_all(&EngineError::Unavailable(reason.into()));
        }
        for worker in self.workers.keys().copied().collect::<Vec<_>>() {
            self.dismiss(worker, Status::aborted(reason));
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit { request, fingerprint, reply } => {
                // Whoever asked may be gone: then its events have no receiver, which cancels it.
                let _ = reply.send(self.submit(request, fingerprint.as_deref()));
            }
            Command::Operate { order, reply } => {
                let _ = reply.send(self.operate(order));
            }
            Command::StandingOrders { reply } => {
                let _ = reply.send(Ok(self.orders.clone()));
            }
            Command::Examine { disturb, reply } => {
                let _ = reply.send(self.examination(disturb));
            }
            Command::Findings { worker, findings } => self.found(worker, findings),
            Command::Status { reply } => {
                let _ = reply.send(self.status());
            }
            Command::Join { newcomer, introduction, session, down, reply } => {
                let _ = reply.send(self.join(*newcomer, *introduction, session, down));
                self.newcomers = true;
            }
            Command::Heartbeat { worker, progress } => {
                if self.workers.contains_key(&worker) {
                    self.heartbeats.heard(worker, progress, clock::now());
                }
            }
            Command::Ready { worker, epoch, capacity, loading, bytes } => {
                if let Some((group, current)) = self.groups.seat(worker)
                    && epoch == current
                {
                    self.incidents.loaded(group, loading, bytes);
                }
                let effects = self.groups.ready(worker, epoch, capacity);
                self.perform(effects);
            }
            Command::Failed { worker, epoch, reason, at_member } => {
                self.fail(worker, epoch, &reason, at_member)
            }
            Command::Left { worker, reason } => {
                if self.workers.remove(&worker).is_some() {
                    warn!(%worker, reason, "a worker left");
                }
                let effects = self.groups.leave(worker, &reason);
                self.perform(effects);
                self.heartbeats.forget(worker);
            }
            Command::Attach { worker, epoch, proof, plans, reply } => {
                let _ = reply.send(self.attach(worker, epoch, &proof, plans));
                let effects = self.groups.attached(worker);
                self.perform(effects);
            }
            Command::Output { worker, epoch, output } => self.apply(worker, epoch, &output),
        }
    }

    fn join(
        &mut self,
        newcomer: Newcomer,
        introduction: Introduction,
        session: Session,
        down: JoinSender,
    ) -> Result<WorkerId, Status> {
        // Two cannot listen at one address: the one that was there has come back on a new connection.
        let address = newcomer.address.clone();
        if let Some(before) = self.groups.at(&address) {
            let reason = format!("another worker joined at {address}");
            self.dismiss(before, Status::already_exists(reason.clone()));
            let effects = self.groups.leave(before, &reason);
            self.perform(effects);
        }
        let id = self.groups.join(newcomer).map_err(|reason| {
            warn!(reason, "refused a worker");
            Status::failed_precondition(reason)
        })?;
        info!(worker = %id, address, "a worker joined");
        self.joined = clock::now();
        let heartbeat_millis = self.config.heartbeat_interval.as_millis() as u32;
        let welcome = Message::Welcome(Welcome { worker_id: id.0, heartbeat_millis });
        let _ = down.send(Ok(CoordinatorMessage { message: Some(welcome) }));
        let connection = Connection { session, introduction, join: down, plans: None, prepared: None };
        self.workers.insert(id, connection);
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
        if !self.groups.attach(worker, epoch) {
            return Err(Status::failed_precondition(format!("epoch {epoch} is not loading")));
        }
        connection.plans = Some(plans);
        Ok(())
    }

    fn fail(&mut self, worker: WorkerId, epoch: Epoch, reason: &str, at_member: Option<usize>) {
        let effects = self.groups.fail(worker, epoch, reason, at_member);
        if effects.is_empty() {
            return debug!(%worker, %epoch, reason, "a failure after the epoch was over");
        }
        warn!(%worker, %epoch, reason, "a worker failed");
        self.perform(effects);
    }

    fn perform(&mut self, effects: Vec<Effect>) {
        if effects.is_empty() {
            return self.tell_state();
        }
        let formed = effects.iter().any(|effect| matches!(effect, Effect::Assign(..)));
        // How long members of the group that was lost last may still take for what they are in.
        let mut may_take = None;
        for effect in effects {
            match effect {
                Effect::Lost(loss) => {
                    let now = clock::now();
                    let heard = loss.member.as_ref().and_then(|(_, worker)| self.heartbeats.last(worker.id));
                    let detect =
                        heard.map(|seen| now.saturating_duration_since(seen.heard)).unwrap_or_default();
                    info!(group = loss.group, epoch = %loss.epoch, cause = loss.cause, "the epoch is over");
                    may_take = self.replicas.get_mut(&loss.group).map(|replica| replica.lost(now));
                    self.incidents.lost(loss, detect, now);
                }
                Effect::Assign(worker, assignment) => {
                    let (group, stage, rank) = (&assignment.group, assignment.stage, assignment.rank);
                    info!(%worker, epoch = %assignment.epoch, group, stage, rank, "assigned");
                    if let Some(connection) = self.workers.get_mut(&worker) {
                        connection.prepared = None;
                    }
                    self.tell(worker, Message::Assignment(assignment.into()));
                }
                Effect::Abandon(worker, epoch) => {
                    info!(%worker, %epoch, "abandoned");
                    if let Some(may_take) = may_take {
                        self.heartbeats.leaves(worker, clock::now(), may_take);
                    }
                    if let Some(connection) = self.workers.get_mut(&worker) {
                        connection.plans = None;
                    }
                    self.tell(worker, Message::Abandon(epoch.into()));
                }
                Effect::Dismiss(worker, reason) => self.dismiss(worker, Status::aborted(reason)),
                Effect::Serve(standing) => self.serve(standing),
            }
        }
        if formed {
            self.look_over();
        }
        self.share_out();
        self.prepare_spares();
        self.tell_state();
    }

    /// Has spares hold what they may need, once no group loads: until then the disks have enough to do.
    fn prepare_spares(&mut self) {
        let groups: Vec<_> = self.groups.standing().map(|(group, _)| group).collect();
        if !groups.iter().all(|group| self.groups.is_serving(group.number)) {
            return;
        }
        for (number, spare) in self.groups.spares().enumerate() {
            let Some(connection) = self.workers.get_mut(&spare.id) else { continue };
            let part = preload(spare, number, groups.iter().copied());
            if part != connection.prepared {
                let message = part.clone().map(|part| Message::Prepare(part.into()));
                // If the stream has ended, `Left` is on its way.
                let _ = message
                    .map(|message| connection.join.send(Ok(CoordinatorMessage { message: Some(message) })));
                connection.prepared = part;
            }
        }
    }

    fn tell(&self, worker: WorkerId, message: Message) {
        if let Some(connection) = self.workers.get(&worker) {
            // If the stream has ended, `Left` is on its way.
            let _ = connection.join.send(Ok(CoordinatorMessage { message: Some(message) }));
        }
    }

    fn dismiss(&mut self, worker: WorkerId, status: Status) {
        if let Some(connection) = self.workers.remove(&worker) {
            let _ = connection.join.send(Err(status));
        }
    }

    fn status(&self) -> ClusterStatus {
        let Self { groups, heartbeats, incidents, replicas, complaints, .. } = self;
        let (state, now) = (&self.state.borrow(), clock::now());
        View { state, groups, heartbeats, incidents, replicas, complaints, now }.status()
    }

    fn tell_state(&self) {
        let state = self.groups.state().or_else(|| self.model().map(State::Serving));
        let Some(state) = state else { return };
        if let State::Serving(model) = &state {
            self.model.send_if_modified(|current| {
                let changed = current.as_ref() != Some(model);
                *current = Some(model.clone());
                changed
            });
        }
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            if changed {
                info!(%state, "the groups");
                *current = state;
            }
            changed
        });
    }
}

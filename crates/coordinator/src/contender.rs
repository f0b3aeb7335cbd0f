//! One of a cluster's coordinators: it stands by, leads while it is elected, and stands by again.

use std::pin::pin;
use std::time::Duration;

use cluster::WORKER_MESSAGE_LIMIT;
use cluster::proto::cluster_server::{Cluster, ClusterServer};
use cluster::proto::{ClusterStatus, OperatorMessage, StepReply, WorkerMessage};
use cluster::registry::Health;
use cluster::registry::election::{Candidate, Election, Leadership};
use cluster::registry::orders::{OrderBook, StandingOrders};
use engine::Request;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, Streaming};
use tracing::{error, info};

use crate::api::{Engine, EngineError, ModelInfo, Submission};
use crate::config::CoordinatorConfig;
use crate::handle::CoordinatorHandle;
use crate::leader::Coordinator;
use crate::service::ClusterService;
use crate::state::State;

/// Pause before a registry that refused an election is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// What a coordinator is at present.
#[derive(Debug, Clone)]
enum Role {
    /// Where the leader's public service is, if it is known.
    Standby(Option<String>),
    Leading(CoordinatorHandle, ClusterService),
}

/// A coordinator as the gateway sees it, whether it leads or not. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Contender {
    role: watch::Receiver<Role>,
    state: watch::Receiver<State>,
    registry: watch::Receiver<Health>,
}

impl Contender {
    /// Stands for election on the current runtime until `stop`; then it resigns, and the task ends when the registry has it.
    pub fn start(
        config: CoordinatorConfig,
        candidate: Candidate,
        election: Election,
        book: OrderBook,
        stop: CancellationToken,
    ) -> (Self, ContenderService, JoinHandle<()>) {
        let (role_sender, role) = watch::channel(Role::Standby(None));
        let (state_sender, state) = watch::channel(State::Standby(None));
        let registry = candidate.health();
        let contest = Contest { config, candidate, election, book, role: role_sender, state: state_sender };
        let task = tokio::spawn(contest.run(stop));
        (Self { role: role.clone(), state, registry }, ContenderService { role }, task)
    }

    /// Where the coordinator and its group stand, now and whenever it changes.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// The leader, if it is this one.
    fn leading(&self) -> Result<CoordinatorHandle, EngineError> {
        match &*self.role.borrow() {
            Role::Standby(leader) => Err(EngineError::Standby(leader.clone())),
            Role::Leading(handle, _) => Ok(handle.clone()),
        }
    }
}

#[tonic::async_trait]
impl Engine for Contender {
    fn model(&self) -> Result<ModelInfo, EngineError> {
        self.leading()?.model()
    }

    fn health(&self) -> Result<(), EngineError> {
        self.leading()?.health()
    }

    async fn status(&self) -> Result<ClusterStatus, EngineError> {
        let mut status = self.leading()?.status().await?;
        let away = Some(self.registry.borrow().clone()).filter(|health| *health != Health::Answers);
        status.complaints.extend(away.map(|health| health.to_string()));
        Ok(status)
    }

    async fn submit_under(
        &self,
        request: Request,
        fingerprint: Option<String>,
    ) -> Result<Submission, EngineError> {
        self.leading()?.submit_under(request, fingerprint).await
    }
}

/// The service for workers: the leader's, or none.
#[derive(Debug, Clone)]
pub struct ContenderService {
    role: watch::Receiver<Role>,
}

impl ContenderService {
    /// The service as tonic's server takes it.
    pub fn into_server(self) -> ClusterServer<Self> {
        ClusterServer::new(self).max_decoding_message_size(WORKER_MESSAGE_LIMIT)
    }

    fn leading(&self) -> Result<ClusterService, Status> {
        match &*self.role.borrow() {
            Role::Standby(leader) => {
                Err(Status::unavailable(EngineError::Standby(leader.clone()).to_string()))
            }
            Role::Leading(_, service) => Ok(service.clone()),
        }
    }
}

#[tonic::async_trait]
impl Cluster for ContenderService {
    type JoinStream = <ClusterService as Cluster>::JoinStream;
    type StepsStream = <ClusterService as Cluster>::StepsStream;
    type OperateStream = <ClusterService as Cluster>::OperateStream;

    async fn join(
        &self,
        request: tonic::Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        self.leading()?.join(request).await
    }

    async fn steps(
        &self,
        request: tonic::Request<Streaming<StepReply>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        self.leading()?.steps(request).await
    }

    async fn operate(
        &self,
        request: tonic::Request<Streaming<OperatorMessage>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        self.leading()?.operate(request).await
    }
}

struct Contest {
    config: CoordinatorConfig,
    candidate: Candidate,
    election: Election,
    book: OrderBook,
    role: watch::Sender<Role>,
    state: watch::Sender<State>,
}

impl Contest {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            let leadership = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                leadership = self.stand_by() => leadership,
            };
            info!(term = leadership.term(), "this coordinator leads");
            tokio::select! {
                biased;
                () = stop.cancelled() => return leadership.resign().await,
                () = self.lead(&leadership) => {}
            }
        }
    }

    /// Follows who leads until this coordinator does.
    async fn stand_by(&mut self) -> Leadership {
        let candidate = self.candidate.clone();
        let mut elected = pin!(async {
            loop {
                match candidate.elected().await {
                    Ok(leadership) => return leadership,
                    Err(reason) => error!(%reason, "cannot stand for election"),
                }
                sleep(PAUSE).await;
            }
        });
        loop {
            let leader = self.election.leader().map(|leader| leader.addresses.clients);
            self.role.send_replace(Role::Standby(leader.clone()));
            self.set_state(State::Standby(leader));
            tokio::select! {
                biased;
                leadership = &mut elected => return leadership,
                () = self.election.changed() => {}
            }
        }
    }

    /// Leads until another does.
    async fn lead(&mut self, leadership: &Leadership) {
        let over = leadership.over().clone();
        let (config, term, book) = (self.config.clone(), leadership.term(), self.book.clone());
        // To lead is worth more than to know them.
        let orders = book.read().await.unwrap_or_else(|error| {
            error!(%error, "operators' orders to an earlier leader are not known, and not held to");
            StandingOrders::default()
        });
        if orders != StandingOrders::default() {
            info!(?orders, "operators' orders stand");
        }
        let (handle, service) = Coordinator::succeed(config, term, orders, Some(book), over.clone());
        let mut states = handle.state();
        self.role.send_replace(Role::Leading(handle, service));
        loop {
            let state = states.borrow_and_update().clone();
            self.set_state(state);
            tokio::select! {
                biased;
                () = over.cancelled() => return,
                // It has no more states once it has stopped, which it does only when this lead is over.
                Ok(()) = states.changed() => {}
            }
        }
    }
    fn set_state(&self, state: State) {
        self.state.send_if_modified(|before| {
            let changed = *before != state;
            *before = state;
            changed
        });
    }
}

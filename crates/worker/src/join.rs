//! Joining a coordinator: connect, prove, be welcomed.

use std::sync::Arc;
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::proof::nonce;
use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{CoordinatorMessage, Hello, WorkerMessage};
use cluster::{
    COORDINATOR_MESSAGE_LIMIT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, ModelReport, PROTOCOL, Resources,
    Session, WorkerId,
};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tracing::debug;

use crate::WorkerError;
use crate::doctor::Examinee;
use crate::vitals::Vitals;
use crate::whereabouts::{Leader, Whereabouts};

/// One try, from connecting to being welcomed.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A plan of a long context arrives without waiting for the window to open.
const STREAM_WINDOW: u32 = 4 << 20;
/// Messages on their way up.
const BUFFERED: usize = 16;
/// A heartbeat more often than this says nothing new.
const SHORTEST_BEAT: Duration = Duration::from_millis(10);

/// Who wants to join, and where.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) coordinator: Whereabouts,
    pub(crate) secret: Secret,
    pub(crate) collective_address: String,
    pub(crate) host: String,
    pub(crate) report: ModelReport,
    pub(crate) resources: Resources,
    pub(crate) join_timeout: Duration,
    pub(crate) examinee: Arc<Examinee>,
}

/// A Join stream on which both sides have proven themselves. Heartbeats go out until it is dropped.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) leader: Leader,
    pub(crate) worker: WorkerId,
    pub(crate) session: Session,
    pub(crate) service: ClusterClient<Channel>,
    pub(crate) up: mpsc::Sender<WorkerMessage>,
    pub(crate) down: Streaming<CoordinatorMessage>,
    /// What heartbeats tell of.
    pub(crate) vitals: Arc<Vitals>,
    /// What examines it.
    pub(crate) examinee: Arc<Examinee>,
}

/// How a try ended without being welcomed.
enum Failure {
    /// Trying again would end the same.
    Final(WorkerError),
    /// It may not.
    Passing(String),
}

/// Tries until the coordinator has been out of reach for `join_timeout`. A refusal is final.
pub(crate) async fn join(identity: &Identity) -> Result<Joined, WorkerError> {
    let deadline = Instant::now() + identity.join_timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        let reason = match identity.coordinator.leader().await {
            None => "none leads at present".to_owned(),
            Some(leader) => match timeout(TRY_TIMEOUT, attempt(leader, identity)).await {
                Ok(Ok(joined)) => return Ok(joined),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(reason))) => reason,
                Err(_) => format!("no answer within {TRY_TIMEOUT:?}"),
            },
        };
        debug!(reason, "not joined yet");
        if Instant::now() + pause > deadline {
            let seconds = identity.join_timeout.as_secs();
            return Err(WorkerError::NoCoordinator {
                address: identity.coordinator.to_string(),
                seconds,
                reason,
            });
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether the coordinator would say the same again.
pub(crate) fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::AlreadyExists
            | Code::Unimplemented
    )
}

fn endpoint(address: &str) -> Result<Endpoint, WorkerError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .ok()
        .filter(|endpoint| endpoint.uri().port().is_some())
        .ok_or_else(|| WorkerError::Address(address.to_owned()))?;
    Ok(endpoint
        .connect_timeout(TRY_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

async fn attempt(leader: Leader, identity: &Identity) -> Result<Joined, Failure> {
    let endpoint = endpoint(&leader.address).map_err(|error| match leader.term {
        None => Failure::Final(error),
        // Another leader may say where it is.
        Some(_) => Failure::Passing(error.to_string()),
    })?;
    let channel = endpoint.connect().await.map_err(|error| Failure::Passing(with_causes(&error)))?;
    let mut service = ClusterClient::new(channel).max_decoding_message_size(COORDINATOR_MESSAGE_LIMIT);
    let (up, messages) = mpsc::channel(BUFFERED);
    let ours = Nonce::random();
    let hello = Hello {
        protocol: PROTOCOL,
        nonce: ours.0.to_vec().into(),
        collective_address: identity.collective_address.clone(),
        host: identity.host.clone(),
        model: Some(identity.report.clone().into()),
        resources: Some(identity.resources.clone().into()),
        facts: Some(identity.examinee.facts.clone().into()),
        probe_address: identity.examinee.probe_address.clone(),
    };
    send(&up, Up::Hello(hello)).await;
    let mut down = service.join(ReceiverStream::new(messages)).await?.into_inner();

    let Down::Challenge(challenge) = receive(&mut down).await? else { return Err(unexpected("challenge")) };
    let theirs = nonce("challenge.nonce", &challenge.nonce).map_err(|error| refused(error.to_string()))?;
    let session = Session::new(identity.secret.clone(), ours, theirs);
    if !session.verify_coordinator(&challenge.proof) {
        return Err(Failure::Final(WorkerError::Secret(leader.address)));
    }
    send(&up, Up::Proof(session.worker_proof())).await;
    let Down::Welcome(welcome) = receive(&mut down).await? else { return Err(unexpected("welcome")) };
    let vitals = Arc::new(Vitals::default());
    let every = Duration::from_millis(welcome.heartbeat_millis.into()).max(SHORTEST_BEAT);
    tokio::spawn(beat(up.downgrade(), every, vitals.clone()));
    let examinee = identity.examinee.clone();
    Ok(Joined { leader, worker: WorkerId(welcome.worker_id), session, service, up, down, vitals, examinee })
}

/// Says that this worker lives and how far it is, for as long as somebody else holds the sender.
async fn beat(up: mpsc::WeakSender<WorkerMessage>, every: Duration, vitals: Arc<Vitals>) {
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        let Some(up) = up.upgrade() else { return };
        // If the channel is full, there are messages that say the same.
        let _ = up.try_send(WorkerMessage { message: Some(Up::Heartbeat(vitals.progress().into())) });
    }
}

/// Sends a message up; if the stream has ended, that shows on the way down.
pub(crate) async fn send(up: &mpsc::Sender<WorkerMessage>, message: Up) {
    let _ = up.send(WorkerMessage { message: Some(message) }).await;
}

async fn receive(down: &mut Streaming<CoordinatorMessage>) -> Result<Down, Failure> {
    match down.message().await? {
        Some(CoordinatorMessage { message: Some(message) }) => Ok(message),
        Some(CoordinatorMessage { message: None }) => Err(unexpected("message")),
        None => Err(Failure::Passing("the coordinator closed the Join stream".into())),
    }
}

fn unexpected(wanted: &str) -> Failure {
    refused(format!("it did not send its {wanted}"))
}

fn refused(reason: String) -> Failure {
    Failure::Final(WorkerError::Refused(reason))
}

/// An error with everything that lies behind it: a connection's reason is its last cause.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        if is_refusal(&status) {
            refused(status.message().to_owned())
        } else {
            Self::Passing(status.message().to_owned())
        }
    }
}

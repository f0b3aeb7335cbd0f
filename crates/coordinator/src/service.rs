//! The internal gRPC service: parses what workers send, proves who they are, and passes it on to the leader.

mod operate;

use std::sync::Arc;
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::convert::{self, Malformed};
use cluster::doctor::{Facts, Findings};
use cluster::proof::nonce;
use cluster::proto::cluster_server::{Cluster, ClusterServer};
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{
    Challenge, CoordinatorMessage, Hello, OperatorMessage, OperatorReply, StepFrame, StepReply,
    WorkerMessage, coordinator_message, step_reply,
};
use cluster::registry::orders::OrderBook;
use cluster::{
    MAX_STEPS_IN_FLIGHT, ModelReport, PROTOCOL, Progress, Resources, Session, WORKER_MESSAGE_LIMIT, WorkerId,
};
use engine::{Epoch, StepOutput};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use crate::clock;
use crate::command::{Command, JoinSender, PLANS_BUFFERED};
use crate::config::CoordinatorConfig;
use crate::examination::Introduction;
use crate::groups::{Capacity, Newcomer};

/// A stranger may not keep a stream open for longer without proving itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How late a timer fires on a machine that is merely busy.
const LATE: Duration = Duration::from_millis(500);

/// The service for workers; cheap to clone.
#[derive(Debug, Clone)]
pub struct ClusterService {
    commands: mpsc::Sender<Command>,
    secret: Secret,
    heartbeat_timeout: Duration,
    /// Where orders are put down, by one at a time, so that the last state is what stands there; none: they end with this leader.
    book: Option<Arc<Mutex<OrderBook>>>,
}

impl ClusterService {
    pub(crate) fn new(
        config: &CoordinatorConfig,
        book: Option<OrderBook>,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        Self {
            commands,
            secret: config.secret.clone(),
            heartbeat_timeout: config.heartbeat_timeout,
            book: book.map(|book| Arc::new(Mutex::new(book))),
        }
    }

    /// The service as tonic's server takes it.
    pub fn into_server(self) -> ClusterServer<Self> {
        ClusterServer::new(self).max_decoding_message_size(WORKER_MESSAGE_LIMIT)
    }

    /// A Join stream from its first message to its end.
    async fn serve_worker(self, mut up: Streaming<WorkerMessage>, down: JoinSender) {
        let welcomed = match timeout(HANDSHAKE_TIMEOUT, self.welcome(&mut up, &down)).await {
            Ok(welcomed) => welcomed,
            Err(_) => Err(Status::deadline_exceeded("the handshake took too long")),
        };
        let worker = match welcomed {
            Ok(worker) => worker,
            Err(status) => {
                warn!(reason = status.message(), "refused a worker");
                let _ = down.send(Err(status));
                return;
            }
        };
        let reason = self.listen(worker, &mut up).await;
        // The leader outlives every stream, unless all is ending.
        let _ = self.commands.send(Command::Left { worker, reason: reason.clone() }).await;
        let _ = down.send(Err(Status::aborted(reason)));
    }

    /// Both sides prove that they know the secret; then the leader takes the worker in.
    async fn welcome(
        &self,
        up: &mut Streaming<WorkerMessage>,
        down: &JoinSender,
    ) -> Result<WorkerId, Status> {
        let Up::Hello(hello) = receive(up).await? else { return Err(unexpected("hello")) };
        let Hello {
            protocol,
            nonce: theirs,
            collective_address,
            host,
            model,
            resources,
            facts,
            probe_address,
        } = hello;
        check_protocol("worker", protocol)?;
        let theirs = nonce("hello.nonce", &theirs).map_err(invalid)?;
        let address = convert::text("hello.collective_address", collective_address).map_err(invalid)?;
        let host = convert::text("hello.host", host).map_err(invalid)?;
        let model =
            convert::present("hello.model", model).and_then(ModelReport::try_from).map_err(invalid)?;
        let resources =
            convert::present("hello.resources", resources).and_then(Resources::try_from).map_err(invalid)?;
        let facts = facts.map(Facts::try_from).transpose().map_err(invalid)?.unwrap_or_default();
        let probe_address = convert::text("hello.probe_address", probe_address).map_err(invalid)?;

        let ours = Nonce::random();
        let session = Session::new(self.secret.clone(), theirs, ours);
        let challenge = Challenge { nonce: ours.0.to_vec().into(), proof: session.coordinator_proof() };
        let message = Some(coordinator_message::Message::Challenge(challenge));
        let _ = down.send(Ok(CoordinatorMessage { message }));
        let Up::Proof(proof) = receive(up).await? else { return Err(unexpected("proof")) };
        if !session.verify_worker(&proof) {
            return Err(Status::unauthenticated(format!(
                "the worker on {host} does not know the cluster's secret"
            )));
        }
        let (reply, answer) = oneshot::channel();
        let down = down.clone();
        let newcomer = Box::new(Newcomer { address, host, report: model, resources });
        let introduction = Box::new(Introduction { facts, probe_address });
        self.send(Command::Join { newcomer, introduction, session, down, reply }).await?;
        answer.await.map_err(|_| stopped())?
    }

    /// Passes on what a worker sends until it falls silent; returns how that showed.
    async fn listen(&self, worker: WorkerId, up: &mut Streaming<WorkerMessage>) -> String {
        loop {
            let began = clock::now();
            let message = match timeout(self.heartbeat_timeout, receive(up)).await {
                Ok(Ok(message)) => message,
                Ok(Err(status)) => return status.message().to_owned(),
                // A timer that fires late tells that this process was held up, not the worker.
                Err(_) if clock::now().saturating_duration_since(began) > self.heartbeat_timeout + LATE => {
                    continue;
                }
                Err(_) => return format!("no heartbeat for {:?}", self.heartbeat_timeout),
            };
            let command = match command(worker, message) {
                Ok(command) => command,
                Err(malformed) => return malformed.to_string(),
            };
            if self.commands.send(command).await.is_err() {
                return stopped().message().to_owned();
            }
        }
    }

    /// Passes on the outputs of one epoch until the stream ends.
    async fn collect(self, worker: WorkerId, epoch: Epoch, mut up: Streaming<StepReply>) {
        let reason = loop {
            let output = match up.message().await {
                Ok(Some(StepReply { message: Some(step_reply::Message::Output(output)) })) => output,
                Ok(Some(_)) => break unexpected("output").message().to_owned(),
                Ok(None) => {
                    // Why, it says on the Join stream, maybe that another rank is to blame; the streams are not in step.
                    sleep(self.heartbeat_timeout).await;
                    break "it closed its Steps stream".to_owned();
                }
                Err(status) => break status.message().to_owned(),
            };
            let command = match StepOutput::try_from(output) {
                Ok(output) => Command::Output { worker, epoch, output },
                Err(malformed) => break malformed.to_string(),
            };
            if self.commands.send(command).await.is_err() {
                return;
            }
        };
        // Of no consequence if the epoch is over.
        let _ = self.commands.send(Command::Failed { worker, epoch, reason, at_member: None }).await;
    }

    async fn send(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| stopped())
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    type JoinStream = UnboundedReceiverStream<Result<CoordinatorMessage, Status>>;
    type StepsStream = ReceiverStream<Result<StepFrame, Status>>;
    type OperateStream = ReceiverStream<Result<OperatorReply, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let (down, messages) = mpsc::unbounded_channel();
        tokio::spawn(self.clone().serve_worker(request.into_inner(), down));
        Ok(Response::new(UnboundedReceiverStream::new(messages)))
    }

    async fn steps(
        &self,
        request: Request<Streaming<StepReply>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let mut up = request.into_inner();
        let first = timeout(HANDSHAKE_TIMEOUT, up.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("nothing attached in time"))??;
        let Some(StepReply { message: Some(step_reply::Message::Attach(attach)) }) = first else {
            return Err(unexpected("attach"));
        };
        let worker = WorkerId(attach.worker_id);
        let epoch = convert::epoch("attach.epoch", attach.epoch).map_err(invalid)?;
        let (plans, frames) = mpsc::channel(PLANS_BUFFERED);
        let (reply, answer) = oneshot::channel();
        self.send(Command::Attach { worker, epoch, proof: attach.proof, plans, reply }).await?;
        answer.await.map_err(|_| stopped())??;
        tokio::spawn(self.clone().collect(worker, epoch, up));
        Ok(Response::new(ReceiverStream::new(frames)))
    }

    async fn operate(
        &self,
        request: Request<Streaming<OperatorMessage>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        let (down, replies) = mpsc::channel(operate::REPLIES);
        tokio::spawn(self.clone().serve_operator(request.into_inner(), down));
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

fn check_protocol(whose: &str, protocol: u32) -> Result<(), Status> {
    if protocol == PROTOCOL {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "the coordinator speaks protocol {PROTOCOL}, the {whose} protocol {protocol}: run the same version on both"
    )))
}

/// The next message of a worker; its end is an error.
async fn receive(up: &mut Streaming<WorkerMessage>) -> Result<Up, Status> {
    match up.message().await? {
        Some(WorkerMessage { message: Some(message) }) => Ok(message),
        Some(WorkerMessage { message: None }) => {
            Err(Status::invalid_argument("malformed message: it is empty"))
        }
        None => Err(Status::cancelled("it closed its Join stream")),
    }
}

/// What a welcome worker's message means for the leader.
fn command(worker: WorkerId, message: Up) -> Result<Command, Malformed> {
    match message {
        Up::Heartbeat(heartbeat) => Ok(Command::Heartbeat { worker, progress: Progress::from(heartbeat) }),
        Up::Ready(ready) => {
            let epoch = convert::epoch("ready.epoch", ready.epoch)?;
            let steps = ready.steps_in_flight;
            let allowed = (1..=MAX_STEPS_IN_FLIGHT).contains(&steps);
            convert::check("ready.steps_in_flight", allowed, "is out of range")?;
            let limit = |rows: u32| (rows > 0).then_some(rows);
            let capacity = Capacity {
                kv_blocks: ready.kv_blocks,
                steps_in_flight: steps,
                step_rows: limit(ready.step_rows),
                sampled_rows: limit(ready.sampled_rows),
            };
            let loading = Duration::from_micros(ready.load_micros);
            Ok(Command::Ready { worker, epoch, capacity, loading, bytes: ready.loaded_bytes })
        }
        Up::Failed(failed) => Ok(Command::Failed {
            worker,
            epoch: convert::epoch("failed.epoch", failed.epoch)?,
            reason: convert::text("failed.reason", failed.reason)?,
            at_member: failed.at_member.map(|rank| rank as usize),
        }),
        Up::Findings(findings) => Ok(Command::Findings { worker, findings: Findings::try_from(findings)? }),
        Up::Hello(_) => Err(Malformed { field: "hello", problem: "came twice".into() }),
        Up::Proof(_) => Err(Malformed { field: "proof", problem: "came twice".into() }),
    }
}

fn invalid(malformed: Malformed) -> Status {
    Status::invalid_argument(malformed.to_string())
}

fn unexpected(wanted: &str) -> Status {
    Status::invalid_argument(format!("malformed message: {wanted} was expected"))
}

fn stopped() -> Status {
    Status::unavailable("the coordinator has stopped")
}

#[cfg(test)]
mod tests {
    use cluster::proto::Ready;

    use super::*;

    #[test]
    fn a_false_number_of_steps_in_flight_is_named() {
        for steps_in_flight in [0, MAX_STEPS_IN_FLIGHT + 1, u32::MAX] {
            let epoch = Some(Epoch::default().into());
            let ready = Ready { epoch, kv_blocks: 1, weight_bytes: 1, steps_in_flight, ..Ready::default() };
            let malformed = command(WorkerId(1), Up::Ready(ready)).expect_err("out of range");
            assert_eq!(malformed.field, "ready.steps_in_flight");
        }
    }
}

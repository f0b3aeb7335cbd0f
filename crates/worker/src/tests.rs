//! A worker against a coordinator that the test plays, message by message.

mod examined;
mod fake;
mod faults;
mod held;
mod leaders;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::proof::nonce;
use cluster::proto::cluster_server::{Cluster, ClusterServer};
use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{
    Challenge, CoordinatorMessage, OperatorMessage, OperatorReply, Ready, StepFrame, StepReply, Welcome,
    WorkerMessage, step_reply,
};
use cluster::registry::{ClusterName, LEASE, MemoryRegistry, Registry, Transaction};
use cluster::{
    Activity, Assignment, Member, ModelReport, PROTOCOL, Progress, Resources, Session, StageMembers,
    WorkerId, encode_plan,
};
use engine::{
    BlockId, Epoch, MemoryNeeds, SampledToken, SeqId, SeqSlice, SlotId, StepId, StepOutput, StepPlan, Tokens,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use self::fake::{FakeLoad, UNIT_BYTES};
use crate::doctor::Examinee;
use crate::join::Identity;
use crate::load::Load;
use crate::whereabouts::Whereabouts;
use crate::{Coordinators, WorkerError, serve};

/// How often a heartbeat is asked for.
const BEAT_MILLIS: u32 = 20;

/// The coordinator's end of a stream.
struct Wire<U, D> {
    up: Streaming<U>,
    down: mpsc::Sender<Result<D, Status>>,
}

type JoinWire = Wire<WorkerMessage, CoordinatorMessage>;
type StepsWire = Wire<StepReply, StepFrame>;

/// Hands every stream to the test.
struct Hand {
    joins: mpsc::Sender<JoinWire>,
    steps: mpsc::Sender<StepsWire>,
}

#[tonic::async_trait]
impl Cluster for Hand {
    type OperateStream = ReceiverStream<Result<OperatorReply, Status>>;
    type JoinStream = ReceiverStream<Result<CoordinatorMessage, Status>>;
    type StepsStream = ReceiverStream<Result<StepFrame, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let (down, messages) = mpsc::channel(16);
        self.joins.send(Wire { up: request.into_inner(), down }).await.expect("the test runs");
        Ok(Response::new(ReceiverStream::new(messages)))
    }

    async fn steps(
        &self,
        request: Request<Streaming<StepReply>>,
    ) -> Result<Response<Self::StepsStream>, Status> {
        let (down, frames) = mpsc::channel(16);
        self.steps.send(Wire { up: request.into_inner(), down }).await.expect("the test runs");
        Ok(Response::new(ReceiverStream::new(frames)))
    }

    async fn operate(
        &self,
        _: Request<Streaming<OperatorMessage>>,
    ) -> Result<Response<Self::OperateStream>, Status> {
        Err(Status::unimplemented("this is about workers"))
    }
}

struct Scene {
    secret: Secret,
    joins: mpsc::Receiver<JoinWire>,
    steps: mpsc::Receiver<StepsWire>,
    worker: JoinHandle<Result<(), WorkerError>>,
}

impl Scene {
    async fn start(load: impl Load) -> Self {
        let secret = Secret::random();
        let (address, mut scene) = Self::without_worker(&secret).await;
        let identity = identity(&address, &secret).await;
        scene.worker = tokio::spawn(async move { serve(&identity, load).await });
        scene
    }

    /// A coordinator, and where it listens.
    async fn without_worker(secret: &Secret) -> (String, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (joins, joins_receiver) = mpsc::channel(4);
        let (steps, steps_receiver) = mpsc::channel(4);
        let server =
            tonic::transport::Server::builder().add_service(ClusterServer::new(Hand { joins, steps }));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let worker = tokio::spawn(std::future::pending());
        let scene = Self { secret: secret.clone(), joins: joins_receiver, steps: steps_receiver, worker };
        (address.to_string(), scene)
    }

    async fn join(&mut self) -> JoinWire {
        self.joins.recv().await.expect("the worker joins")
    }

    /// Up to the challenge, proven with `secret`.
    async fn challenge(&mut self, secret: &Secret) -> (JoinWire, Session) {
        let mut wire = self.join().await;
        let Up::Hello(hello) = wire.hear().await else { panic!("no hello") };
        assert_eq!(hello.protocol, PROTOCOL);
        let ours = Nonce::random();
        let session = Session::new(secret.clone(), nonce("nonce", &hello.nonce).expect("a nonce"), ours);
        let challenge = Challenge { nonce: ours.0.to_vec().into(), proof: session.coordinator_proof() };
        wire.say(Down::Challenge(challenge)).await;
        (wire, session)
    }

    async fn welcome(&mut self) -> (JoinWire, Session) {
        let secret = self.secret.clone();
        let (mut wire, session) = self.challenge(&secret).await;
        let Up::Proof(proof) = wire.hear().await else { panic!("no proof") };
        assert!(session.verify_worker(&proof));
        wire.say(Down::Welcome(Welcome { worker_id: 5, heartbeat_millis: BEAT_MILLIS })).await;
        (wire, session)
    }

    async fn attached(&mut self, session: &Session, counter: u64) -> StepsWire {
        let mut wire = self.steps.recv().await.expect("the worker attaches");
        let Some(step_reply::Message::Attach(attach)) = wire.up.message().await.unwrap().unwrap().message
        else {
            panic!("no attach")
        };
        assert!(session.verify_attach(WorkerId(5), epoch(counter), &attach.proof));
        wire
    }

    async fn end(self) -> WorkerError {
        self.worker.await.expect("no panic").expect_err("an error")
    }
}

impl JoinWire {
    async fn hear(&mut self) -> Up {
        loop {
            let message = self.up.message().await.expect("no status").expect("a message").message;
            match message.expect("a known message") {
                Up::Heartbeat(_) => {}
                message => return message,
            }
        }
    }

    /// Waits for a heartbeat that `wanted` agrees with.
    async fn beat(&mut self, wanted: impl Fn(&Progress) -> bool) -> Progress {
        loop {
            let message = self.up.message().await.expect("no status").expect("a message").message;
            if let Some(Up::Heartbeat(heartbeat)) = message {
                let progress = Progress::from(heartbeat);
                if wanted(&progress) {
                    return progress;
                }
            }
        }
    }

    async fn say(&self, message: Down) {
        self.down.send(Ok(CoordinatorMessage { message: Some(message) })).await.expect("the worker listens");
    }

    async fn assign(&self, counter: u64) {
        self.assign_epoch(epoch(counter)).await;
    }

    async fn assign_epoch(&self, epoch: Epoch) {
        self.assign_units(epoch, 0..4).await;
    }

    /// An assignment of these units; others have the rest.
    async fn assign_units(&self, epoch: Epoch, units: Range<usize>) {
        let ranges =
            [0..units.start, units.clone(), units.end..4].into_iter().filter(|units| units.start < units.end);
        let members: Vec<_> = ranges.map(|units| Member { address: "here:1".into(), units }).collect();
        let rank = members.iter().take_while(|member| member.units != units).count();
        let stages = vec![StageMembers { layers: 0..2, members }];
        let assignment = Assignment { epoch, group: "fake".into(), stage: 0, rank, stages };
        self.say(Down::Assignment(assignment.into())).await;
    }

    async fn ready(&mut self, counter: u64) {
        self.ready_for(counter, 1).await;
    }

    async fn ready_for(&mut self, counter: u64, steps_in_flight: u32) {
        let Up::Ready(ready) = self.hear().await else { panic!("it is not ready") };
        let expected = Ready {
            epoch: Some(epoch(counter).into()),
            kv_blocks: 17,
            weight_bytes: 1 << 40,
            // How long it took is not for a test to say.
            connect_micros: ready.connect_micros,
            load_micros: ready.load_micros,
            steps_in_flight,
            step_rows: 40,
            sampled_rows: 9,
            // See `held`.
            loaded_bytes: ready.loaded_bytes,
        };
        assert_eq!(ready, expected);
    }

    /// How many units were read when it is ready.
    async fn loaded_units(&mut self, epoch: Epoch) -> u64 {
        let Up::Ready(ready) = self.hear().await else { panic!("it is not ready") };
        assert_eq!(ready.epoch, Some(epoch.into()));
        ready.loaded_bytes / UNIT_BYTES
    }
}

impl StepsWire {
    async fn plan(&self, counter: u64, step: u64) {
        let frame = StepFrame { plan: encode_plan(&plan(counter, step)) };
        self.down.send(Ok(frame)).await.expect("the worker listens");
    }

    async fn output(&mut self, counter: u64, step: u64) {
        let reply = self.up.message().await.expect("no status").expect("a reply");
        let tokens = vec![SampledToken { seq: SeqId(3), id: 9, logprob: 0.0 }];
        let output = StepOutput { epoch: epoch(counter), step: StepId(step), tokens };
        assert_eq!(reply.message, Some(step_reply::Message::Output(output.into())));
    }
}

async fn identity(coordinator: &str, secret: &Secret) -> Identity {
    Identity {
        coordinator: coordinator.into(),
        secret: secret.clone(),
        collective_address: "here:1".into(),
        host: "here".into(),
        report: ModelReport {
            name: "fake".into(),
            vocabulary: 10,
            max_context: 10,
            units: 4,
            block_size: 16,
            eos: vec![],
            fingerprint: "fake".into(),
            needs: MemoryNeeds { layers: 1, ..MemoryNeeds::default() },
        },
        resources: Resources { zone: "here".into(), device: "cpu".into(), memory: 1, kv_memory: 1 },
        join_timeout: Duration::from_secs(10),
        examinee: Examinee::of_test(secret).await,
    }
}

fn epoch(counter: u64) -> Epoch {
    Epoch { term: 1, counter }
}

fn plan(counter: u64, step: u64) -> StepPlan {
    let slice = SeqSlice {
        seq: SeqId(3),
        slot: SlotId(0),
        start: 9,
        tokens: Tokens::Ids(vec![1]),
        blocks: vec![BlockId(0)],
        sampling: None,
    };
    StepPlan { epoch: epoch(counter), step: StepId(step), keep_sampled: false, slices: vec![slice] }
}

#[tokio::test]
async fn plans_of_the_own_epoch_are_run() {
    let mut scene = Scene::start(FakeLoad::default()).await;
    let (mut wire, session) = scene.welcome().await;
    wire.assign(1).await;
    wire.ready(1).await;
    let mut steps = scene.attached(&session, 1).await;
    steps.plan(0, 0).await;
    steps.plan(1, 1).await;
    steps.output(1, 1).await;
}

#[tokio::test]
async fn a_step_begins_while_the_one_before_it_runs() {
    let mut scene = Scene::start(FakeLoad { ahead: true, ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    for counter in 1..4 {
        wire.assign(counter).await;
        wire.ready_for(counter, 2).await;
        let mut steps = scene.attached(&session, counter).await;
        // All at once, and one by one.
        for step in 0..3 {
            steps.plan(counter, step).await;
        }
        for step in 0..6 {
            steps.output(counter, step).await;
            if step > 0 {
                steps.plan(counter, step + 2).await;
            }
        }
        // The seventh step is in flight, and will not end: leaving does not wait for it.
        wire.say(Down::Abandon(epoch(counter).into())).await;
    }
}

#[tokio::test]
async fn an_abandoned_group_is_left_before_the_next_begins() {
    let mut scene = Scene::start(FakeLoad { stuck: true, ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    for counter in 1..4 {
        wire.assign(counter).await;
        wire.ready(counter).await;
        let steps = scene.attached(&session, counter).await;
        steps.plan(counter, 0).await;
        wire.say(Down::Abandon(epoch(counter).into())).await;
        // An epoch that is over does not begin again.
        wire.assign(counter).await;
    }
}

#[tokio::test]
async fn heartbeats_go_on_and_tell_what_a_stuck_thread_does() {
    let mut scene = Scene::start(FakeLoad { stuck: true, ..FakeLoad::default() }).await;
    let (mut wire, session) = scene.welcome().await;
    assert_eq!(wire.beat(|_| true).await, Progress::default());
    wire.assign(1).await;
    let held = 4 * UNIT_BYTES;
    let idle = Progress { epoch: Some(epoch(1)), held, ..Progress::default() };
    assert_eq!(
        wire.beat(|progress| progress.epoch.is_some() && progress.activity == Activity::Idle).await,
        idle
    );
    let steps = scene.attached(&session, 1).await;
    steps.plan(1, 7).await;
    let computing = Progress { step: Some(StepId(7)), activity: Activity::Computing, ..idle };
    assert_eq!(wire.beat(|progress| progress.activity == Activity::Computing).await, computing);
    wire.say(Down::Abandon(epoch(1).into())).await;
    let left = Progress { held, ..Progress::default() };
    assert_eq!(wire.beat(|progress| progress.epoch.is_none()).await, left);
}

#[tokio::test]
async fn a_failure_names_the_rank_that_it_is_due_to() {
    let lost = comm::Error::Lost { rank: 3, source: std::io::ErrorKind::ConnectionReset.into() };
    let failures = Mutex::new(vec![model::Error::Collective(lost)]);
    let mut scene = Scene::start(FakeLoad { failures, ..FakeLoad::default() }).await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign(1).await;
    let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
    assert_eq!(failed.at_member, Some(3));
}

#[tokio::test]
async fn a_share_that_does_not_load_ends_the_worker() {
    let failures = Mutex::new(vec![model::Error::Option("no room".into())]);
    let mut scene = Scene::start(FakeLoad { failures, ..FakeLoad::default() }).await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign(1).await;
    let Up::Failed(failed) = wire.hear().await else { panic!("it did not fail") };
    assert_eq!(failed.reason, "no room");
    drop(wire);
    assert!(matches!(scene.end().await, WorkerError::Load(model::Error::Option(_))));
}

#[tokio::test]
async fn a_collective_that_does_not_form_is_tried_again() {
    let aborted = || model::Error::Collective(comm::Error::Aborted);
    let failures = Mutex::new(vec![aborted(), aborted()]);
    let mut scene = Scene::start(FakeLoad { failures, ..FakeLoad::default() }).await;
    let (mut wire, _) = scene.welcome().await;
    wire.assign(1).await;
    assert!(matches!(wire.hear().await, Up::Failed(_)));
    // The coordinator knew already: it has the next assignment ready.
    wire.assign(2).await;
    assert!(matches!(wire.hear().await, Up::Failed(_)));
    // It did not: the worker is sent away, and joins again.
    wire.down.send(Err(Status::aborted("it failed"))).await.expect("the worker listens");
    let (mut wire, _) = scene.welcome().await;
    wire.assign(3).await;
    wire.ready(3).await;
}

//! A worker that speaks the protocol and, instead of a model, hashes what its KV blocks hold.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::doctor::{Examine, Facts, Findings};
use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{
    Attach, CoordinatorMessage, Failed, Hello, Ready, StepFrame, StepReply, WorkerMessage, step_reply,
};
use cluster::{
    Activity, Assignment, ModelReport, PROTOCOL, Progress, Resources, Session, WorkerId, decode_plan,
};
use engine::{Epoch, MemoryNeeds, SampledToken, SeqSlice, SlotId, StepOutput, StepPlan, Tokens};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

pub(crate) const VOCABULARY: u32 = 1000;
pub(crate) const BLOCK_SIZE: u32 = 4;

/// What the workers here serve.
pub(crate) fn report() -> ModelReport {
    ModelReport {
        name: "fake".into(),
        vocabulary: VOCABULARY,
        max_context: 400,
        units: 4,
        block_size: BLOCK_SIZE,
        eos: vec![],
        fingerprint: "fake-f32".into(),
        needs: MemoryNeeds { layers: 1, ..MemoryNeeds::default() },
    }
}

fn resources() -> Resources {
    Resources { zone: String::new(), device: "cpu".into(), memory: 1 << 30, kv_memory: 1 << 30 }
}

/// The token that follows `prefix`.
pub(crate) fn next_token(prefix: &[u32]) -> u32 {
    prefix.iter().fold(7u32, |hash, id| (hash ^ id).wrapping_mul(0x9E37_79B1).rotate_left(5)) % VOCABULARY
}

/// What a request is answered.
pub(crate) fn continuation(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(next_token(&tokens));
    }
    tokens.split_off(prompt.len())
}

/// How a fake worker behaves.
#[derive(Debug, Clone)]
pub(crate) struct Fake {
    pub(crate) secret: Secret,
    pub(crate) protocol: u32,
    pub(crate) report: ModelReport,
    pub(crate) address: String,
    /// What it tells of itself, and where it answers probes.
    pub(crate) facts: Facts,
    pub(crate) probe_address: String,
    /// What it finds when it is examined; nothing: it does not answer.
    pub(crate) finds: Option<fn(Examine) -> Findings>,
    pub(crate) heartbeats: bool,
    /// Every output is preceded by a false one of another epoch.
    pub(crate) stale_outputs: bool,
    /// Says this instead of loading.
    pub(crate) load_failure: Option<String>,
    /// Steps that it takes before it has answered the first of them.
    pub(crate) steps_in_flight: u32,
    /// In the first epoch, steps from this one on are not answered.
    pub(crate) hold_from: Option<u64>,
    /// Not only in the first epoch of its coordinator.
    pub(crate) holds_always: bool,
    /// In the first epoch, it hangs in this step and all later ones; other ranks wait for it.
    pub(crate) hangs: Option<(usize, u64)>,
    /// In the first epoch, it says at this step that it lost that rank.
    pub(crate) accuses: Option<(u64, u32)>,
    /// Added to every sampled id.
    pub(crate) distort: u32,
    /// Told of every plan.
    pub(crate) plans: Option<mpsc::UnboundedSender<StepPlan>>,
}

/// A running fake; dropping it cuts its connection.
pub(crate) struct Running(JoinSet<Status>);

impl Running {
    /// How its membership ends.
    pub(crate) async fn end(mut self) -> Status {
        self.0.join_next().await.expect("one task").expect("no panic")
    }
}

struct Member {
    fake: Fake,
    id: WorkerId,
    session: Session,
    service: ClusterClient<Channel>,
    up: mpsc::Sender<WorkerMessage>,
    down: Streaming<CoordinatorMessage>,
    steps: Option<(mpsc::Sender<StepReply>, Streaming<StepFrame>)>,
    rank: usize,
    progress: Progress,
    /// Token ids by block and offset.
    kv: HashMap<(u32, u32), u32>,
    /// By slot, of this epoch.
    last_sampled: HashMap<SlotId, u32>,
}

impl Fake {
    pub(crate) fn new(secret: &Secret, address: &str) -> Self {
        Self {
            secret: secret.clone(),
            protocol: PROTOCOL,
            report: report(),
            address: address.into(),
            facts: Facts::default(),
            probe_address: String::new(),
            finds: None,
            heartbeats: true,
            stale_outputs: false,
            load_failure: None,
            steps_in_flight: 1,
            hold_from: None,
            holds_always: false,
            hangs: None,
            accuses: None,
            distort: 0,
            plans: None,
        }
    }

    /// Joins and takes part until it is dropped or sent away.
    pub(crate) fn start(self, coordinator: SocketAddr) -> Running {
        let mut task = JoinSet::new();
        task.spawn(async move {
            let outcome = async { self.join(coordinator).await?.serve().await };
            outcome.await.err().unwrap_or_else(|| Status::ok("the stream ended"))
        });
        Running(task)
    }

    async fn join(self, coordinator: SocketAddr) -> Result<Member, Status> {
        let mut service = ClusterClient::connect(format!("http://{coordinator}"))
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let (up, messages) = mpsc::channel(16);
        let ours = Nonce::random();
        let hello = Hello {
            protocol: self.protocol,
            nonce: ours.0.to_vec().into(),
            collective_address: self.address.clone(),
            host: "here".into(),
            model: Some(self.report.clone().into()),
            resources: Some(resources().into()),
            facts: Some(self.facts.clone().into()),
            probe_address: self.probe_address.clone(),
        };
        send(&up, Up::Hello(hello)).await;
        let mut down = service.join(ReceiverStream::new(messages)).await?.into_inner();
        let Down::Challenge(challenge) = receive(&mut down).await? else { panic!("no challenge") };
        let theirs = Nonce(challenge.nonce.as_ref().try_into().expect("a nonce"));
        let session = Session::new(self.secret.clone(), ours, theirs);
        send(&up, Up::Proof(session.worker_proof())).await;
        let Down::Welcome(welcome) = receive(&mut down).await? else { panic!("no welcome") };
        let id = WorkerId(welcome.worker_id);
        Ok(Member {
            fake: self,
            id,
            session,
            service,
            up,
            down,
            steps: None,
            rank: 0,
            progress: Progress::default(),
            kv: HashMap::new(),
            last_sampled: HashMap::new(),
        })
    }
}

impl Member {
    async fn serve(mut self) -> Result<(), Status> {
        let mut beats = tokio::time::interval(Duration::from_millis(50));
        loop {
            let steps = &mut self.steps;
            let frame = async {
                match steps {
                    Some((_, frames)) => frames.message().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                message = receive(&mut self.down) => self.obey(message?).await?,
                frame = frame => match frame? {
                    Some(frame) => self.step(decode_plan(frame.plan).expect("a plan")).await,
                    None => self.steps = None,
                },
                _ = beats.tick(), if self.fake.heartbeats => {
                    send(&self.up, Up::Heartbeat(self.progress.into())).await;
                }
            }
        }
    }

    async fn obey(&mut self, message: Down) -> Result<(), Status> {
        if let Down::Examine(examine) = message {
            if let Some(finds) = self.fake.finds {
                let findings = finds(examine.try_into().expect("an examination"));
                send(&self.up, Up::Findings(findings.into())).await;
            }
            return Ok(());
        }
        self.steps = None;
        self.progress = Progress::default();
        let Down::Assignment(assignment) = message else { return Ok(()) };
        let Assignment { epoch, rank, .. } = Assignment::try_from(assignment).expect("an assignment");
        if let Some(reason) = self.fake.load_failure.clone() {
            send(&self.up, Up::Failed(Failed { epoch: Some(epoch.into()), reason, at_member: None })).await;
            return Ok(());
        }
        self.rank = rank;
        self.kv.clear();
        self.last_sampled.clear();
        self.progress.epoch = Some(epoch);
        let ready = Ready {
            epoch: Some(epoch.into()),
            kv_blocks: 100,
            weight_bytes: 1,
            connect_micros: 1000,
            load_micros: 2000,
            steps_in_flight: self.fake.steps_in_flight,
            step_rows: 0,
            sampled_rows: 0,
            loaded_bytes: 1,
        };
        send(&self.up, Up::Ready(ready)).await;
        let (outputs, replies) = mpsc::channel(4);
        let proof = self.session.attach_proof(self.id, epoch);
        let attach = Attach { worker_id: self.id.0, epoch: Some(epoch.into()), proof };
        reply(&outputs, step_reply::Message::Attach(attach)).await;
        match self.service.steps(ReceiverStream::new(replies)).await {
            Ok(frames) => self.steps = Some((outputs, frames.into_inner())),
            Err(status) if status.code() == tonic::Code::FailedPrecondition => {}
            Err(status) => return Err(status),
        }
        Ok(())
    }

    async fn step(&mut self, plan: StepPlan) {
        if let Some(plans) = &self.fake.plans {
            plans.send(plan.clone()).expect("the test listens");
        }
        if plan.epoch.counter == 1 && self.hang_or_accuse(&plan).await {
            return;
        }
        self.progress.step = Some(plan.step);
        let tokens: Vec<_> = plan.slices.iter().filter_map(|slice| self.run(slice)).collect();
        let holds = plan.epoch.counter == 1 || self.fake.holds_always;
        let held = self.fake.hold_from.is_some_and(|step| holds && plan.step.0 >= step);
        let (0, false, Some((outputs, _))) = (self.rank, held, &self.steps) else { return };
        if self.fake.stale_outputs {
            let epoch = Epoch { counter: plan.epoch.counter - 1, ..plan.epoch };
            let tokens = tokens.iter().map(|token| SampledToken { id: token.id ^ 1, ..*token }).collect();
            let stale = StepOutput { epoch, step: plan.step, tokens };
            reply(outputs, step_reply::Message::Output(stale.into())).await;
        }
        let output = StepOutput { epoch: plan.epoch, step: plan.step, tokens };
        reply(outputs, step_reply::Message::Output(output.into())).await;
    }

    /// Whether the step goes no further than this.
    async fn hang_or_accuse(&mut self, plan: &StepPlan) -> bool {
        if let Some((step, rank)) = self.fake.accuses
            && plan.step.0 == step
        {
            // As workers do that leave their group, and on its own stream: the coordinator may hear of this first.
            self.steps = None;
            let reason = format!("lost rank {rank}");
            let failed = Failed { epoch: Some(plan.epoch.into()), reason, at_member: Some(rank) };
            send(&self.up, Up::Failed(failed)).await;
            return true;
        }
        let Some((culprit, step)) = self.fake.hangs.filter(|(_, step)| plan.step.0 >= *step) else {
            return false;
        };
        debug_assert!(plan.step.0 == step, "no step follows");
        self.progress.step = Some(plan.step);
        self.progress.activity = Activity::Computing;
        self.progress.waits_for = (self.rank != culprit).then_some(culprit);
        true
    }

    /// Writes a slice into the blocks, and hashes everything up to its end.
    fn run(&mut self, slice: &SeqSlice) -> Option<SampledToken> {
        let place = |position: u32| (slice.blocks[(position / BLOCK_SIZE) as usize].0, position % BLOCK_SIZE);
        let ids = match &slice.tokens {
            Tokens::Ids(ids) => ids.clone(),
            Tokens::LastSampled => vec![self.last_sampled[&slice.slot]],
        };
        for (position, id) in (slice.start..).zip(ids) {
            self.kv.insert(place(position), id);
        }
        slice.sampling.map(|sampling| {
            let prefix: Vec<u32> = (0..sampling.position).map(|position| self.kv[&place(position)]).collect();
            let id = next_token(&prefix);
            self.last_sampled.insert(slice.slot, id);
            SampledToken { seq: slice.seq, id: id + self.fake.distort, logprob: -1.0 }
        })
    }
}

async fn send(up: &mpsc::Sender<WorkerMessage>, message: Up) {
    let _ = up.send(WorkerMessage { message: Some(message) }).await;
}

async fn reply(outputs: &mpsc::Sender<StepReply>, message: step_reply::Message) {
    let _ = outputs.send(StepReply { message: Some(message) }).await;
}

async fn receive(down: &mut Streaming<CoordinatorMessage>) -> Result<Down, Status> {
    let message = down.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))?;
    Ok(message.message.expect("a message"))
}

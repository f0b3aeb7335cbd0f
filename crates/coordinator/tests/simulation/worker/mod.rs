//! A worker without a model: it speaks the cluster's protocol, meets its group in every step as ranks do, and fails as it is told.

pub(crate) mod collective;
pub(crate) mod control;
pub(crate) mod executor;
pub(crate) mod line;
mod membership;
pub(crate) mod model;
mod rank;

use std::sync::Arc;
use std::time::Duration;

use auth::{Nonce, Secret};
use cluster::proof::nonce;
use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{CoordinatorMessage, Hello, WorkerMessage};
use cluster::registry::election::Leader;
use cluster::{ModelReport, PROTOCOL, Resources, Session, WorkerId};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::Status;

use crate::journal::Journal;
use collective::{Rooms, Vitals};
use control::Control;
use executor::Limits;
use line::{Dialer, Directory, Line};
use membership::{End, Membership};

/// One try, from connecting to being welcomed.
const TRY_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// After a failure that ends the process, somebody starts it again.
const RESTART: Duration = Duration::from_secs(1);

/// One process of a worker.
#[derive(Clone)]
pub(crate) struct Worker {
    pub(crate) address: String,
    pub(crate) secret: Secret,
    pub(crate) report: ModelReport,
    pub(crate) resources: Resources,
    pub(crate) limits: Limits,
    pub(crate) pace: Pace,
    pub(crate) dialer: Arc<dyn Dialer>,
    pub(crate) directory: Directory,
    pub(crate) rooms: Rooms,
    pub(crate) journal: Journal,
    pub(crate) control: Arc<Control>,
}

/// What it takes a worker to load, to run a step, and to run each of its rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) load: Duration,
    pub(crate) step: Duration,
    pub(crate) row: Duration,
}

/// A Join stream on which both sides have proven themselves.
struct Joined {
    leader: Leader,
    id: WorkerId,
    session: Session,
    line: Box<dyn Line>,
    up: mpsc::UnboundedSender<WorkerMessage>,
    down: line::Down<CoordinatorMessage>,
    heartbeat: Duration,
}

impl Worker {
    /// Joins whoever leads, and takes part, again and again.
    pub(crate) async fn run(self) {
        let mut latest_term = 0;
        let mut pause = FIRST_PAUSE;
        loop {
            self.control.stopped.pass().await;
            let joined = match self.directory.leader() {
                Some(leader) => match timeout(TRY_TIMEOUT, self.join(leader)).await {
                    Ok(joined) => joined.map_err(|status| status.to_string()),
                    Err(_) => Err("no answer".to_owned()),
                },
                None => Err("none leads".to_owned()),
            };
            match joined {
                Ok(joined) => {
                    self.journal.note(format_args!("{} joined as worker {}", self.address, joined.id));
                    pause = FIRST_PAUSE;
                    let end = Membership::new(&self, joined, &mut latest_term).serve().await;
                    self.journal.note(format_args!("{}: {end}", self.address));
                    if let End::Final(_) = end {
                        sleep(RESTART).await;
                    }
                }
                Err(reason) => {
                    self.journal.note(format_args!("{} has not joined: {reason}", self.address));
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn join(&self, leader: Leader) -> Result<Joined, Status> {
        let line = self.dialer.dial(&self.address, &leader.addresses.workers).await?;
        let (up, messages) = mpsc::unbounded_channel();
        let ours = Nonce::random();
        let hello = Hello {
            protocol: PROTOCOL,
            nonce: ours.0.to_vec().into(),
            collective_address: self.address.clone(),
            host: self.resources.zone.clone(),
            model: Some(self.report.clone().into()),
            resources: Some(self.resources.clone().into()),
            ..Hello::default()
        };
        send(&up, Up::Hello(hello));
        let mut down = line.join(messages).await?;
        let Down::Challenge(challenge) = receive(&mut down).await? else { return Err(unexpected()) };
        let theirs = nonce("challenge.nonce", &challenge.nonce).map_err(|_| unexpected())?;
        let session = Session::new(self.secret.clone(), ours, theirs);
        if !session.verify_coordinator(&challenge.proof) {
            return Err(Status::unauthenticated("the coordinator does not know the secret"));
        }
        send(&up, Up::Proof(session.worker_proof()));
        let Down::Welcome(welcome) = receive(&mut down).await? else { return Err(unexpected()) };
        let heartbeat = Duration::from_millis(welcome.heartbeat_millis.into());
        Ok(Joined { leader, id: WorkerId(welcome.worker_id), session, line, up, down, heartbeat })
    }
}

/// Says how the worker is, as long as it is not stopped.
async fn beat(
    up: mpsc::UnboundedSender<WorkerMessage>,
    every: Duration,
    vitals: Vitals,
    control: Arc<Control>,
) {
    let mut beats = interval(every);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        control.stopped.pass().await;
        send(&up, Up::Heartbeat(vitals.progress().into()));
    }
}

/// If the stream has ended, that shows on the way down.
fn send(up: &mpsc::UnboundedSender<WorkerMessage>, message: Up) {
    let _ = up.send(WorkerMessage { message: Some(message) });
}

async fn receive(down: &mut line::Down<CoordinatorMessage>) -> Result<Down, Status> {
    let message = down.recv().await.ok_or_else(|| Status::unavailable("the stream ended"))??;
    message.message.ok_or_else(unexpected)
}

fn unexpected() -> Status {
    Status::invalid_argument("another message was expected")
}

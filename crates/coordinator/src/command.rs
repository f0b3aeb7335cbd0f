//! What the leader is asked or told, by handles and by workers' streams.

use std::time::Duration;

use bytes::Bytes;
use cluster::doctor::Findings;
use cluster::proto::{ClusterStatus, CoordinatorMessage, StepFrame};
use cluster::registry::orders::StandingOrders;
use cluster::{MAX_STAGES, MAX_STEPS_IN_FLIGHT, Order, Progress, Session, WorkerId};
use engine::{Epoch, Request, StepOutput};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::api::{EngineError, Submission};
use crate::examination::{Examination, Introduction};
use crate::groups::{Capacity, Newcomer};

/// Plans on their way to one rank: as many steps as can be in flight, and a few that a rank which does not sample may be behind. One
/// that lets more pile up is broken.
pub(crate) const PLANS_BUFFERED: usize = MAX_STEPS_IN_FLIGHT as usize + MAX_STAGES + 4;

/// What a Join stream carries down. Unbounded: the leader writes a message or two for each epoch.
pub(crate) type JoinSender = mpsc::UnboundedSender<Result<CoordinatorMessage, Status>>;
/// What a Steps stream carries down.
pub(crate) type PlanSender = mpsc::Sender<Result<StepFrame, Status>>;

/// What the leader is asked or told.
#[derive(Debug)]
pub(crate) enum Command {
    /// From a handle: start a request.
    Submit {
        request: Request,
        /// Under which it began.
        fingerprint: Option<String>,
        reply: oneshot::Sender<Result<Submission, EngineError>>,
    },
    /// From an operator: what to change; the answer is for people.
    Operate { order: Order, reply: oneshot::Sender<Result<String, String>> },
    /// All orders that stand.
    StandingOrders { reply: oneshot::Sender<Result<StandingOrders, String>> },
    /// From an operator: examine all workers, even if that disturbs groups.
    Examine { disturb: bool, reply: oneshot::Sender<Result<Examination, String>> },
    /// A worker answers an examination.
    Findings { worker: WorkerId, findings: Findings },
    /// From a handle: how things stand.
    Status { reply: oneshot::Sender<ClusterStatus> },
    /// A worker has proven that it knows the secret.
    Join {
        newcomer: Box<Newcomer>,
        introduction: Box<Introduction>,
        session: Session,
        down: JoinSender,
        reply: oneshot::Sender<Result<WorkerId, Status>>,
    },
    /// It lives, and is so far.
    Heartbeat { worker: WorkerId, progress: Progress },
    /// It has loaded its share, which took so long, and for which it read so many bytes.
    Ready { worker: WorkerId, epoch: Epoch, capacity: Capacity, loading: Duration, bytes: u64 },
    /// It could not load, or not run a step, maybe because of another rank.
    Failed { worker: WorkerId, epoch: Epoch, reason: String, at_member: Option<usize> },
    /// Its Join stream has ended.
    Left { worker: WorkerId, reason: String },
    /// It opens a Steps stream.
    Attach {
        worker: WorkerId,
        epoch: Epoch,
        proof: Bytes,
        plans: PlanSender,
        reply: oneshot::Sender<Result<(), Status>>,
    },
    /// It answers a plan.
    Output { worker: WorkerId, epoch: Epoch, output: StepOutput },
}

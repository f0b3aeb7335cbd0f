//! One membership: assignments, plans and outputs, until the worker or the coordinator gives it up.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use cluster::doctor::Examine;
use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{Attach, CoordinatorMessage, Failed, Ready, StepFrame, StepReply, step_reply};
use cluster::{Assignment, MAX_STEPS_IN_FLIGHT, Part, decode_plan};
use engine::Epoch;
use model::Loaded;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use crate::WorkerError;
use crate::executor::{AbortOnDrop, EpochWork, ExecutorThread, Progress};
use crate::join::{Joined, is_refusal, send};

/// Outputs on their way up: more than there are steps in flight, so that nothing waits here.
const OUTPUTS_BUFFERED: usize = MAX_STEPS_IN_FLIGHT as usize;
/// How long a worker that leaves waits for the coordinator to take note.
const FAREWELL: Duration = Duration::from_secs(2);
/// Longer reasons are cut: the protocol limits them.
const REASON_CHARS: usize = 1000;

/// How a membership ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Joining again may help. `served`: a step was run in it.
    Again { reason: String, served: bool },
    /// It would not.
    Final(WorkerError),
}

/// Takes part until the end, which is also when the coordinator is `superseded`. `latest_term` is the highest term that any
/// coordinator had this worker serve in, before and after.
pub(crate) async fn serve(
    joined: Joined,
    thread: &ExecutorThread,
    latest_term: &mut u64,
    superseded: impl Future<Output = ()>,
) -> End {
    let superseded = pin!(superseded);
    let latest = Epoch::default();
    let mut membership = Membership {
        joined,
        thread,
        superseded,
        latest_term,
        latest,
        rank: None,
        preparing: None,
        served: false,
    };
    let end = loop {
        if let Err(end) = membership.advance().await {
            break end;
        }
    };
    membership.leave_group().await;
    end
}

struct Membership<'a, S> {
    joined: Joined,
    thread: &'a ExecutorThread,
    /// Ends when another coordinator leads.
    superseded: Pin<&'a mut S>,
    /// A coordinator of a lower term leads no more, whatever it thinks.
    latest_term: &'a mut u64,
    /// The highest epoch that was assigned: a lower one is not taken after it.
    latest: Epoch,
    rank: Option<Rank>,
    /// Without a rank: what is being loaded for one.
    preparing: Option<AbortOnDrop>,
    served: bool,
}

/// This worker's part in a group.
struct Rank {
    epoch: Epoch,
    assignment: Arc<Assignment>,
    work: EpochWork,
    /// Once the share is loaded.
    steps: Option<Steps>,
    /// The coordinator was told so; what comes now is the end of the epoch, and the coordinator says it.
    failed: bool,
}

struct Steps {
    outputs: mpsc::Sender<StepReply>,
    frames: Streaming<StepFrame>,
}

/// What a rank hears from either side.
enum Heard {
    Progress(Option<Progress>),
    Frame(Result<Option<StepFrame>, Status>),
}

impl Rank {
    async fn hear(&mut self) -> Heard {
        let Self { work, steps, failed, .. } = self;
        if *failed {
            return std::future::pending().await;
        }
        let frame = async {
            match steps {
                Some(steps) => steps.frames.message().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            progress = work.progress() => Heard::Progress(progress),
            frame = frame => Heard::Frame(frame),
        }
    }
}

impl<S: Future<Output = ()>> Membership<'_, S> {
    /// Waits for the next thing to happen, and does what it asks for.
    async fn advance(&mut self) -> Result<(), End> {
        let Self { joined, rank, superseded, .. } = self;
        let heard = async {
            match rank {
                Some(rank) => (rank.epoch, rank.hear().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = joined.down.message() => self.obey(message).await,
            () = superseded => Err(self.lost("another one leads now")),
            (epoch, heard) = heard => match heard {
                Heard::Progress(progress) => self.report(epoch, progress).await,
                Heard::Frame(frame) => {
                    self.plan(epoch, frame).await;
                    Ok(())
                }
            }
        }
    }

    /// A message of the coordinator.
    async fn obey(&mut self, message: Result<Option<CoordinatorMessage>, Status>) -> Result<(), End> {
        let message = match message {
            Ok(Some(CoordinatorMessage { message: Some(message) })) => message,
            Ok(Some(CoordinatorMessage { message: None })) => {
                return Err(self.lost("it sent an empty message"));
            }
            Ok(None) => return Err(self.lost("it closed the Join stream")),
            Err(status) if is_refusal(&status) => {
                return Err(End::Final(WorkerError::Refused(status.message().to_owned())));
            }
            Err(status) if status.code() == Code::Aborted => {
                let reason = format!("the coordinator sent this worker away: {}", status.message());
                return Err(End::Again { reason, served: self.served });
            }
            Err(status) => return Err(self.lost(status.message())),
        };
        match message {
            Down::Assignment(assignment) => match Assignment::try_from(assignment) {
                Ok(assignment) => self.take(assignment).await,
                Err(malformed) => Err(self.lost(&malformed.to_string())),
            },
            Down::Abandon(epoch) => {
                let epoch = Epoch::from(epoch);
                if self.rank.as_ref().is_some_and(|rank| rank.epoch == epoch) {
                    info!(%epoch, "the group is abandoned");
                    self.leave_group().await;
                }
                Ok(())
            }
            Down::Prepare(part) => match Part::try_from(part) {
                Ok(part) => {
                    if self.rank.is_none() {
                        // What was asked for before is not needed any more.
                        drop(self.preparing.take());
                        let vitals = self.joined.vitals.clone();
                        self.preparing = Some(self.thread.prepare(part, vitals));
                    }
                    Ok(())
                }
                Err(malformed) => Err(self.lost(&malformed.to_string())),
            },
            Down::Examine(examine) => match Examine::try_from(examine) {
                Ok(examine) => {
                    self.joined.examinee.clone().begin(examine, self.joined.up.downgrade());
                    Ok(())
                }
                Err(malformed) => Err(self.lost(&malformed.to_string())),
            },
            Down::Challenge(_) | Down::Welcome(_) => Err(self.lost("it repeated the handshake")),
        }
    }

    /// Begins with the group's next epoch.
    async fn take(&mut self, assignment: Assignment) -> Result<(), End> {
        let epoch = assignment.epoch;
        if epoch.term < *self.latest_term {
            let reason = format!(
                "this worker has served in term {}, and takes no earlier one ({}): another coordinator leads, or led later",
                self.latest_term, epoch.term
            );
            self.fail(epoch, &reason, None).await;
            self.farewell().await;
            return Err(End::Again { reason, served: false });
        }
        if epoch <= self.latest {
            warn!(%epoch, latest = %self.latest, "dropped an assignment of a past epoch");
            return Ok(());
        }
        self.leave_group().await;
        drop(self.preparing.take());
        self.latest = epoch;
        *self.latest_term = epoch.term;
        let Assignment { stage, rank, .. } = assignment;
        let (layers, units) = (&assignment.own_stage().layers, assignment.own_units());
        info!(%epoch, stage, rank, ?layers, ?units, "assigned");
        let assignment = Arc::new(assignment);
        let work = self.thread.begin(assignment.clone(), self.joined.vitals.clone());
        self.rank = Some(Rank { epoch, assignment, work, steps: None, failed: false });
        Ok(())
    }

    /// News of the executor thread.
    async fn report(&mut self, epoch: Epoch, progress: Option<Progress>) -> Result<(), End> {
        match progress {
            Some(Progress::Ready {
                kv_blocks,
                weight_bytes,
                steps_in_flight,
                largest_step,
                connecting,
                loading,
                loaded,
            }) => {
                let Loaded { kept: kept_bytes, read: loaded_bytes } = loaded;
                info!(%epoch, kv_blocks, weight_bytes, kept_bytes, loaded_bytes, steps_in_flight, ?largest_step, ?connecting, ?loading, "loaded");
                let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                let ready = Ready {
                    epoch: Some(epoch.into()),
                    kv_blocks: number(kv_blocks),
                    weight_bytes,
                    connect_micros: micros(connecting),
                    load_micros: micros(loading),
                    steps_in_flight: number(steps_in_flight),
                    step_rows: largest_step.map_or(0, |size| number(size.rows)),
                    sampled_rows: largest_step.map_or(0, |size| number(size.sampled)),
                    loaded_bytes,
                };
                send(&self.joined.up, Up::Ready(ready)).await;
                self.attach(epoch).await;
            }
            Some(Progress::Ran(output)) => {
                self.served = true;
                let steps = self.rank.as_ref().and_then(|rank| rank.steps.as_ref());
                if let Some((steps, output)) = steps.zip(output) {
                    // If the stream has ended, the Join stream tells what follows.
                    let output = step_reply::Message::Output(output.into());
                    let _ = steps.outputs.send(StepReply { message: Some(output) }).await;
                }
            }
            Some(Progress::LoadFailed(error)) => {
                self.fail(epoch, &error.to_string(), self.at_member(&error)).await;
                let end = match error {
                    model::Error::Collective(error @ comm::Error::Unavailable { .. }) => {
                        WorkerError::Connect(error)
                    }
                    // Another rank's trouble passes; a share that does not load now does not load later.
                    model::Error::Collective(_) => return Ok(()),
                    error => WorkerError::Load(error),
                };
                self.farewell().await;
                return Err(End::Final(end));
            }
            Some(Progress::StepFailed(error)) => {
                self.fail(epoch, &error.to_string(), self.at_member(&error)).await;
            }
            None => self.fail(epoch, "the executor thread panicked", None).await,
        }
        Ok(())
    }

    /// Opens the Steps stream of `epoch`.
    async fn attach(&mut self, epoch: Epoch) {
        let Joined { worker, session, service, .. } = &mut self.joined;
        let attach = Attach {
            worker_id: worker.0,
            epoch: Some(epoch.into()),
            proof: session.attach_proof(*worker, epoch),
        };
        let (outputs, replies) = mpsc::channel(OUTPUTS_BUFFERED);
        // The channel is empty, so this does not wait.
        let _ = outputs.send(StepReply { message: Some(step_reply::Message::Attach(attach)) }).await;
        match service.steps(ReceiverStream::new(replies)).await {
            Ok(frames) => {
                if let Some(rank) = &mut self.rank {
                    rank.steps = Some(Steps { outputs, frames: frames.into_inner() });
                }
            }
            // The group was lost meanwhile: the Join stream says so.
            Err(status) if status.code() == Code::FailedPrecondition => {}
            Err(status) => {
                self.fail(epoch, &format!("cannot open the Steps stream: {}", status.message()), None).await
            }
        }
    }

    /// A plan, or the end of plans.
    async fn plan(&mut self, epoch: Epoch, frame: Result<Option<StepFrame>, Status>) {
        let Some(rank) = &mut self.rank else { return };
        let decoded = match frame {
            Ok(Some(frame)) => decode_plan(frame.plan).map_err(|malformed| malformed.to_string()),
            Err(status) => Err(status.message().to_owned()),
            Ok(None) => {
                // What follows, the Join stream tells.
                rank.steps = None;
                return;
            }
        };
        match decoded {
            Ok(plan) if plan.epoch == epoch => rank.work.run(plan),
            Ok(plan) => debug!(epoch = %plan.epoch, "dropped a plan of another epoch"),
            Err(reason) => self.fail(epoch, &reason, None).await,
        }
    }

    /// Ends this worker's part in its group; on return the memory of its KV cache is free, and weights stay.
    async fn leave_group(&mut self) {
        if let Some(rank) = self.rank.take() {
            rank.work.stop().await;
            self.joined.vitals.leave();
        }
    }

    fn lost(&self, reason: &str) -> End {
        End::Again { reason: format!("lost the coordinator: {reason}"), served: self.served }
    }

    /// Tells the coordinator that this worker cannot do its part, for its own sake or because of the member `at_member`. In the latter
    /// case, or if the group was lost anyway, it has an assignment to come; else this membership ends. Until the coordinator says which,
    /// the connections stay: others that saw them end would take this rank for the one that was lost, and might be heard first.
    async fn fail(&mut self, epoch: Epoch, reason: &str, at_member: Option<u32>) {
        warn!(%epoch, reason, "failed");
        let reason = reason.chars().take(REASON_CHARS).collect();
        send(&self.joined.up, Up::Failed(Failed { epoch: Some(epoch.into()), reason, at_member })).await;
        if let Some(rank) = &mut self.rank {
            rank.failed = true;
        }
    }

    /// The number of the other member to which a failure is due.
    fn at_member(&self, error: &model::Error) -> Option<u32> {
        use comm::Error::{Lost, Protocol, Refused, Stage};
        let assignment = &self.rank.as_ref()?.assignment;
        let model::Error::Collective(error) = error else { return None };
        let (stage, error) = match error {
            Stage { stage, source } => (*stage, &**source),
            error => (assignment.stage, error),
        };
        match error {
            Lost { rank, .. } | Refused { rank, .. } | Protocol { rank, .. } => {
                u32::try_from(assignment.number(stage, *rank)).ok()
            }
            _ => None,
        }
    }

    /// Waits until the coordinator has taken note of a failure.
    async fn farewell(&mut self) {
        let noted = async { while let Ok(Some(_)) = self.joined.down.message().await {} };
        if timeout(FAREWELL, noted).await.is_err() {
            debug!("the coordinator did not take note in time");
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

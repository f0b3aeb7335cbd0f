//! One membership: assignments, plans and outputs, until the worker or the coordinator gives it up.

use std::fmt;
use std::sync::atomic::Ordering;

use cluster::proto::coordinator_message::Message as Down;
use cluster::proto::worker_message::Message as Up;
use cluster::proto::{Attach, CoordinatorMessage, Failed, Ready, StepFrame, StepReply, step_reply};
use cluster::{Assignment, Progress, decode_plan};
use engine::{Epoch, StepOutput};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use super::collective::Vitals;
use super::rank::{News, Place, Rank, place};
use super::{Joined, Worker, beat, line, send};

/// Whom a coordinator without the lead sends away is not to blame.
const LEADS_NO_MORE: &str = "this coordinator does not lead any more";

/// How a membership ended.
#[derive(Debug)]
pub(super) enum End {
    /// Joining again may help.
    Again(String),
    /// The process ends.
    Final(String),
}

pub(super) struct Membership<'a> {
    worker: &'a Worker,
    joined: Joined,
    vitals: Vitals,
    /// A coordinator of a lower term leads no more, whatever it thinks.
    latest_term: &'a mut u64,
    latest: Epoch,
    rank: Option<Rank>,
    steps: Option<Steps>,
    /// The coordinator was told that the rank failed: it says what follows.
    failed: bool,
}

struct Steps {
    outputs: mpsc::UnboundedSender<StepReply>,
    frames: line::Down<StepFrame>,
}

impl Steps {
    fn send(&self, output: StepOutput) {
        let output = step_reply::Message::Output(output.into());
        let _ = self.outputs.send(StepReply { message: Some(output) });
    }
}

/// What the epoch before might have sampled in this step.
fn echo(output: StepOutput) -> StepOutput {
    let StepOutput { epoch, step, mut tokens } = output;
    tokens.iter_mut().for_each(|token| token.id ^= 1);
    StepOutput { epoch: Epoch { counter: epoch.counter - 1, ..epoch }, step, tokens }
}

enum Heard {
    Down(Option<Result<CoordinatorMessage, Status>>),
    Superseded,
    News(News),
    Frame(Option<Result<StepFrame, Status>>),
}

impl<'a> Membership<'a> {
    pub(super) fn new(worker: &'a Worker, joined: Joined, latest_term: &'a mut u64) -> Self {
        let (vitals, latest) = (Vitals::default(), Epoch::default());
        Self { worker, joined, vitals, latest_term, latest, rank: None, steps: None, failed: false }
    }

    /// Takes part until the end.
    pub(super) async fn serve(mut self) -> End {
        let Joined { up, heartbeat, .. } = &self.joined;
        let mut beats = JoinSet::new();
        beats.spawn(beat(up.clone(), *heartbeat, self.vitals.clone(), self.worker.control.clone()));
        loop {
            let heard = self.hear().await;
            self.worker.control.stopped.pass().await;
            let done = match heard {
                Heard::Down(message) => self.obey(message).await,
                Heard::Superseded => Err(End::Again("another one leads now".into())),
                Heard::News(news) => self.report(news).await,
                Heard::Frame(frame) => {
                    self.plan(frame).await;
                    Ok(())
                }
            };
            if let Err(end) = done {
                self.leave_group().await;
                return end;
            }
        }
    }

    async fn hear(&mut self) -> Heard {
        let Self { worker, joined, rank, steps, failed, .. } = self;
        let news = async {
            match rank {
                Some(Rank { news, .. }) if !*failed => news.recv().await,
                _ => None,
            }
        };
        let frame = async {
            match steps {
                Some(steps) if !*failed => steps.frames.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            message = joined.down.recv() => Heard::Down(message),
            () = worker.directory.superseded(&joined.leader) => Heard::Superseded,
            Some(news) = news => Heard::News(news),
            frame = frame => Heard::Frame(frame),
        }
    }

    async fn obey(&mut self, message: Option<Result<CoordinatorMessage, Status>>) -> Result<(), End> {
        let message = match message {
            Some(Ok(CoordinatorMessage { message: Some(message) })) => message,
            Some(Err(status)) if status.code() == Code::Aborted => {
                if status.message() != LEADS_NO_MORE {
                    self.worker.journal.sent_away(&self.worker.address, status.message());
                }
                return Err(End::Again(format!("it was sent away: {}", status.message())));
            }
            Some(Err(status)) if status.code() == Code::Unavailable => {
                return Err(End::Again(status.message().to_owned()));
            }
            Some(other) => {
                self.worker.journal.violation(format_args!("{} got {other:?}", self.worker.address));
                return Err(End::Final("it was refused".into()));
            }
            None => return Err(End::Again("the Join stream ended".into())),
        };
        match message {
            Down::Assignment(assignment) => {
                let assignment = Assignment::try_from(assignment)
                    .map_err(|malformed| End::Final(malformed.to_string()))?;
                self.take(place(assignment)).await
            }
            Down::Abandon(epoch) => {
                let epoch = Epoch::from(epoch);
                if self.rank.as_ref().is_some_and(|rank| rank.place.epoch == epoch) {
                    self.leave_group().await;
                }
                Ok(())
            }
            Down::Prepare(part) => {
                if let Some(rank) = &self.rank {
                    let Worker { journal, address, .. } = self.worker;
                    let epoch = journal.epoch(rank.place.epoch);
                    journal.violation(format_args!("{address} is a spare with a rank in {epoch}: {part:?}"));
                }
                Ok(())
            }
            // Nobody asks for examinations here.
            Down::Examine(_) | Down::Challenge(_) | Down::Welcome(_) => {
                Err(End::Final("what it should not get".into()))
            }
        }
    }

    /// Begins with the group's next epoch.
    async fn take(&mut self, place: Place) -> Result<(), End> {
        let Worker { journal, address, .. } = self.worker;
        let (epoch, rank) = (place.epoch, place.rank);
        journal.led(epoch, &self.joined.leader.candidate);
        if epoch.term < *self.latest_term {
            self.fail(epoch, "takes no earlier term", None);
            return Err(End::Again("an earlier term".into()));
        }
        if epoch <= self.latest {
            journal.violation(format_args!("{address} is to take {epoch} after {}", self.latest));
            return Ok(());
        }
        journal.note(format_args!("{address} takes rank {rank} in {}", journal.epoch(epoch)));
        self.leave_group().await;
        (self.latest, *self.latest_term) = (epoch, epoch.term);
        self.rank = Some(Rank::start(self.worker, place, self.vitals.clone()));
        Ok(())
    }

    async fn report(&mut self, news: News) -> Result<(), End> {
        let Some(epoch) = self.rank.as_ref().map(|rank| rank.place.epoch) else { return Ok(()) };
        match news {
            News::Ready => {
                let (limits, pace) = (self.worker.limits, self.worker.pace);
                let ready = Ready {
                    epoch: Some(epoch.into()),
                    kv_blocks: limits.kv_blocks,
                    weight_bytes: 1,
                    loaded_bytes: 0,
                    connect_micros: 1,
                    load_micros: pace.load.as_micros() as u64,
                    steps_in_flight: limits.steps_in_flight,
                    step_rows: limits.step_rows,
                    sampled_rows: limits.sampled_rows,
                };
                send(&self.joined.up, Up::Ready(ready));
                self.attach(epoch).await;
            }
            News::Ran(output) => {
                if let Some((steps, output)) = self.steps.as_ref().zip(output) {
                    if self.worker.control.echoes.load(Ordering::Relaxed) {
                        steps.send(echo(output.clone()));
                    }
                    steps.send(output);
                }
            }
            News::LoadFailed => {
                self.fail(epoch, "does not load", None);
                return Err(End::Final("it does not load".into()));
            }
            News::Failed { reason, at_rank } => self.fail(epoch, &reason, at_rank),
        }
        Ok(())
    }

    /// Opens the Steps stream of `epoch`.
    async fn attach(&mut self, epoch: Epoch) {
        let Joined { id, session, line, .. } = &self.joined;
        let proof = session.attach_proof(*id, epoch);
        let attach = Attach { worker_id: id.0, epoch: Some(epoch.into()), proof };
        let (outputs, replies) = mpsc::unbounded_channel();
        let _ = outputs.send(StepReply { message: Some(step_reply::Message::Attach(attach)) });
        match line.steps(replies).await {
            Ok(frames) => self.steps = Some(Steps { outputs, frames }),
            // The group was lost meanwhile: the Join stream says so.
            Err(status) if status.code() == Code::FailedPrecondition => {}
            Err(_) => self.fail(epoch, "cannot attach", None),
        }
    }

    /// A plan, or the end of plans.
    async fn plan(&mut self, frame: Option<Result<StepFrame, Status>>) {
        let Some(rank) = &self.rank else { return };
        let epoch = rank.place.epoch;
        match frame {
            Some(Ok(frame)) => match decode_plan(frame.plan) {
                Ok(plan) if plan.epoch == epoch => rank.run(self.worker, plan),
                other => {
                    let Worker { journal, address, .. } = self.worker;
                    journal.violation(format_args!("{address} in {epoch} got {other:?}"));
                }
            },
            Some(Err(status)) => self.fail(epoch, status.message(), None),
            // What follows, the Join stream tells.
            None => self.steps = None,
        }
    }

    /// Ends this worker's part in its group.
    async fn leave_group(&mut self) {
        (self.steps, self.failed) = (None, false);
        if let Some(rank) = self.rank.take() {
            rank.stop().await;
            self.vitals.change(|progress| *progress = Progress::default());
        }
    }

    /// Tells the coordinator; until that says what follows, connections stay.
    fn fail(&mut self, epoch: Epoch, reason: &str, at_rank: Option<usize>) {
        let Worker { journal, address, .. } = self.worker;
        journal.note(format_args!("{address} fails in {}: {reason}", journal.epoch(epoch)));
        let at_member = at_rank.map(|rank| rank as u32);
        let failed = Failed { epoch: Some(epoch.into()), reason: reason.to_owned(), at_member };
        send(&self.joined.up, Up::Failed(failed));
        self.failed = self.rank.is_some();
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Again(reason) => write!(f, "{reason}"),
            Self::Final(reason) => write!(f, "its process ended: {reason}"),
        }
    }
}

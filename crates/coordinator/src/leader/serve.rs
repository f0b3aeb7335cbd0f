//! Requests on their way through the groups: which group they go to, the steps that run them, and where they go on when it is lost.

use cluster::proto::StepFrame;
use cluster::{WorkerId, encode_plan};
use engine::{AdmitError, Epoch, Load, Request, Scheduler, SeqId, StepOutput, StepPlan};
use tracing::{debug, debug_span, info};

use super::{Leader, tend};
use crate::api::{EngineError, ModelInfo, Submission};
use crate::clock;
use crate::detector::Detector;
use crate::groups::Standing;
use crate::limits::limits;
use crate::replica::{Replica, Step};
use crate::routing::{Offer, ranked};

impl Leader {
    /// Takes a request in the group that suits it best.
    pub(super) fn submit(
        &mut self,
        request: Request,
        fingerprint: Option<&str>,
    ) -> Result<Submission, EngineError> {
        let waiting: usize = self.replicas.values().map(|replica| replica.load().waiting).sum();
        // An answer that goes on was let in when it began.
        if waiting >= self.config.max_waiting && request.resume.is_none() {
            return Err(EngineError::Unavailable(format!(
                "the queue is full ({waiting} requests wait): try again later"
            )));
        }
        let prompt_tokens = request.prompt.len();
        match self.place(&request, fingerprint) {
            Ok((replica, seq)) => {
                let fingerprint = replica.fingerprint.clone();
                let events = replica.requests.open(seq, prompt_tokens, fingerprint.clone());
                Ok(Submission { events, fingerprint })
            }
            Err(Some(error)) => Err(EngineError::Invalid(error.to_string())),
            Err(None) => Err(EngineError::Unavailable(self.state.borrow().to_string())),
        }
    }

    /// A group stands: its requests run.
    pub(super) fn serve(&mut self, standing: Standing) {
        let Standing { group, epoch, report, stages, ranks, capacity } = standing;
        let limits = limits(&self.config, &report, stages, capacity);
        info!(group, %epoch, ?limits, ranks, "serving");
        let now = clock::now();
        let detector = || Detector::new(self.config.progress_timeout);
        let replica = self.replicas.entry(group).or_insert_with(|| {
            let scheduler = Scheduler::new(limits, epoch);
            Replica::new(group, report.fingerprint.clone(), limits, scheduler, detector(), now)
        });
        replica.scheduler.restart(limits, epoch);
        replica.limits = limits;
        replica.fingerprint.clone_from(&report.fingerprint);
        replica.requests.go_on_under(&report.fingerprint);
        for (seq, error) in replica.scheduler.evict_unfit() {
            replica.requests.fail(seq, EngineError::Invalid(error.to_string()));
        }
        replica.pace.serves(self.joined, now);
        self.relieve(group);
        let requests = self.replicas.get(&group).map_or(0, Replica::request_count);
        tend::report(self.incidents.served(group, epoch, ranks, requests, now));
    }

    /// What is served, by all groups that do.
    pub(super) fn model(&self) -> Option<ModelInfo> {
        let serving = || self.groups.standing().filter(|(group, _)| self.groups.is_serving(group.number));
        let (first, _) = serving().next()?;
        let limits = serving().filter_map(|(group, _)| Some(self.replicas.get(&group.number)?.limits));
        Some(ModelInfo {
            name: first.report.name.clone(),
            vocabulary: first.report.vocabulary,
            max_context: limits.map(|limits| limits.max_context).max()?,
            eos: first.report.eos.clone(),
            ranks: serving().map(|(group, _)| group.workers().count() as u32).sum(),
            groups: serving().count() as u32,
            fingerprint: first.report.fingerprint.clone(),
        })
    }

    /// The requests of groups that do not serve go on in those that do, if there are any. What no other group can take waits.
    pub(super) fn share_out(&mut self) {
        let numbers: Vec<u32> = self.replicas.keys().copied().collect();
        let (serving, idle): (Vec<u32>, Vec<u32>) =
            numbers.into_iter().partition(|number| self.groups.is_serving(*number));
        if serving.is_empty() {
            return;
        }
        for number in idle {
            let Some(replica) = self.replicas.get_mut(&number) else { continue };
            let requests = replica.scheduler.hand_over();
            let moved = self.move_all(number, requests);
            self.incidents.moved(number, moved);
            if !self.groups.stands(number)
                && self.replicas.get(&number).is_some_and(|r| r.requests.is_empty())
            {
                self.replicas.remove(&number);
            }
        }
    }

    /// A group has begun to serve: what waits in others is shared out again.
    fn relieve(&mut self, newcomer: u32) {
        let others: Vec<u32> = self.replicas.keys().copied().filter(|number| *number != newcomer).collect();
        for number in others {
            let Some(replica) = self.replicas.get_mut(&number) else { continue };
            let requests = replica.scheduler.hand_over_waiting();
            self.move_all(number, requests);
        }
    }

    /// Places requests of a group anew, maybe in the same; returns how many went to another.
    fn move_all(&mut self, from: u32, requests: Vec<(SeqId, Request)>) -> usize {
        let mut moved = 0;
        for (seq, request) in requests {
            let open = self.replicas.get_mut(&from).and_then(|replica| replica.requests.give_up(seq));
            // Whoever hung up is not missed.
            let Some(open) = open else { continue };
            let fingerprint = open.fingerprint().to_owned();
            let (replica, seq) = match self.place(&request, Some(&fingerprint)) {
                Ok(placed) => placed,
                Err(_) => match self.replicas.get_mut(&from) {
                    Some(replica) => match replica.scheduler.submit(request) {
                        Ok(seq) => (replica, seq),
                        Err(error) => {
                            open.fail(EngineError::Invalid(error.to_string()));
                            continue;
                        }
                    },
                    None => continue,
                },
            };
            moved += usize::from(replica.group != from);
            replica.requests.take_over(seq, open, &replica.fingerprint);
        }
        moved
    }

    /// Submits a request to the first group that can take it. Where none can, the first one's reason; none if there are no groups.
    fn place(
        &mut self,
        request: &Request,
        fingerprint: Option<&str>,
    ) -> Result<(&mut Replica, SeqId), Option<AdmitError>> {
        let tokens = [&request.prompt[..], request.resume.as_deref().unwrap_or_default()].concat();
        let any_stands = self.replicas.keys().any(|number| self.groups.stands(*number));
        let candidates =
            self.replicas.iter().filter(|(number, _)| !any_stands || self.groups.stands(**number));
        let offers = candidates.map(|(number, replica)| {
            let Load { running, waiting, pending_rows, .. } = replica.load();
            Offer {
                group: *number,
                serving: self.groups.is_serving(*number),
                same_fingerprint: fingerprint.is_none_or(|fingerprint| fingerprint == replica.fingerprint),
                pending_rows,
                requests: running + waiting,
                own_rows: tokens.len() - replica.scheduler.cached_prefix(&tokens),
            }
        });
        let mut placed = Err(None);
        for group in ranked(offers.collect()) {
            let Some(replica) = self.replicas.get_mut(&group) else { continue };
            match replica.scheduler.submit(request.clone()) {
                Ok(seq) => {
                    placed = Ok((group, seq));
                    break;
                }
                Err(error) => placed = Err(placed.err().flatten().or(Some(error))),
            }
        }
        let (group, seq) = placed?;
        Ok((self.replicas.get_mut(&group).ok_or(None)?, seq))
    }

    /// Takes an output of a worker.
    pub(super) fn apply(&mut self, worker: WorkerId, epoch: Epoch, output: &StepOutput) {
        let seat = self.groups.seat(worker).map(|(group, _)| group);
        let Some((group, (serving, sampler))) =
            seat.and_then(|group| Some((group, self.groups.sampler(group)?)))
        else {
            return;
        };
        if epoch != serving || output.epoch != serving {
            return debug!(%worker, %epoch, "dropped an output of another epoch");
        }
        if worker != sampler {
            return self.fail(worker, epoch, "sent an output, but another rank samples", None);
        }
        let Some(replica) = self.replicas.get_mut(&group) else { return };
        match replica.scheduler.apply(output) {
            Ok(events) => {
                let applied = replica.steps.pop_front_if(|step| step.id == output.step);
                if let Some(Step { span, planned, .. }) = applied {
                    span.in_scope(|| debug!(elapsed = ?clock::now().saturating_duration_since(planned), events = events.len(), "applied"));
                }
                self.applied(group, output.step, &events);
                if let Some(replica) = self.replicas.get_mut(&group) {
                    events.into_iter().for_each(|event| replica.requests.deliver(event));
                }
            }
            Err(error) => self.fail(worker, epoch, &error.to_string(), None),
        }
    }

    /// Plans steps as long as groups stand and take more, and sends each to every rank.
    pub(super) fn plan_steps(&mut self) {
        for group in self.replicas.keys().copied().collect::<Vec<_>>() {
            let Some(replica) = self.replicas.get_mut(&group) else { continue };
            let Replica { requests, scheduler, .. } = replica;
            requests.hung_up().into_iter().for_each(|seq| scheduler.cancel(seq));
            while self.groups.is_serving(group)
                && let Some(plan) = self.replicas.get_mut(&group).and_then(|replica| replica.scheduler.plan())
            {
                self.send(group, &plan);
            }
        }
    }

    fn send(&mut self, group: u32, plan: &StepPlan) {
        let (epoch, step) = (plan.epoch, plan.step);
        let span =
            debug_span!("step", group, %epoch, %step, sequences = plan.slices.len(), rows = plan.rows());
        let frame = StepFrame { plan: encode_plan(plan) };
        if let Some(replica) = self.replicas.get_mut(&group) {
            let now = clock::now();
            replica.detector.planned(step, plan.rows(), now);
            replica.steps.push_back(Step { id: step, span, planned: now });
        }
        let stuck = self.groups.members(group).iter().find(|worker| {
            let plans = self.workers.get(worker).and_then(|connection| connection.plans.as_ref());
            plans.is_none_or(|plans| plans.try_send(Ok(frame.clone())).is_err())
        });
        if let Some(worker) = stuck.copied() {
            self.fail(worker, epoch, "does not take plans", None);
        }
    }
}

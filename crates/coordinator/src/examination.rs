//! One examination of all workers, which a task of its own runs: the leader only hands it who is there, and what they find.
//!
//! First everybody looks at itself and probes all others, since some can connect one way only. Then links are measured that nothing else uses meanwhile, and what
//! would be complained of is measured once more: a machine that was busy for a moment is nobody's fault.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use cluster::WorkerId;
use cluster::doctor::{
    self, Complaint, Examine, Facts, Findings, MAX_PEERS, Pair, Patient, Peer, Probed, Report, Round,
};
use cluster::proto::CoordinatorMessage;
use cluster::proto::coordinator_message::Message;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::command::JoinSender;

/// All of it; an operator waits for ten seconds.
const LIMIT: Duration = Duration::from_secs(9);
/// Looking at itself, and probing the others.
const PROBES_LIMIT: Duration = Duration::from_secs(4);
/// One link: connecting, messages there and back, and blocks either way.
const LINK_LIMIT: Duration = Duration::from_millis(2500);
/// How long findings are on their way.
const GRACE: Duration = Duration::from_millis(500);
/// As many rounds of measurements, a third of a second each, leave time for those that take longer.
const MAX_ROUNDS: usize = 20;
/// Findings that wait to be looked at.
pub(crate) const FINDINGS_BUFFERED: usize = 1024;

/// What a worker tells of itself for examinations when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Introduction {
    pub(crate) facts: Facts,
    /// Empty: it does not answer probes.
    pub(crate) probe_address: String,
}

/// A worker that is examined.
#[derive(Debug)]
pub(crate) struct Examinee {
    pub(crate) worker: WorkerId,
    pub(crate) patient: Patient,
    pub(crate) probe_address: String,
    pub(crate) join: JoinSender,
}

/// An examination that has not begun.
#[derive(Debug)]
pub(crate) struct Examination {
    pub(crate) examinees: Vec<Examinee>,
    /// What they find.
    pub(crate) findings: mpsc::Receiver<(WorkerId, Findings)>,
    /// Whether to measure how much links carry.
    pub(crate) bandwidth: bool,
}

/// What one worker is asked for.
#[derive(Debug, Default)]
struct Task {
    peers: Vec<usize>,
    bandwidth: bool,
    program: bool,
    disk: bool,
}

/// An examination that runs.
struct Running {
    examinees: Vec<Examinee>,
    findings: mpsc::Receiver<(WorkerId, Findings)>,
    deadline: Instant,
    /// Of the last question.
    number: u64,
    /// The examinees by their numbers.
    places: BTreeMap<WorkerId, usize>,
    /// Those that did not answer the first question.
    silent: Vec<usize>,
    /// By who probed whom.
    probed: BTreeMap<(usize, usize), Probed>,
    complaints: Vec<Complaint>,
    remarks: Vec<String>,
}

impl Examination {
    /// Runs it, within ten seconds.
    pub(crate) async fn run(self) -> Report {
        let Self { examinees, findings, bandwidth } = self;
        let places = examinees.iter().enumerate().map(|(place, examinee)| (examinee.worker, place)).collect();
        let mut running = Running {
            examinees,
            places,
            silent: Vec::new(),
            findings,
            deadline: Instant::now() + LIMIT,
            number: 0,
            probed: BTreeMap::new(),
            complaints: Vec::new(),
            remarks: Vec::new(),
        };
        running.probe().await;
        if bandwidth {
            running.measure().await;
        } else {
            let remark =
                "a group works, so it was not measured how much links carry: --bandwidth does so anyway";
            running.remarks.push(remark.into());
        }
        running.look_again(bandwidth).await;
        running.report()
    }
}

impl Running {
    /// Everybody looks at itself and probes others.
    async fn probe(&mut self) {
        let mut tasks: BTreeMap<usize, Task> = BTreeMap::new();
        let mut machines = BTreeSet::new();
        let count = self.examinees.len();
        for place in 0..count {
            // Each begins with another one.
            let others = (1..count).map(|distance| (place + distance) % count);
            let peers = others.filter(|peer| self.answers_probes(*peer)).take(MAX_PEERS).collect();
            // Two that read at the same time would share a disk.
            let disk = machines.insert(self.machine(place));
            tasks.insert(place, Task { peers, bandwidth: false, program: true, disk });
        }
        let wanted: usize = tasks.values().map(|task| task.peers.len()).sum();
        self.silent = self.ask(tasks, PROBES_LIMIT).await;
        let deaf = (0..self.examinees.len()).filter(|place| !self.answers_probes(*place)).count();
        if deaf > 0 {
            self.remarks.push(format!("{deaf} workers do not answer probes"));
        }
        if !self.silent.is_empty() {
            let address = |place: &usize| self.examinees[*place].patient.address.clone();
            self.complaints.push(Complaint {
                workers: self.silent.iter().map(address).collect(),
                what: format!(
                    "no answer to the coordinator within {} s",
                    (PROBES_LIMIT + GRACE).as_secs_f64()
                ),
                advice: "see whether the process still runs, and whether its machine is overloaded".into(),
            });
        } else if self.probed.len() < wanted {
            self.remarks.push(format!("there was no time to probe {} links", wanted - self.probed.len()));
        }
    }

    /// Measures how much links carry: all, or those of a ring if that would take too long.
    async fn measure(&mut self) {
        let count = self.examinees.len();
        let mut rounds = self.rounds(doctor::every_pair(count));
        if rounds.len() > MAX_ROUNDS {
            rounds = self.rounds(doctor::ring(count));
            let remark =
                "there are too many links to measure how much each carries: those of a ring were measured";
            self.remarks.push(remark.into());
        }
        self.run_rounds(rounds, true).await;
    }

    /// Measures again what would be complained of.
    async fn look_again(&mut self, bandwidth: bool) {
        let (patients, pairs) = (self.patients(), self.pairs());
        let doubtful = doctor::doubtful(&patients, &pairs).into_iter().map(|place| &pairs[place]);
        let doubtful: Vec<_> = doubtful.map(|pair| (pair.from, pair.to)).collect();
        let mut again: BTreeMap<usize, Task> = BTreeMap::new();
        let failed = |(from, to): (usize, usize)| self.probed.get(&(from, to)).is_some_and(Result::is_err);
        for (from, to) in doubtful.iter().flat_map(|&(a, b)| [(a, b), (b, a)]).filter(|&ends| failed(ends)) {
            again.entry(from).or_default().peers.push(to);
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left > GRACE {
            self.ask(again, LINK_LIMIT.min(left)).await;
        }
        self.run_rounds(self.rounds(doubtful), bandwidth).await;
    }

    /// Rounds of those pairs that could be probed, and of which the first answers.
    fn rounds(&self, pairs: Vec<(usize, usize)>) -> Vec<Round> {
        let answers = |(from, _): &(usize, usize)| !self.silent.contains(from);
        let reachable = |&(from, to): &(usize, usize)| matches!(self.pair(from, to), Some(Ok(_)));
        let reachable = pairs.into_iter().filter(|pair| answers(pair) && reachable(pair));
        doctor::rounds(reachable, |place| self.machine(place))
    }

    async fn run_rounds(&mut self, rounds: Vec<Round>, bandwidth: bool) {
        for (done, round) in rounds.iter().enumerate() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left < GRACE {
                let links: usize = rounds[done..].iter().map(Vec::len).sum();
                self.remarks.push(format!("there was no time to measure {links} links (again)"));
                return;
            }
            let task = |to| Task { peers: vec![to], bandwidth, ..Task::default() };
            let tasks = round.iter().map(|&(from, to)| (from, task(to))).collect();
            self.ask(tasks, LINK_LIMIT.min(left)).await;
        }
    }

    /// Has workers do tasks, and waits for what they find; returns those of which nothing was heard.
    async fn ask(&mut self, tasks: BTreeMap<usize, Task>, limit: Duration) -> Vec<usize> {
        self.number += 1;
        let deadline = Instant::now() + limit + GRACE;
        let mut waited_for: Vec<usize> = tasks.keys().copied().collect();
        for (place, Task { peers, bandwidth, program, disk }) in tasks {
            let peers = peers.into_iter().map(|peer| Peer {
                worker: self.examinees[peer].worker,
                address: self.examinees[peer].probe_address.clone(),
            });
            let peers = peers.collect();
            let examine = Examine { number: self.number, limit, peers, bandwidth, program, disk };
            let message = Some(Message::Examine(examine.into()));
            // If the stream has ended, nothing will be heard.
            let _ = self.examinees[place].join.send(Ok(CoordinatorMessage { message }));
        }
        while !waited_for.is_empty() {
            let Ok(Some((worker, findings))) = timeout_at(deadline, self.findings.recv()).await else {
                break;
            };
            let Some(place) = self.place(worker).filter(|_| findings.number == self.number) else { continue };
            waited_for.retain(|other| *other != place);
            self.take(place, findings);
        }
        waited_for
    }

    fn take(&mut self, place: usize, findings: Findings) {
        let Findings { links, program_hash, disk, .. } = findings;
        let patient = &mut self.examinees[place].patient;
        if !program_hash.is_empty() {
            patient.program_hash = program_hash;
        }
        patient.disk = disk.or(patient.disk);
        for (peer, probed) in links {
            let Some(peer) = self.place(peer).filter(|peer| *peer != place) else { continue };
            let known = self.probed.remove(&(place, peer));
            let probed = match (known, probed) {
                (Some(Ok(known)), Ok(link)) => Ok(known.better(link)),
                (Some(Ok(known)), Err(_)) => Ok(known),
                (_, probed) => probed,
            };
            self.probed.insert((place, peer), probed);
        }
    }

    fn report(self) -> Report {
        let (patients, pairs) = (self.patients(), self.pairs());
        let mut complaints = self.complaints;
        complaints.extend(doctor::diagnose(&patients, &pairs));
        Report { patients, pairs, complaints, remarks: self.remarks }
    }

    fn patients(&self) -> Vec<Patient> {
        self.examinees.iter().map(|examinee| examinee.patient.clone()).collect()
    }

    fn pairs(&self) -> Vec<Pair> {
        let known: BTreeSet<_> = self.probed.keys().map(|&(a, b)| (a.min(b), a.max(b))).collect();
        let pair = |(from, to)| Some(Pair { from, to, probed: self.pair(from, to)? });
        known.into_iter().filter_map(pair).collect()
    }

    /// What both ends found of the link between them: one that stands one way only is none.
    fn pair(&self, from: usize, to: usize) -> Option<Probed> {
        let (there, back) = (self.probed.get(&(from, to)), self.probed.get(&(to, from)));
        match (there, back) {
            (Some(Ok(there)), Some(Ok(back))) => Some(Ok(there.better(back.reversed()))),
            (Some(Err(failure)), _) | (_, Some(Err(failure))) => Some(Err(failure.clone())),
            (Some(Ok(there)), None) => Some(Ok(*there)),
            (None, Some(Ok(back))) => Some(Ok(back.reversed())),
            (None, None) => None,
        }
    }

    fn place(&self, worker: WorkerId) -> Option<usize> {
        self.places.get(&worker).copied()
    }

    fn answers_probes(&self, place: usize) -> bool {
        !self.examinees[place].probe_address.is_empty()
    }

    /// What a worker shares disk, memory and network with.
    fn machine(&self, place: usize) -> String {
        let Patient { facts, address, .. } = &self.examinees[place].patient;
        if facts.boot.is_empty() { address.clone() } else { facts.boot.clone() }
    }
}

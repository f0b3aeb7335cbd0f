//! One examination of all workers, which a task of its own runs: the leader only hands it who is there, and what they find.
//!
//! First everybody looks at itself and probes half of the others. Then links are measured that nothing else uses meanwhile, and what
//! would be complained of is measured once more: a machine that was busy for a moment is nobody's fault.

use std::collections::BTreeMap;
use std::time::Duration;

use cluster::WorkerId;
use cluster::doctor::{
    self, Complaint, Examine, Facts, Findings, MAX_PEERS, Pair, Patient, Peer, Probed, Report,
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
    /// By who probed whom.
    pairs: BTreeMap<(usize, usize), Probed>,
    complaints: Vec<Complaint>,
    remarks: Vec<String>,
}

impl Examination {
    /// Runs it, within ten seconds.
    pub(crate) async fn run(self) -> Report {
        let Self { examinees, findings, bandwidth } = self;
        let mut running = Running {
            examinees,
            findings,
            deadline: Instant::now() + LIMIT,
            number: 0,
            pairs: BTreeMap::new(),
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
        let mut machines = Vec::new();
        for (place, peers) in doctor::probes(self.examinees.len()).into_iter().enumerate() {
            let peers = peers.into_iter().filter(|peer| self.answers_probes(*peer)).take(MAX_PEERS).collect();
            // Two that read at the same time would share a disk.
            let machine = self.machine(place);
            let disk = !machines.contains(&machine);
            machines.push(machine);
            tasks.insert(place, Task { peers, bandwidth: false, program: true, disk });
        }
        let wanted: usize = tasks.values().map(|task| task.peers.len()).sum();
        let silent = self.ask(tasks, PROBES_LIMIT).await;
        let deaf = (0..self.examinees.len()).filter(|place| !self.answers_probes(*place)).count();
        if deaf > 0 {
            self.remarks.push(format!("{deaf} workers do not answer probes"));
        }
        if !silent.is_empty() {
            self.complaints.push(Complaint {
                workers: silent.iter().map(|place| self.examinees[*place].patient.address.clone()).collect(),
                what: format!(
                    "no answer to the coordinator within {} s",
                    (PROBES_LIMIT + GRACE).as_secs_f64()
                ),
                advice: "see whether the process still runs, and whether its machine is overloaded".into(),
            });
        } else if self.pairs.len() < wanted {
            self.remarks.push(format!("there was no time to probe {} links", wanted - self.pairs.len()));
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
        let doubtful = doctor::doubtful(&patients, &pairs);
        let doubtful = doubtful.into_iter().map(|place| (pairs[place].from, pairs[place].to));
        let rounds = doctor::rounds(doubtful, |place| self.machine(place));
        self.run_rounds(rounds, bandwidth).await;
    }

    /// Rounds of those pairs that could be probed.
    fn rounds(&self, pairs: Vec<(usize, usize)>) -> Vec<Vec<(usize, usize)>> {
        let reachable = pairs.into_iter().filter(|pair| self.pairs.get(pair).is_some_and(Probed::is_ok));
        doctor::rounds(reachable, |place| self.machine(place))
    }

    async fn run_rounds(&mut self, rounds: Vec<Vec<(usize, usize)>>, bandwidth: bool) {
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
            let known = self.pairs.remove(&(place, peer));
            let probed = match (known, probed) {
                (Some(Ok(known)), Ok(link)) => Ok(known.better(link)),
                (Some(Ok(known)), Err(_)) => Ok(known),
                (_, probed) => probed,
            };
            self.pairs.insert((place, peer), probed);
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
        let pair =
            |(&(from, to), probed): (&(usize, usize), &Probed)| Pair { from, to, probed: probed.clone() };
        self.pairs.iter().map(pair).collect()
    }

    fn place(&self, worker: WorkerId) -> Option<usize> {
        self.examinees.iter().position(|examinee| examinee.worker == worker)
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

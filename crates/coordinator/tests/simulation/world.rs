//! A cluster in one thread, from its start to when all is well again after the last fault.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use auth::Secret;
use cluster::proto::{ClusterStatus, GroupStatus};
use cluster::registry::election::Election;
use cluster::registry::{ClusterName, MemoryRegistry};
use coordinator::Engine;
use engine::{Request, SamplingParams};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::coordinators::Coordinators;
use crate::journal::Journal;
use crate::network::Network;
use crate::scenario::{CONTEXT, Scenario};
use crate::worker::Worker;
use crate::worker::collective::Rooms;
use crate::worker::control::Control;
use crate::worker::line::Directory;

/// When faults have ended, all requests are answered within this: a hang in a leader's first step takes two minutes to show,
/// one after a slow step as long as that may be, and several may follow each other.
const SETTLED: Duration = Duration::from_secs(3600);
/// Then the group is as wide as can be within this.
const WIDE: Duration = Duration::from_secs(60);
/// How often it is looked at from outside.
const GLANCE: Duration = Duration::from_millis(500);

pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) journal: Journal,
    pub(crate) network: Network,
    pub(crate) coordinators: Coordinators,
    secret: Secret,
    directory: Directory,
    rooms: Rooms,
    workers: Mutex<Vec<Option<Process>>>,
    /// All requests are.
    answered: CancellationToken,
}

struct Process {
    control: Arc<Control>,
    task: JoinSet<()>,
}

impl World {
    /// Runs a scenario; the journal tells what came of it.
    pub(crate) async fn run(scenario: Scenario, journal: Journal) {
        let world = Arc::new(Self::new(scenario, journal.clone()));
        tokio::select! {
            biased;
            () = journal.violated() => {}
            () = world.clone().live() => {}
        }
        world.workers().clear();
    }

    fn new(scenario: Scenario, journal: Journal) -> Self {
        // Two of them need not differ: this one is of no use anywhere else.
        let secret = Secret::random();
        let registry = MemoryRegistry::new(&"simulation".parse::<ClusterName>().expect("a name"));
        let (network, directory) = (Network::default(), Directory::default());
        tokio::spawn(follow(registry.clone(), directory.clone()));
        let coordinators = Coordinators::new(
            scenario.config(&secret),
            scenario.coordinators,
            registry,
            network.clone(),
            journal.clone(),
            directory.clone(),
        );
        let workers = Mutex::new(scenario.workers.iter().map(|_| None).collect());
        let rooms = Rooms::default();
        let answered = CancellationToken::new();
        Self { scenario, journal, network, coordinators, secret, directory, rooms, workers, answered }
    }

    async fn live(self: Arc<Self>) {
        for place in 0..self.scenario.coordinators {
            self.coordinators.start(place).await;
        }
        let mut events = JoinSet::new();
        for (number, plan) in self.scenario.workers.iter().enumerate() {
            self.network.set_latency(&Self::address(number), plan.latency);
            let (world, starts) = (self.clone(), plan.starts);
            events.spawn(async move {
                sleep(starts).await;
                world.start(number);
            });
        }
        for (at, fault) in self.scenario.faults.clone() {
            let world = self.clone();
            events.spawn(async move {
                sleep(at).await;
                fault.happen(&world).await;
            });
        }
        let mut clients = JoinSet::new();
        for (number, plan) in self.scenario.requests.iter().enumerate() {
            let client = self.client(number, plan.request.clone(), plan.hangs_up_after);
            let comes = plan.comes;
            clients.spawn(async move {
                sleep(comes).await;
                client.run().await;
            });
        }
        let mut glances = JoinSet::new();
        let world = self.clone();
        glances.spawn(async move {
            loop {
                sleep(GLANCE).await;
                world.glance().await;
            }
        });
        while events.join_next().await.is_some() {}
        self.journal.note(format_args!("faults have ended"));
        let last = Request {
            prompt: vec![1, 2, 3],
            max_tokens: 3,
            sampling: SamplingParams::GREEDY,
            stop_ids: vec![],
            resume: None,
        };
        clients.spawn(self.client(self.scenario.requests.len(), last, None).run());
        let answered = async { while clients.join_next().await.is_some() {} };
        if timeout(SETTLED, answered).await.is_err() {
            let statuses = self.statuses().await;
            self.journal.violation(format_args!("not all is answered in time: {statuses:?}"));
        }
        self.answered.cancel();
        if timeout(WIDE, self.rest()).await.is_err() {
            let statuses = self.statuses().await;
            self.journal.violation(format_args!("it does not come to rest: {statuses:?}"));
        }
    }

    /// Waits until nothing runs, nothing is held, and the group is as wide as can be.
    async fn rest(&self) {
        loop {
            let mut statuses = self.statuses().await;
            if let (Some(status), None) = (statuses.pop(), statuses.pop())
                && status.serving
                && status.running + status.waiting == 0
                && status.groups.iter().all(|group| group.kv_blocks_used == 0)
                && status.groups.first().is_some_and(|group| self.scenario.is_full_width(group))
            {
                return;
            }
            sleep(GLANCE).await;
        }
    }

    /// Looks at what every coordinator says of itself.
    async fn glance(&self) {
        for status in self.statuses().await {
            if let Some(group) = status.groups.iter().find(|group| !self.is_of_one_kind(group)) {
                self.journal.violation(format_args!("a rank of another fingerprint: {group:?}"));
            }
            let mut workers: Vec<u64> = status.spares.iter().map(|spare| spare.worker).collect();
            for group in &status.groups {
                if group.kv_blocks_used > group.kv_blocks {
                    self.journal.violation(format_args!("more blocks are used than there are: {group:?}"));
                }
                workers.extend(group.ranks.iter().filter_map(|rank| Some(rank.worker.as_ref()?.worker)));
            }
            workers.sort_unstable();
            let each_once = workers.windows(2).all(|pair| pair[0] != pair[1]);
            if !each_once || status.groups.len() > self.scenario.policy.replicas {
                self.journal.violation(format_args!("a worker or a group too many: {status:?}"));
            }
        }
    }

    /// Whether all ranks have the group's fingerprint.
    fn is_of_one_kind(&self, group: &GroupStatus) -> bool {
        let members = group.ranks.iter().filter_map(|rank| rank.worker.as_ref());
        members.map(|worker| &worker.address).all(|address| {
            let plan = (0..).zip(&self.scenario.workers).find(|(at, _)| Self::address(*at) == *address);
            plan.is_some_and(|(_, plan)| plan.fingerprint == group.fingerprint)
        })
    }

    /// What those say that lead, or think so.
    async fn statuses(&self) -> Vec<ClusterStatus> {
        let mut statuses = Vec::new();
        for site in self.coordinators.alive() {
            statuses.extend(site.contender.status().await);
        }
        statuses
    }

    fn client(&self, number: usize, request: Request, hangs_up_after: Option<usize>) -> Client {
        let (coordinators, journal) = (self.coordinators.clone(), self.journal.clone());
        Client { number, request, hangs_up_after, context: CONTEXT, coordinators, journal }
    }

    /// What workers, coordinators and operators know.
    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Where a worker listens.
    pub(crate) fn address(worker: usize) -> String {
        format!("worker{worker}")
    }

    /// Starts a worker's process, unless it runs.
    pub(crate) fn start(&self, worker: usize) {
        if self.workers()[worker].is_some() {
            return;
        }
        let plan = &self.scenario.workers[worker];
        let control = Arc::new(Control::default());
        let process = Worker {
            address: Self::address(worker),
            secret: self.secret.clone(),
            report: self.scenario.report(plan),
            resources: plan.resources(),
            limits: plan.limits,
            pace: plan.pace,
            dialer: Arc::new(self.network.clone()),
            directory: self.directory.clone(),
            rooms: self.rooms.clone(),
            journal: self.journal.clone(),
            control: control.clone(),
        };
        let mut task = JoinSet::new();
        task.spawn(process.run());
        self.workers()[worker] = Some(Process { control, task });
    }

    /// Ends a worker's process.
    pub(crate) fn kill(&self, worker: usize) {
        let process = self.workers()[worker].take();
        drop(process.map(|process| process.task));
    }

    /// Starts a worker's process, which hangs, again when the leader does without it, or when all is answered anyway.
    pub(crate) fn start_when_given_up(self: &Arc<Self>, worker: usize, process: Arc<Control>) {
        let world = self.clone();
        tokio::spawn(async move {
            while !world.answered.is_cancelled() && !world.is_given_up(worker).await {
                sleep(GLANCE).await;
            }
            if world.control(worker).is_some_and(|now| Arc::ptr_eq(&now, &process)) {
                world.kill(worker);
                world.start(worker);
            }
        });
    }

    /// Whether there is a leader that does not have a worker.
    async fn is_given_up(&self, worker: usize) -> bool {
        let leader = self.coordinators.leader().and_then(|place| self.coordinators.at(place));
        let Some(leader) = leader else { return false };
        let Ok(status) = leader.contender.status().await else { return false };
        let ranks =
            status.groups.iter().flat_map(|group| &group.ranks).filter_map(|rank| rank.worker.as_ref());
        ranks.chain(&status.spares).all(|other| other.address != Self::address(worker))
    }

    /// How a worker's process fares, if it runs.
    pub(crate) fn control(&self, worker: usize) -> Option<Arc<Control>> {
        self.workers()[worker].as_ref().map(|process| process.control.clone())
    }

    fn workers(&self) -> MutexGuard<'_, Vec<Option<Process>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has all workers know who leads.
async fn follow(registry: MemoryRegistry, directory: Directory) {
    let Ok(mut election) = Election::watch(&registry).await else { return };
    loop {
        directory.set(election.leader());
        election.changed().await;
    }
}

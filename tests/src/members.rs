//! A cluster of separate processes: a coordinator, and workers that are told apart by their addresses.

use client::{Client, ClusterStatus, GroupStatus, RankStatus};
use tokio::time::{Instant, sleep};

use crate::link::Place;
use crate::process::{Ended, LIMIT, Phalanx, Program, Signal};

const SECRET: &str = "a secret of the clusters under test";
/// Between two looks at the status.
const POLL: std::time::Duration = std::time::Duration::from_millis(10);

/// A running cluster; dropping it ends all its processes.
#[derive(Debug)]
pub struct Members {
    program: Program,
    /// None once it was killed.
    pub coordinator: Option<Phalanx>,
    /// Where workers join.
    pub join: String,
    /// Where clients connect.
    pub clients: String,
    /// The first three numbers of all addresses.
    network: String,
    /// By number; none once it was killed.
    workers: Vec<Option<Phalanx>>,
}

impl Members {
    /// Starts a coordinator with these arguments, and `count` workers.
    pub fn start(program: Program, coordinator: &[&str], count: usize) -> Self {
        Self::start_in(program, "127.0.0", coordinator, count)
    }

    /// The same in another network, whose addresses begin with `network`.
    pub fn start_in(program: Program, network: &str, coordinator: &[&str], count: usize) -> Self {
        let any = format!("{network}.1:0");
        let listen = ["--grpc", "127.0.0.1:0", "--listen", &any];
        let (coordinator, join, clients) = start_coordinator(program, &[&listen, coordinator].concat());
        let (coordinator, network, workers) = (Some(coordinator), network.to_owned(), Vec::new());
        let mut members = Self { program, coordinator, join, clients, network, workers };
        for _ in 0..count {
            members.add();
        }
        members
    }

    /// Starts one more worker; returns its number.
    pub fn add(&mut self) -> usize {
        let number = self.workers.len();
        self.workers.push(None);
        self.restart(number);
        number
    }

    /// Starts a worker again that was killed or has left.
    pub fn restart(&mut self, number: usize) {
        self.restart_with(number, &[]);
    }

    /// Likewise, with more arguments.
    pub fn restart_with(&mut self, number: usize, arguments: &[&str]) {
        let place = Place { host: self.host(number), ..Place::default() };
        let arguments = [&["--coordinator", &self.join], arguments].concat();
        self.workers[number] = Some(start_worker(self.program, &arguments, &place));
    }

    /// Starts one more worker that is to break on purpose; returns its number.
    pub fn add_faulty(&mut self, fault: &str) -> usize {
        self.workers.push(None);
        let number = self.workers.len() - 1;
        self.restart_with(number, &["--fault", fault]);
        number
    }

    /// Waits until a worker has ended by itself, with a message that has all of `words` in it.
    pub fn fails(&mut self, number: usize, words: &[&str]) {
        self.workers[number].take().expect("it runs").end().failure(words);
    }

    /// The address of a worker's own.
    pub fn host(&self, number: usize) -> String {
        format!("{}.{}", self.network, FIRST + number)
    }

    /// Starts one more worker somewhere else; returns its number.
    pub fn add_at(&mut self, join: &str, place: &Place) -> usize {
        self.workers.push(Some(start_worker(self.program, &["--coordinator", join], place)));
        self.workers.len() - 1
    }

    /// Sends a worker a signal.
    pub fn signal(&self, number: usize, signal: Signal) {
        self.workers[number].as_ref().expect("it runs").signal(signal);
    }

    /// Kills a worker, and waits until it is gone.
    pub fn kill(&mut self, number: usize) {
        let worker = self.workers[number].take().expect("it runs");
        worker.signal(Signal::KILL);
        worker.end();
    }

    /// Asks a worker to end, and waits until it has.
    pub fn leave(&mut self, number: usize) {
        let worker = self.workers[number].take().expect("it runs");
        worker.signal(Signal::TERM);
        worker.end().success();
    }

    /// A worker's process id.
    pub fn pid(&self, number: usize) -> u32 {
        self.workers[number].as_ref().expect("it runs").pid()
    }

    /// Gives an operator's order, `drain` or `scale` with its arguments, and waits until it is carried out; what came of it.
    pub fn order(&self, order: &[&str]) -> String {
        self.operate(order).success()
    }

    /// Ends everything well.
    pub fn end(mut self) {
        for number in 0..self.workers.len() {
            if self.workers[number].is_some() {
                self.leave(number);
            }
        }
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.signal(Signal::TERM);
            coordinator.end().success();
        }
    }

    /// Runs a command of an operator, who knows the secret, to its end.
    pub fn operate(&self, args: &[&str]) -> Ended {
        operate(self.program, &self.join, args)
    }

    /// The numbers of the workers of the first group, by rank.
    pub async fn ranks(&self) -> Vec<usize> {
        ranks(&self.status().await)
    }

    /// How it stands.
    pub async fn status(&self) -> ClusterStatus {
        self.try_status().await.expect("a coordinator that leads")
    }

    async fn try_status(&self) -> Result<ClusterStatus, client::Error> {
        Client::connect(&self.clients).await?.status().await
    }

    /// Waits until the first group serves with so many ranks.
    pub async fn width(&self, ranks: usize) -> ClusterStatus {
        self.until(&format!("{ranks} ranks"), |status| status.serving && rank_count(status) == ranks).await
    }

    /// Waits for a status; until it leads, a coordinator has none.
    pub async fn until(&self, what: &str, wanted: impl Fn(&ClusterStatus) -> bool) -> ClusterStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.try_status().await;
            if let Ok(status) = &status
                && wanted(status)
            {
                return status.clone();
            }
            assert!(Instant::now() < deadline, "no {what}: {status:?}");
            sleep(POLL).await;
        }
    }
}

/// Ranks of the first group.
pub fn rank_count(status: &ClusterStatus) -> usize {
    status.groups.first().map_or(0, |group| group.ranks.len())
}

/// The numbers of the first group's workers, by rank.
pub fn ranks(status: &ClusterStatus) -> Vec<usize> {
    status.groups.first().map(|group| group.ranks.iter().map(number).collect()).unwrap_or_default()
}

/// The number of a rank's worker.
pub fn number(rank: &RankStatus) -> usize {
    let host = &rank.worker.as_ref().expect("a worker").host;
    host.rsplit_once('.').and_then(|(_, last)| last.parse::<usize>().ok()).expect("an address") - FIRST
}

/// Ranks of every stage of every group.
pub fn shape(status: &ClusterStatus) -> Vec<Vec<usize>> {
    let stages = |group: &GroupStatus| -> Vec<usize> {
        group.ranks.chunk_by(|one, next| one.stage == next.stage).map(<[_]>::len).collect()
    };
    status.groups.iter().map(stages).collect()
}

/// The last number of the first worker's address.
pub const FIRST: usize = 10;

/// A coordinator with these arguments; where workers join it, and where clients connect.
pub fn start_coordinator(program: Program, args: &[&str]) -> (Phalanx, String, String) {
    let mut coordinator =
        program.command([&["coordinator"], args].concat()).env("PHALANX_SECRET", SECRET).start();
    let (join, clients) = coordinator.coordinates_at();
    (coordinator, join, clients)
}

/// Runs a command of an operator, who knows the secret, to its end; `join` is the coordinator's address for workers.
pub fn operate(program: Program, join: &str, args: &[&str]) -> Ended {
    program.command([args, &["--coordinator", join]].concat()).env("PHALANX_SECRET", SECRET).run()
}

/// A worker, with the arguments that tell it where its coordinator is.
pub fn start_worker(program: Program, coordinator: &[&str], place: &Place) -> Phalanx {
    let mut args: Vec<String> = ["worker", "--threads", "1"].map(str::to_owned).into();
    args.extend(coordinator.iter().map(|argument| argument.to_string()));
    let port = place.port.unwrap_or(0);
    let listen = place.listen.as_ref().unwrap_or(&place.host);
    args.extend(["--listen".into(), format!("{listen}:{port}"), "--host".into(), place.host.clone()]);
    if let Some(port) = place.probe_port {
        args.extend(["--probe-port".into(), port.to_string()]);
    }
    let command = match &place.namespace {
        Some(namespace) => program.command_in(namespace, args),
        None => program.command(args),
    };
    command.env("PHALANX_SECRET", SECRET).start()
}

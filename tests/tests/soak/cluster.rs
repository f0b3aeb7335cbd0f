//! The cluster that goes through faults: workers, one of them behind a link that can be cut, and one or two coordinators.

use std::time::{Duration, Instant};

use client::{Client, ClusterStatus};
use phalanx_tests::etcd::Etcd;
use phalanx_tests::link::{Link, Place};
use phalanx_tests::members::{FIRST, shape, start_coordinator, start_worker};
use phalanx_tests::process::{LIMIT, Phalanx, Program, Signal};

const PHALANX: Program = Program(env!("CARGO_BIN_EXE_phalanx-under-test"));
const POLL: Duration = Duration::from_millis(20);
pub(crate) const WORKERS: usize = 4;
/// The worker behind the link.
pub(crate) const FAR: usize = 0;

/// How four workers are to serve.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) name: &'static str,
    arguments: &'static [&'static str],
    whole: &'static [&'static [usize]],
    /// With fewer workers nothing is served.
    pub(crate) fewest: usize,
}

pub(crate) const FORMS: [Form; 3] = [
    Form { name: "1 group of 1 stage", arguments: &["--ranks", "4"], whole: &[&[4]], fewest: 1 },
    Form {
        name: "1 group of 2 stages",
        arguments: &["--ranks", "2", "--stages", "2"],
        whole: &[&[2, 2]],
        fewest: 2,
    },
    Form {
        name: "2 groups of 1 stage",
        arguments: &["--ranks", "2", "--replicas", "2"],
        whole: &[&[2], &[2]],
        fewest: 1,
    },
];

/// What a process holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holds {
    pub(crate) memory: u64,
    pub(crate) descriptors: usize,
}

pub(crate) struct Cluster {
    form: Form,
    /// Where coordinators are elected, if there is more than one. Ended last.
    etcd: Option<Etcd>,
    pub(crate) link: Link,
    network: String,
    coordinators: Vec<Coordinator>,
    workers: Vec<Option<Phalanx>>,
    far: Far,
}

struct Coordinator {
    process: Phalanx,
    join: String,
    clients: String,
}

/// How the worker behind the link runs.
struct Far {
    place: Place,
    arguments: Vec<String>,
}

/// Bytes of memory and open descriptors of a process.
pub(crate) fn holds(pid: u32) -> Holds {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count();
    Holds { memory: kib << 10, descriptors }
}

impl Cluster {
    /// Starts all, and waits until it is whole.
    pub(crate) async fn start(form: Form) -> Self {
        let here: Vec<usize> = [1]
            .into_iter()
            .chain((0..WORKERS).map(|n| FIRST + n))
            .filter(|last| *last != FIRST + FAR)
            .collect();
        let (link, network) = Link::make(&here, FIRST + FAR);
        let etcd = Etcd::start();
        let mut cluster = Self {
            form,
            etcd,
            link,
            network,
            coordinators: Vec::new(),
            workers: (0..WORKERS).map(|_| None).collect(),
            far: Far { place: Place::default(), arguments: Vec::new() },
        };
        let any = cluster.host(1) + ":0";
        for _ in 0..if cluster.etcd.is_some() { 2 } else { 1 } {
            let coordinator = cluster.coordinator("127.0.0.1:0", &any);
            cluster.coordinators.push(coordinator);
        }
        let (place, join) = cluster.link.place(cluster.host(FIRST + FAR), &cluster.coordinators[0].join);
        let arguments = match &cluster.etcd {
            Some(etcd) => {
                let address = etcd.url.trim_start_matches("http://");
                let reached = cluster.link.reach(&cluster.host(1), address);
                vec!["--etcd".into(), format!("http://{reached}")]
            }
            None => vec!["--coordinator".into(), join],
        };
        cluster.far = Far { place, arguments };
        (0..WORKERS).for_each(|number| cluster.restart(number, None));
        cluster.whole().await;
        cluster
    }

    /// Where clients connect.
    pub(crate) fn clients(&self) -> String {
        self.coordinators.iter().map(|coordinator| coordinator.clients.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Whether another coordinator leads when one is lost.
    pub(crate) fn has_another_coordinator(&self) -> bool {
        self.coordinators.len() > 1
    }

    /// Kills a coordinator, and starts it again where it was.
    pub(crate) fn replace_coordinator(&mut self, place: usize) {
        let Coordinator { join, clients, .. } = &self.coordinators[place];
        let (join, clients) = (join.clone(), clients.clone());
        self.coordinators[place].process.signal(Signal::KILL);
        self.coordinators[place].process.wait();
        self.coordinators[place] = self.coordinator(&clients, &join);
    }

    /// Starts a worker that does not run.
    pub(crate) fn restart(&mut self, number: usize, fault: Option<&str>) {
        let here = Place { host: self.host(FIRST + number), ..Place::default() };
        let coordinator = match &self.etcd {
            Some(etcd) => ["--etcd", &etcd.url],
            None => ["--coordinator", &self.coordinators[0].join],
        };
        let (mut arguments, place) = match number {
            FAR => (self.far.arguments.iter().map(String::as_str).collect(), &self.far.place),
            _ => (coordinator.to_vec(), &here),
        };
        arguments.extend(fault.into_iter().flat_map(|fault| ["--fault", fault]));
        self.workers[number] = Some(start_worker(PHALANX, &arguments, place));
    }

    /// Kills a worker, which may have ended.
    pub(crate) fn kill(&mut self, number: usize) {
        let worker = self.workers[number].take().expect("it was started");
        worker.signal(Signal::KILL);
        worker.end();
    }

    /// Asks a worker to leave.
    pub(crate) fn leave(&mut self, number: usize) {
        let worker = self.workers[number].take().expect("it was started");
        worker.signal(Signal::TERM);
        worker.end().success();
    }

    pub(crate) fn signal(&self, number: usize, signal: Signal) {
        self.workers[number].as_ref().expect("it was started").signal(signal);
    }

    /// What coordinators hold, and what workers do; `ip netns exec` becomes what it starts.
    pub(crate) fn holdings(&self) -> (Vec<Holds>, Vec<Holds>) {
        let coordinators = self.coordinators.iter().map(|coordinator| holds(coordinator.process.pid()));
        let workers = self.workers.iter().flatten().map(|worker| holds(worker.pid()));
        (coordinators.collect(), workers.collect())
    }

    /// Waits until all workers have the part that they had at first.
    pub(crate) async fn whole(&self) -> ClusterStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status().await;
            if let Ok(status) = &status
                && status.serving
                && shape(status) == self.form.whole
                && status.groups.iter().all(|group| group.kv_blocks > 0)
            {
                return status.clone();
            }
            assert!(Instant::now() < deadline, "it does not become whole: {status:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) async fn status(&self) -> Result<ClusterStatus, client::Error> {
        Client::connect(&self.clients()).await?.status().await
    }

    /// Ends everything well.
    pub(crate) fn end(mut self) {
        (0..WORKERS).for_each(|number| self.leave(number));
        for Coordinator { process, .. } in self.coordinators {
            process.signal(Signal::TERM);
            process.end().success();
        }
    }

    fn host(&self, last: usize) -> String {
        format!("{}.{last}", self.network)
    }

    fn coordinator(&self, clients: &str, join: &str) -> Coordinator {
        let mut arguments =
            vec!["--min-ranks", "1", "--progress-timeout", "2", "--grpc", clients, "--listen", join];
        arguments.extend_from_slice(self.form.arguments);
        let host = self.host(1);
        if let Some(etcd) = &self.etcd {
            arguments.extend(["--etcd", &etcd.url, "--lease", "2", "--host", &host]);
        }
        let (process, join, clients) = start_coordinator(PHALANX, &arguments);
        Coordinator { process, join, clients }
    }
}

/// One worker alone, and where it is reached: what answers are compared with.
pub(crate) fn alone() -> (Phalanx, String) {
    let mut server = PHALANX.command(["serve", "--grpc", "127.0.0.1:0", "--workers", "1"]).start();
    let address = server.served_at();
    (server, address)
}

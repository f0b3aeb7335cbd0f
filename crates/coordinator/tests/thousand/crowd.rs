//! The other process: workers over TCP, each with a connection of its own, which come and go as the standard input says.

use std::io::BufRead;
use std::sync::Arc;
use std::time::Duration;

use auth::Secret;
use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::{CoordinatorMessage, StepFrame, StepReply, WorkerMessage};
use cluster::registry::election::{Addresses, Leader};
use cluster::{ModelReport, Resources};
use engine::MemoryNeeds;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::journal::Journal;
use crate::worker::collective::Rooms;
use crate::worker::control::Control;
use crate::worker::executor::Limits;
use crate::worker::line::{Dialer, Directory, Down, Line};
use crate::worker::model::VOCABULARY;
use crate::worker::{Pace, Worker};

/// Ranks of a group, and workers of a machine.
pub(crate) const RANKS: usize = 8;
pub(crate) const CONTEXT: u32 = 64;
const BLOCK_SIZE: u32 = 8;

/// What both processes know.
pub(crate) fn secret() -> Secret {
    Secret::new([7; 32]).expect("it is long enough")
}

/// Takes as many file descriptors as may be had: each worker has a socket.
pub(crate) fn take_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("up to the hard limit");
}

/// Serves as the other process until the standard input ends.
pub(crate) fn serve(coordinator: &str, workers: usize) {
    take_descriptors();
    let runtime = Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let _guard = runtime.enter();
    let directory = Directory::default();
    let addresses = Addresses { clients: coordinator.into(), workers: coordinator.into() };
    directory.set(Some(Leader { term: 1, candidate: "the only one".into(), addresses }));
    let (rooms, journal) = (Rooms::default(), Journal::new(0));
    let mut crowd: Vec<Option<(Arc<Control>, JoinSet<()>)>> = (0..workers).map(|_| None).collect();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<_> = line.split(' ').collect();
        let [what, first, end] = words[..] else { panic!("{line}") };
        let number = |word: &str| word.parse::<usize>().expect("a number");
        let (first, end) = (number(first), number(end));
        for (worker, place) in crowd.iter_mut().enumerate().take(end).skip(first) {
            match what {
                "start" => {
                    let (process, control) = process(worker, &directory, &rooms, &journal);
                    let mut task = JoinSet::new();
                    task.spawn(process.run());
                    *place = Some((control, task));
                }
                "leave" => *place = None,
                "freeze" => place.iter().for_each(|(control, _)| control.stopped.shut(true)),
                _ => panic!("{line}"),
            }
        }
    }
    drop(crowd);
    runtime.shutdown_background();
}

fn process(worker: usize, directory: &Directory, rooms: &Rooms, journal: &Journal) -> (Worker, Arc<Control>) {
    let control = Arc::new(Control::default());
    let zone = format!("machine{}", worker / RANKS);
    let limits =
        Limits { block_size: BLOCK_SIZE, kv_blocks: 200, steps_in_flight: 2, step_rows: 0, sampled_rows: 0 };
    let millisecond = Duration::from_millis(1);
    let process = Worker {
        address: format!("worker{worker}"),
        secret: secret(),
        report: ModelReport {
            name: "simulated".into(),
            vocabulary: VOCABULARY,
            max_context: CONTEXT,
            units: RANKS as u32,
            block_size: BLOCK_SIZE,
            eos: vec![],
            fingerprint: "simulated".into(),
            needs: MemoryNeeds { layers: 1, layer_unit: 100, ..MemoryNeeds::default() },
        },
        resources: Resources { zone, device: "cpu".into(), memory: 400, kv_memory: 400 },
        limits,
        pace: Pace { load: millisecond, step: millisecond, row: Duration::ZERO },
        dialer: Arc::new(Tcp),
        directory: directory.clone(),
        rooms: rooms.clone(),
        journal: journal.clone(),
        control: control.clone(),
    };
    (process, control)
}

/// Connections as workers make them.
struct Tcp;

struct Connection(ClusterClient<Channel>);

#[tonic::async_trait]
impl Dialer for Tcp {
    async fn dial(&self, _worker: &str, coordinator: &str) -> Result<Box<dyn Line>, Status> {
        let failed = |error: tonic::transport::Error| Status::unavailable(error.to_string());
        let endpoint = Endpoint::from_shared(format!("http://{coordinator}")).map_err(failed)?;
        let channel = endpoint
            .tcp_nodelay(true)
            .http2_keep_alive_interval(cluster::KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(cluster::KEEP_ALIVE_TIMEOUT)
            .connect()
            .await
            .map_err(failed)?;
        Ok(Box::new(Connection(ClusterClient::new(channel))))
    }
}

#[tonic::async_trait]
impl Line for Connection {
    async fn join(
        &self,
        up: mpsc::UnboundedReceiver<WorkerMessage>,
    ) -> Result<Down<CoordinatorMessage>, Status> {
        Ok(carry(self.0.clone().join(UnboundedReceiverStream::new(up)).await?.into_inner()))
    }

    async fn steps(&self, up: mpsc::UnboundedReceiver<StepReply>) -> Result<Down<StepFrame>, Status> {
        Ok(carry(self.0.clone().steps(UnboundedReceiverStream::new(up)).await?.into_inner()))
    }
}

/// Carries what comes until its end, or until nobody listens.
fn carry<T: Send + 'static>(mut from: Streaming<T>) -> Down<T> {
    let (to, carried) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                message = from.message() => match message {
                    Ok(Some(message)) => drop(to.send(Ok(message))),
                    Ok(None) => return,
                    Err(status) => return drop(to.send(Err(status))),
                },
                () = to.closed() => return,
            }
        }
    });
    carried
}

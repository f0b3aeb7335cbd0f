//! Connections between workers and coordinators in one process: what is sent takes its time, is held up, or meets a broken
//! connection. Nothing is lost on a connection that stands, as with TCP.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use cluster::proto::cluster_client::ClusterClient;
use cluster::proto::cluster_server::ClusterServer;
use cluster::proto::{CoordinatorMessage, StepFrame, StepReply, WorkerMessage};
use cluster::{KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT};
use coordinator::ContenderService;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::worker::control::Gate;
use crate::worker::line::{Dialer, Down, Line};
use crate::worker::model::mix;

/// A coordinator's service, called without a network in between.
pub(crate) type Service = ClusterServer<ContenderService>;

/// Clones are the same network.
#[derive(Clone, Default)]
pub(crate) struct Network(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    services: BTreeMap<String, Service>,
    /// How long messages of a worker take at most, either way.
    latencies: BTreeMap<String, Duration>,
    wires: Vec<Weak<Wire>>,
    /// Machines of which nothing is heard at present.
    silenced: BTreeMap<String, Arc<Gate>>,
    /// Those whose outputs are held up.
    congested: BTreeMap<String, Arc<Gate>>,
}

/// What two processes share of a connection.
struct Wire {
    worker: String,
    coordinator: String,
    latency: Duration,
    /// Messages that were carried.
    carried: AtomicU64,
    /// Messages are held up while it is shut.
    silence: Arc<Gate>,
    /// Outputs are held up while it is shut, and nothing else.
    congestion: Arc<Gate>,
    broken: CancellationToken,
}

impl Network {
    /// A coordinator listens.
    pub(crate) fn listen(&self, coordinator: &str, service: Service) {
        self.state().services.insert(coordinator.to_owned(), service);
    }

    /// It does not listen any more, and its connections break.
    pub(crate) fn close(&self, coordinator: &str) {
        self.state().services.remove(coordinator);
        self.break_where(|wire| wire.coordinator == coordinator);
    }

    /// The service of a coordinator, if it listens.
    pub(crate) fn service(&self, coordinator: &str) -> Option<Service> {
        self.state().services.get(coordinator).cloned()
    }

    /// Messages of a worker take so long at most.
    pub(crate) fn set_latency(&self, worker: &str, latency: Duration) {
        self.state().latencies.insert(worker.to_owned(), latency);
    }

    /// A worker's connections break.
    pub(crate) fn cut(&self, worker: &str) {
        self.break_where(|wire| wire.worker == worker);
    }

    /// Nothing passes between a worker and coordinators. Connections break when pings were not answered for long enough.
    pub(crate) fn silence(&self, worker: &str) {
        let silence = self.gate(worker);
        silence.shut(true);
        let wires: Vec<_> = self.wires().into_iter().filter(|wire| wire.worker == worker).collect();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = silence.pass() => {}
                () = sleep(KEEP_ALIVE_INTERVAL + KEEP_ALIVE_TIMEOUT) => {
                    wires.iter().for_each(|wire| wire.broken.cancel());
                }
            }
        });
    }

    /// It is heard of again.
    pub(crate) fn heal(&self, worker: &str) {
        self.gate(worker).shut(false);
    }

    /// A worker's outputs are held up, or go on: streams of a connection need not keep step with each other.
    pub(crate) fn congest(&self, worker: &str, congested: bool) {
        self.congestion(worker).shut(congested);
    }

    fn congestion(&self, worker: &str) -> Arc<Gate> {
        self.state().congested.entry(worker.to_owned()).or_default().clone()
    }

    fn gate(&self, worker: &str) -> Arc<Gate> {
        self.state().silenced.entry(worker.to_owned()).or_default().clone()
    }

    fn break_where(&self, which: impl Fn(&Wire) -> bool) {
        self.wires().iter().filter(|wire| which(wire)).for_each(|wire| wire.broken.cancel());
    }

    fn wires(&self) -> Vec<Arc<Wire>> {
        let mut state = self.state();
        state.wires.retain(|wire| wire.strong_count() > 0);
        state.wires.iter().filter_map(Weak::upgrade).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Dialer for Network {
    async fn dial(&self, worker: &str, coordinator: &str) -> Result<Box<dyn Line>, Status> {
        let silence = self.gate(worker);
        silence.pass().await;
        let congestion = self.congestion(worker);
        let mut state = self.state();
        let service = state.services.get(coordinator).cloned();
        let service = service.ok_or_else(|| Status::unavailable("nobody listens there"))?;
        let latency = state.latencies.get(worker).copied().unwrap_or_default();
        let wire = Arc::new(Wire {
            worker: worker.to_owned(),
            coordinator: coordinator.to_owned(),
            latency,
            carried: AtomicU64::new(0),
            silence,
            congestion,
            broken: CancellationToken::new(),
        });
        state.wires.push(Arc::downgrade(&wire));
        Ok(Box::new(Connection { service: ClusterClient::new(service), wire }))
    }
}

struct Connection {
    service: ClusterClient<Service>,
    wire: Arc<Wire>,
}

#[tonic::async_trait]
impl Line for Connection {
    async fn join(
        &self,
        up: mpsc::UnboundedReceiver<WorkerMessage>,
    ) -> Result<Down<CoordinatorMessage>, Status> {
        let up = self.wire.carry(UnboundedReceiverStream::new(up));
        let answer = async { self.service.clone().join(UnboundedReceiverStream::new(up)).await };
        Ok(self.wire.carry(self.wire.call(answer).await?.into_inner()))
    }

    async fn steps(&self, up: mpsc::UnboundedReceiver<StepReply>) -> Result<Down<StepFrame>, Status> {
        let congestion = self.wire.congestion.clone();
        let up = UnboundedReceiverStream::new(up).then(move |output| {
            let congestion = congestion.clone();
            async move {
                congestion.pass().await;
                output
            }
        });
        let up = self.wire.carry(Box::pin(up));
        let answer = async { self.service.clone().steps(UnboundedReceiverStream::new(up)).await };
        Ok(self.wire.carry(self.wire.call(answer).await?.into_inner()))
    }
}

impl Wire {
    /// Carries messages until their end, or until the connection breaks.
    fn carry<S>(self: &Arc<Self>, mut from: S) -> mpsc::UnboundedReceiver<S::Item>
    where
        S: Stream<Item: Send> + Unpin + Send + 'static,
    {
        let (to, carried) = mpsc::unbounded_channel();
        let wire = self.clone();
        tokio::spawn(async move {
            let all = async {
                while let Some(message) = from.next().await {
                    wire.pass().await;
                    if to.send(message).is_err() {
                        return;
                    }
                }
                // The end is a message too.
                wire.pass().await;
            };
            wire.broken.run_until_cancelled(all).await;
        });
        carried
    }

    async fn call<T>(&self, answer: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let broken = || Status::unavailable("the connection broke");
        self.broken.run_until_cancelled(answer).await.unwrap_or_else(|| Err(broken()))
    }

    async fn pass(&self) {
        // Each one its own time: streams are not in step.
        let carried = self.carried.fetch_add(1, Ordering::Relaxed);
        let millis = mix(carried) % (self.latency.as_millis() as u64 + 1);
        if millis > 0 {
            sleep(Duration::from_millis(millis)).await;
        }
        self.silence.pass().await;
    }
}

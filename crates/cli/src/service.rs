//! A coordinator with its gateway: what `coordinator` runs for many machines and an embedded cluster for one.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cluster::registry::election::{Addresses, Candidate, Election};
use cluster::registry::orders::OrderBook;
use cluster::registry::{ClusterName, Health, LEASE, MemoryRegistry, Registry};
use coordinator::{Contender, CoordinatorConfig, ModelInfo, State};
use gateway::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// Both servers, running.
pub(crate) struct Service {
    /// Where clients connect.
    pub(crate) grpc: SocketAddr,
    /// Where workers connect.
    pub(crate) cluster: SocketAddr,
    contender: Contender,
    registry: Arc<dyn Registry>,
    tokenizer: Option<Arc<Tokenizer>>,
    stop: CancellationToken,
    resign: CancellationToken,
    contest: JoinHandle<()>,
    gateway: JoinHandle<Result<(), gateway::ServeError>>,
    /// Others can go on with what this coordinator leaves.
    among_others: bool,
}

/// Where coordinators are elected, and as what this one stands.
pub(crate) struct Candidacy {
    registry: Arc<dyn Registry>,
    /// This machine, as clients and workers reach it.
    host: String,
    lease: Duration,
    among_others: bool,
}

impl Candidacy {
    /// The only coordinator there is.
    pub(crate) fn alone() -> Result<Self> {
        let name: ClusterName = "alone".parse().map_err(anyhow::Error::msg)?;
        let registry = Arc::new(MemoryRegistry::new(&name));
        Ok(Self { registry, host: Ipv4Addr::LOCALHOST.to_string(), lease: LEASE, among_others: false })
    }

    /// One of several, which share a registry.
    pub(crate) fn among_others(registry: Arc<dyn Registry>, host: String, lease: Duration) -> Self {
        Self { registry, host, lease, among_others: true }
    }
}

/// Opens a port; `flag` is what the address was given with.
pub(crate) async fn listen(flag: &str, address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {flag} {address}"))
}

/// The tokenizer of a checkpoint; a checkpoint without any is served in token ids.
pub(crate) fn tokenizer(dir: &Path) -> Result<Option<Arc<Tokenizer>>> {
    if !dir.join("tokenizer.json").exists() {
        eprintln!("{}: no tokenizer.json, so prompts and answers are token ids alone", dir.display());
        return Ok(None);
    }
    Ok(Some(Arc::new(Tokenizer::load(dir)?)))
}

impl Service {
    /// Starts both servers on bound listeners.
    pub(crate) async fn start(
        config: CoordinatorConfig,
        candidacy: Candidacy,
        grpc: TcpListener,
        cluster: TcpListener,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Self> {
        let (grpc_address, cluster_address) = (grpc.local_addr()?, cluster.local_addr()?);
        let Candidacy { registry, host, lease, among_others } = candidacy;
        let address = |bound: SocketAddr| format!("{host}:{}", bound.port());
        let addresses = Addresses { clients: address(grpc_address), workers: address(cluster_address) };
        let election = Election::watch(registry.as_ref()).await?;
        let candidate = Candidate::new(registry.clone(), addresses, lease);
        let (stop, resign) = (CancellationToken::new(), CancellationToken::new());
        let (contender, workers, contest) =
            Contender::start(config, candidate, election, OrderBook::new(registry.clone()), resign.clone());
        let engine = Arc::new(contender.clone());
        let gateway = gateway::serve(grpc, engine, tokenizer.clone(), stop.clone().cancelled_owned());
        let incoming = TcpIncoming::from(cluster).with_nodelay(Some(true));
        let members = Server::builder()
            .http2_keepalive_interval(Some(cluster::KEEP_ALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(cluster::KEEP_ALIVE_TIMEOUT))
            .add_service(workers.into_server())
            .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
        tokio::spawn(async move {
            if let Err(error) = members.await {
                tracing::error!(%error, "the cluster's port has closed");
            }
        });
        let gateway = tokio::spawn(gateway);
        Ok(Self {
            grpc: grpc_address,
            cluster: cluster_address,
            contender,
            registry,
            tokenizer,
            stop,
            resign,
            contest,
            gateway,
            among_others,
        })
    }

    /// Waits until a group serves.
    pub(crate) async fn ready(&self) -> Result<ModelInfo> {
        let mut state = self.contender.state();
        loop {
            match &*state.borrow_and_update() {
                State::Serving(model) => {
                    self.check(model)?;
                    return Ok(model.clone());
                }
                State::Failed(reason) => bail!("{reason}"),
                State::Standby(_) | State::Waiting(_) | State::Gathering { .. } | State::Loading => {}
            }
            state.changed().await.context("the coordinator has stopped")?;
        }
    }

    /// The coordinator.
    pub(crate) fn contender(&self) -> &Contender {
        &self.contender
    }

    /// Where the group stands.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.contender.state()
    }

    /// Whether the registry answers.
    pub(crate) fn registry(&self) -> watch::Receiver<Health> {
        self.registry.health()
    }

    /// Checks the tokenizer against what is served.
    pub(crate) fn check(&self, model: &ModelInfo) -> Result<()> {
        Ok(self.tokenizer.as_ref().map_or(Ok(()), |tokenizer| tokenizer.check(model.vocabulary))?)
    }

    /// Accepts nothing more, and waits for running answers; where there are other coordinators, these go on with them.
    pub(crate) async fn stop(self) -> Result<()> {
        self.stop.cancel();
        if self.among_others {
            self.resign.cancel();
        }
        self.gateway.await??;
        self.resign.cancel();
        Ok(self.contest.await?)
    }
}

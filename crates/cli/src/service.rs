//! A coordinator with its gateway: what `coordinator` runs for many machines and an embedded cluster for one.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use coordinator::{Coordinator, CoordinatorConfig, CoordinatorHandle, ModelInfo, State};
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
    handle: CoordinatorHandle,
    tokenizer: Option<Arc<Tokenizer>>,
    stop: CancellationToken,
    gateway: JoinHandle<Result<(), gateway::ServeError>>,
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
    pub(crate) fn start(
        config: CoordinatorConfig,
        grpc: TcpListener,
        cluster: TcpListener,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Result<Self> {
        let (grpc_address, cluster_address) = (grpc.local_addr()?, cluster.local_addr()?);
        let (handle, workers) = Coordinator::start(config);
        let stop = CancellationToken::new();
        let gateway =
            gateway::serve(grpc, Arc::new(handle.clone()), tokenizer.clone(), stop.clone().cancelled_owned());
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
        Ok(Self { grpc: grpc_address, cluster: cluster_address, handle, tokenizer, stop, gateway })
    }

    /// Waits until a group serves.
    pub(crate) async fn ready(&self) -> Result<ModelInfo> {
        let mut state = self.handle.state();
        loop {
            match &*state.borrow_and_update() {
                State::Serving(model) => {
                    if let Some(tokenizer) = &self.tokenizer {
                        tokenizer.check(model.vocabulary)?;
                    }
                    return Ok(model.clone());
                }
                State::Failed(reason) => bail!("{reason}"),
                State::Waiting(_) | State::Gathering { .. } | State::Loading => {}
            }
            state.changed().await.context("the coordinator has stopped")?;
        }
    }

    /// Where the group stands.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.handle.state()
    }

    /// Accepts nothing more and waits for running answers.
    pub(crate) async fn stop(self) -> Result<()> {
        self.stop.cancel();
        Ok(self.gateway.await??)
    }
}

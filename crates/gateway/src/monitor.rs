//! `phalanx.v1.Monitor`: what the engine tells of its cluster.
//!
//! It is on the public port: whoever looks after a cluster has its clients' address, and it gives away no secret and changes
//! nothing. The port of the workers stays closed to all who cannot prove the cluster's secret.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cluster::proto::monitor_server::Monitor;
use cluster::proto::{ClusterStatus, GetStatusRequest, WatchStatusRequest};
use coordinator::Engine;
use futures_util::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::answer::engine_status;

const USUAL_INTERVAL: u32 = 1000;
const SHORTEST_INTERVAL: u32 = 50;

/// Implements `phalanx.v1.Monitor` over an engine.
#[derive(Clone)]
pub(crate) struct MonitorService {
    engine: Arc<dyn Engine>,
    stopping: CancellationToken,
}

impl MonitorService {
    /// Ends all watches, which would hold up the shutdown, with `stopping`.
    pub(crate) fn new(engine: Arc<dyn Engine>, stopping: CancellationToken) -> Self {
        Self { engine, stopping }
    }

    /// Whether it goes on after so long.
    async fn pause(&self, interval: Duration) -> bool {
        tokio::select! {
            () = self.stopping.cancelled() => false,
            () = tokio::time::sleep(interval) => true,
        }
    }
}

#[tonic::async_trait]
impl Monitor for MonitorService {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<ClusterStatus>, Status> {
        self.engine.status().await.map(Response::new).map_err(engine_status)
    }

    type WatchStatusStream = Pin<Box<dyn Stream<Item = Result<ClusterStatus, Status>> + Send>>;

    async fn watch_status(
        &self,
        request: Request<WatchStatusRequest>,
    ) -> Result<Response<Self::WatchStatusStream>, Status> {
        let millis = request.get_ref().interval_millis.unwrap_or(USUAL_INTERVAL).max(SHORTEST_INTERVAL);
        let interval = Duration::from_millis(millis.into());
        let watch = stream::unfold((self.clone(), true), move |(monitor, first)| async move {
            if !first && !monitor.pause(interval).await {
                return None;
            }
            let status = monitor.engine.status().await.map_err(engine_status);
            Some((status, (monitor, false)))
        });
        Ok(Response::new(Box::pin(watch)))
    }
}

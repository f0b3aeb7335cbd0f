//! `grpc.health.v1.Health`, answered by the engine itself: serving exactly while steps run.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use cluster::proto::generation_server::SERVICE_NAME;
use coordinator::Engine;
use futures_util::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// Watchers hear of a change after this long at most.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// The health of the process and of its one public service.
#[derive(Clone)]
pub(crate) struct HealthService {
    engine: Arc<dyn Engine>,
    stopping: CancellationToken,
}

impl HealthService {
    /// Reports `NOT_SERVING` from `stopping` on, and ends all watches, which would hold up the shutdown.
    pub(crate) fn new(engine: Arc<dyn Engine>, stopping: CancellationToken) -> Self {
        Self { engine, stopping }
    }

    fn status(&self, service: &str) -> ServingStatus {
        if !service.is_empty() && service != SERVICE_NAME {
            ServingStatus::ServiceUnknown
        } else if self.stopping.is_cancelled() || self.engine.health().is_err() {
            ServingStatus::NotServing
        } else {
            ServingStatus::Serving
        }
    }

    /// The next status that differs from `last`; none after the last one of a process that stops.
    async fn change(&self, service: &str, last: Option<ServingStatus>) -> Option<ServingStatus> {
        loop {
            let stopping = self.stopping.is_cancelled();
            let status = self.status(service);
            if last != Some(status) {
                return Some(status);
            }
            if stopping {
                return None;
            }
            tokio::select! {
                () = self.stopping.cancelled() => {}
                () = tokio::time::sleep(WATCH_INTERVAL) => {}
            }
        }
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.status(&request.get_ref().service) {
            ServingStatus::ServiceUnknown => Err(Status::not_found("there is no such service")),
            status => Ok(Response::new(response(status))),
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (health, service) = (self.clone(), request.into_inner().service);
        let changes = stream::unfold((health, service, None), |(health, service, last)| async move {
            let status = health.change(&service, last).await?;
            Some((Ok(response(status)), (health, service, Some(status))))
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

//! The gateway on a socket: the public service, health and reflection.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use cluster::proto::FILE_DESCRIPTOR_SET;
use cluster::proto::generation_server::{GenerationServer, SERVICE_NAME};
use cluster::proto::monitor_server::{self, MonitorServer};
use coordinator::Engine;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::pb::health_server::{self, HealthServer};
use tonic_reflection::server::Builder;

use crate::health::HealthService;
use crate::monitor::MonitorService;
use crate::service::GenerationService;
use crate::tokenizer::Tokenizer;

/// A client that says nothing for so long is asked whether it is still there.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// One that does not reply for so long has hung up.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the gateway does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors of the services do not fit together.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The sockets gave out.
    #[error("serving: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// All public services; health turns to `NOT_SERVING` with `stopping`.
pub fn router(
    engine: Arc<dyn Engine>,
    tokenizer: Option<Arc<Tokenizer>>,
    stopping: CancellationToken,
) -> Result<Router, ServeError> {
    let generation = GenerationServer::new(GenerationService::new(Arc::clone(&engine), tokenizer))
        .max_decoding_message_size(cluster::PUBLIC_MESSAGE_LIMIT)
        .max_encoding_message_size(cluster::PUBLIC_MESSAGE_LIMIT);
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .add_service(generation)
        .add_service(MonitorServer::new(MonitorService::new(Arc::clone(&engine), stopping.clone())))
        .add_service(HealthServer::new(HealthService::new(engine, stopping)))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?);
    Ok(router)
}

/// Serves on a bound listener until `shutdown`; then accepts nothing more and ends when the running answers have.
/// A caller that can not wait for them gives the whole a time limit.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<dyn Engine>,
    tokenizer: Option<Arc<Tokenizer>>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let stopping = CancellationToken::new();
    let router = router(engine, tokenizer, stopping.clone())?;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let stopped = async {
        shutdown.await;
        stopping.cancel();
    };
    Ok(router.serve_with_incoming_shutdown(incoming, stopped).await?)
}

/// Describes the services that are on this socket, and not the internal ones of the same package.
fn reflection<'a>() -> Builder<'a> {
    Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(SERVICE_NAME)
        .with_service_name(monitor_server::SERVICE_NAME)
        .with_service_name(health_server::SERVICE_NAME)
}

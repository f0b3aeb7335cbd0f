//! One tensor rank: the RPC side around one executor thread.
//!
//! A worker joins its coordinator, waits for an assignment, loads its share on a thread of its own, and runs the plans
//! that come. When its group is lost it waits for the next assignment; when its coordinator is lost it joins again. `tokio`
//! ends at the channels in front of the executor thread, where everything blocking lives.

mod config;
mod error;
mod executor;
mod gpu;
mod join;
mod load;
mod session;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use kernels::{Backend, Cpu};
use tracing::{info, warn};

pub use config::{Device, WorkerConfig};
pub use error::WorkerError;

use crate::join::Identity;
use crate::load::{CpuLoad, Load, Site};
use crate::session::End;

/// Target of events that tell what part of a start is done: their messages are `device opened`, `joined`, `connected` and
/// `weights loaded`.
pub const STAGE: &str = "stage";

/// Pauses before a worker joins again that was not of use the last time.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Serves until `shutdown`, or until something is wrong that joining again would not change.
pub async fn run(config: WorkerConfig, shutdown: impl Future<Output = ()>) -> Result<(), WorkerError> {
    match config.device.clone() {
        Device::Cpu { threads } => {
            let backend = Cpu::new(threads).map_err(WorkerError::Device)?;
            info!(target: STAGE, "device opened");
            let site = Site::open(&config, backend.path())?;
            let identity = identity(config, &site);
            serve_until(&identity, CpuLoad { site, threads }, shutdown).await
        }
        Device::Cuda { options, collective } => gpu::run(config, options, collective, shutdown).await,
    }
}

fn identity(config: WorkerConfig, site: &Site) -> Identity {
    Identity {
        coordinator: config.coordinator,
        secret: config.secret,
        collective_address: site.address.clone(),
        host: config.advertised_host,
        report: site.report.clone(),
        join_timeout: config.join_timeout,
    }
}

async fn serve_until(
    identity: &Identity,
    load: impl Load,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    tokio::select! {
        result = serve(identity, load) => result,
        () = shutdown => Ok(()),
    }
}

/// Joins again and again; see [`run`].
async fn serve<L: Load>(identity: &Identity, load: L) -> Result<(), WorkerError> {
    let load = Arc::new(load);
    let mut pause = Duration::ZERO;
    loop {
        let joined = join::join(identity).await?;
        info!(coordinator = identity.coordinator, worker = %joined.worker, "joined");
        info!(target: STAGE, "joined");
        match session::serve(joined, load.clone()).await {
            End::Final(error) => return Err(error),
            End::Again { reason, served } => {
                // The first time at once: most likely another process was lost.
                let wait = if served { Duration::ZERO } else { pause };
                warn!(reason, ?wait, "joining again");
                tokio::time::sleep(wait).await;
                pause = (wait * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
            }
        }
    }
}

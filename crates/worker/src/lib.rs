//! One tensor rank: the RPC side around one executor thread.
//!
//! A worker joins its coordinator, waits for an assignment, loads its share on a thread of its own, and runs the plans
//! that come. When its group is lost it waits for the next assignment; when its coordinator is lost it joins again. All the while it
//! holds the weights that it has, and loads what a new share has beyond them. `tokio` ends at the channels in front of the executor
//! thread, where everything blocking lives.

mod config;
mod doctor;
mod error;
mod executor;
mod fault;
mod gpu;
mod join;
mod load;
mod probe;
mod session;
mod vitals;
mod whereabouts;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use cluster::doctor::Library;
use cluster::registry::members::WorkerEntry;
use kernels::Cpu;
use tracing::{info, warn};

pub use config::{Coordinators, Device, WorkerConfig};
pub use error::WorkerError;
pub use fault::Fault;

use crate::doctor::Examinee;
use crate::executor::ExecutorThread;
use crate::fault::{Faults, FaultyLoad};
use crate::join::Identity;
use crate::load::{CpuLoad, Load, Site};
use crate::session::End;
use crate::whereabouts::Whereabouts;

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
            let site = Site::open(&config, &backend)?;
            let identity = identity(config, &site, Vec::new()).await?;
            let faults = site.faults.clone();
            serve_until(&identity, CpuLoad { site, threads }, faults, shutdown).await
        }
        Device::Cuda { options, collective } => gpu::run(config, options, collective, shutdown).await,
    }
}

async fn identity(
    config: WorkerConfig,
    site: &Site,
    libraries: Vec<Library>,
) -> Result<Identity, WorkerError> {
    (config.listening)(&site.address);
    Ok(Identity {
        examinee: Arc::new(Examinee::start(&config, libraries).await?),
        coordinator: Whereabouts::open(&config.coordinator).await?,
        secret: config.secret,
        collective_address: site.address.clone(),
        host: config.advertised_host,
        report: site.report.clone(),
        resources: site.resources.clone(),
        join_timeout: config.join_timeout,
    })
}

async fn serve_until(
    identity: &Identity,
    load: impl Load,
    faults: Option<Faults>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let served = async {
        match faults {
            Some(faults) => serve(identity, FaultyLoad { load, faults }).await,
            None => serve(identity, load).await,
        }
    };
    let registration = identity.coordinator.register(WorkerEntry {
        host: identity.host.clone(),
        collective_address: identity.collective_address.clone(),
        model: identity.report.name.clone(),
        fingerprint: identity.report.fingerprint.clone(),
    });
    let result = tokio::select! {
        result = served => result,
        () = shutdown => Ok(()),
    };
    if let Some(registration) = registration {
        registration.end().await;
    }
    result
}

/// Joins again and again; see [`run`].
async fn serve(identity: &Identity, load: impl Load) -> Result<(), WorkerError> {
    let thread = ExecutorThread::start(load).map_err(WorkerError::Thread)?;
    let result = tokio::select! {
        result = serve_on(identity, &thread) => result,
        // It is not waited for.
        error = thread.hung() => return Err(error),
    };
    thread.end().await;
    result
}

async fn serve_on(identity: &Identity, thread: &ExecutorThread) -> Result<(), WorkerError> {
    let mut pause = Duration::ZERO;
    let mut latest_term = 0;
    loop {
        let joined = join::join(identity).await?;
        let leader = joined.leader.clone();
        info!(coordinator = leader.address, worker = %joined.worker, "joined");
        info!(target: STAGE, "joined");
        let superseded = identity.coordinator.superseded(&leader);
        match session::serve(joined, thread, &mut latest_term, superseded).await {
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

//! Why a worker ends.

use std::io;
use std::net::SocketAddr;

use cluster::registry::RegistryError;

/// What joining again would not change.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The checkpoint does not open.
    #[error("cannot open the model")]
    Model(#[source] model::Error),
    /// The device cannot be used.
    #[error("cannot use the device")]
    Device(#[source] kernels::Error),
    /// The system has no thread left.
    #[error("cannot start the executor thread")]
    Thread(#[source] io::Error),
    /// The address is taken or not this machine's.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Not an address.
    #[error("'{0}' is not an address such as localhost:7000")]
    Address(String),
    /// The registry does not tell who leads.
    #[error("cannot learn which coordinator leads")]
    Registry(#[source] RegistryError),
    /// Nobody answered.
    #[error("no coordinator at {address} for {seconds} s: {reason}")]
    NoCoordinator {
        /// Where, or where that would be said.
        address: String,
        /// How long it was tried.
        seconds: u64,
        /// How the last try ended.
        reason: String,
    },
    /// The coordinator does not want this worker; its own words.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// The coordinator could not prove itself.
    #[error("the coordinator at {0} does not know this worker's secret")]
    Secret(String),
    /// The way between GPUs that was asked for is not open.
    #[error("cannot connect the GPUs")]
    Connect(#[source] comm::Error),
    /// The executor thread does not come back from what it does.
    #[error(
        "the executor thread hangs: it has not left its group {seconds} s after that was over; start this worker again, since \
         only the end of its process frees what it holds"
    )]
    Hung {
        /// How long it was waited for.
        seconds: u64,
    },
    /// This rank's share does not load.
    #[error("cannot load the model")]
    Load(#[source] model::Error),
}

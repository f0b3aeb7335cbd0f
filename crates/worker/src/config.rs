//! What a worker needs to know.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use auth::Secret;
use cluster::registry::Registry;
use comm::CollectiveChoice;
use kernels::CudaOptions;
use model::ModelOptions;

use crate::Fault;

/// What a worker computes on.
#[derive(Debug, Clone, PartialEq)]
pub enum Device {
    /// A share of the CPU's cores.
    Cpu {
        /// Threads.
        threads: usize,
    },
    /// A GPU.
    Cuda {
        /// How it is used.
        options: CudaOptions,
        /// How it exchanges with those of the other ranks.
        collective: CollectiveChoice,
    },
}

/// Where a worker finds its coordinator.
#[derive(Debug, Clone)]
pub enum Coordinators {
    /// There is one, at this `host:port`.
    At(String),
    /// There may be several: the one that leads says so in the registry, and the worker has an entry there.
    Elected(Arc<dyn Registry>),
}

/// How one worker runs.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Where its coordinator is.
    pub coordinator: Coordinators,
    /// What the cluster's processes know.
    pub secret: Secret,
    /// Where its collectives listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where it answers the probes of an examination, at the address of its collectives; port 0 takes a free one.
    pub probe_port: u16,
    /// This machine, as other workers reach it.
    pub advertised_host: String,
    /// The checkpoint's folder.
    pub model: PathBuf,
    /// How the model is run.
    pub options: ModelOptions,
    /// What it computes on.
    pub device: Device,
    /// Label of the fast domain that it is in: ranks of a group are of one zone.
    pub zone: String,
    /// Bytes that its share may take, where it may not have all that is free.
    pub memory: Option<u64>,
    /// How long a coordinator may be out of reach.
    pub join_timeout: Duration,
    /// Is told where its collectives listen, once they do.
    pub listening: fn(&str),
    /// What is to break on purpose.
    pub faults: Vec<Fault>,
    /// Is given what people should see without asking: where a GPU's memory went, whenever a share was loaded.
    pub announce: fn(&str),
}

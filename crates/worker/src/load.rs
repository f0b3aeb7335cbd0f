//! What turns an assignment into an executor: connections first, then weights.

use std::ops::Range;
use std::time::Duration;

use auth::Secret;
use cluster::{Assignment, ModelReport, Resources, StageMembers};
use comm::{AbortHandle, GroupSpec, Listener, MeshCollective, StageLink, TcpTransport};
use kernels::{Backend, Cpu};
use model::{Executor, ModelExecutor, ModelSource, Stage};
use tracing::info;

use crate::{Device, STAGE, WorkerConfig, WorkerError};

/// All ranks connect within this time. They are told at the same moment, but one may still be ending what it did.
pub(crate) const FORM_LIMIT: Duration = Duration::from_secs(60);

/// Builds executors. It goes to the executor thread; what it builds never leaves that.
pub(crate) trait Load: Send + Sync + 'static {
    /// The connections with the other ranks.
    type Connections;
    /// What it builds.
    type Executor: Executor;

    /// Connects with the other ranks. Blocks; `abort` frees this and all later waits for others.
    fn connect(&self, assignment: &Assignment, abort: AbortHandle)
    -> Result<Self::Connections, model::Error>;
    /// Loads this rank's share.
    fn load(
        &self,
        assignment: &Assignment,
        connections: Self::Connections,
    ) -> Result<Self::Executor, model::Error>;
}

/// A rank's connections: with the others of its stage, and with the stages around.
pub(crate) type Connections = (TcpTransport, StageLink);

/// A checkpoint and the port of this worker's collectives: what a worker has before it is given a share.
pub(crate) struct Site {
    pub(crate) source: ModelSource,
    listener: Listener,
    secret: Secret,
    /// What it serves.
    pub(crate) report: ModelReport,
    /// What it brings.
    pub(crate) resources: Resources,
    /// Where its collectives are reached.
    pub(crate) address: String,
}

/// Shares on the CPU; ranks over TCP.
pub(crate) struct CpuLoad {
    pub(crate) site: Site,
    pub(crate) threads: usize,
}

impl Site {
    /// Opens the checkpoint and the listener: whatever is wrong with them shows before anybody is connected. `backend` is like the
    /// one that will run steps.
    pub(crate) fn open(config: &WorkerConfig, backend: &impl Backend) -> Result<Self, WorkerError> {
        let source = ModelSource::open(&config.model, config.options.clone()).map_err(WorkerError::Model)?;
        let model::Report { name, vocabulary, max_context, units, block_size, eos, fingerprint } =
            source.report(backend.path());
        let needs = source.needs(backend).map_err(WorkerError::Model)?;
        let resources = resources(config, backend).map_err(WorkerError::Device)?;
        let listener = Listener::bind(config.listen)
            .map_err(|source| WorkerError::Listen { address: config.listen, source })?;
        let address = host_and_port(&config.advertised_host, listener.address().port());
        Ok(Self {
            source,
            listener,
            secret: config.secret.clone(),
            report: ModelReport { name, vocabulary, max_context, units, block_size, eos, fingerprint, needs },
            resources,
            address,
        })
    }

    /// Connects with the other ranks.
    pub(crate) fn form(
        &self,
        assignment: &Assignment,
        abort: AbortHandle,
    ) -> Result<Connections, model::Error> {
        let Assignment { epoch, group, stage, rank, stages } = assignment;
        let addresses =
            |stage: &StageMembers| stage.members.iter().map(|member| member.address.clone()).collect();
        let spec = GroupSpec {
            group: group.clone(),
            epoch: (epoch.term, epoch.counter),
            stage: *stage,
            rank: *rank,
            stages: stages.iter().map(addresses).collect(),
            secret: self.secret.clone(),
        };
        Ok(self.listener.form(&spec, abort, FORM_LIMIT)?)
    }
}

/// An address as others are told it.
pub(crate) fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn resources(config: &WorkerConfig, backend: &impl Backend) -> Result<Resources, kernels::Error> {
    let available = backend.memory_budget()?;
    let memory = config.memory.map_or(available, |limit| limit.min(available));
    let kv_memory = match config.options.kv_memory {
        Some(bytes) => bytes,
        None => backend.kv_budget(u64::MAX)?.min(memory),
    };
    let device = match config.device {
        Device::Cpu { .. } => "cpu",
        Device::Cuda { .. } => "cuda",
    };
    Ok(Resources { zone: config.zone.clone(), device: device.into(), memory, kv_memory })
}

/// The assigned stage, with its link to the stages around.
pub(crate) fn stage(assignment: &Assignment, link: StageLink) -> Stage {
    Stage { layers: assignment.own_stage().layers.clone(), link }
}

/// The units of every rank of the assigned stage.
pub(crate) fn ranges(assignment: &Assignment) -> Vec<Range<usize>> {
    assignment.own_stage().members.iter().map(|member| member.units.clone()).collect()
}

impl Load for CpuLoad {
    type Connections = Connections;
    type Executor = ModelExecutor<Cpu, MeshCollective<TcpTransport>>;

    fn connect(&self, assignment: &Assignment, abort: AbortHandle) -> Result<Connections, model::Error> {
        self.site.form(assignment, abort)
    }

    fn load(
        &self,
        assignment: &Assignment,
        (transport, link): Connections,
    ) -> Result<Self::Executor, model::Error> {
        let ranges = ranges(assignment);
        let collective = MeshCollective::new(transport, ranges.clone())?;
        info!(target: STAGE, "connected");
        let executor = self.site.source.stage_executor(
            Cpu::new(self.threads)?,
            stage(assignment, link),
            &ranges,
            collective,
        )?;
        info!(target: STAGE, "weights loaded");
        Ok(executor)
    }
}

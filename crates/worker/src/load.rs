//! What turns an assignment into an executor: connections first, then the weights that are missing.

use std::ops::Range;
use std::time::Duration;

use auth::Secret;
use cluster::{Assignment, ModelReport, Part, Resources, StageMembers};
use comm::{AbortHandle, GroupSpec, Listener, MeshCollective, Neighbours, StageLink, TcpTransport};
use kernels::{Backend, Cpu};
use model::{Executor, Held, Loaded, ModelExecutor, ModelSource, Share, Stage};
use tracing::info;

use crate::fault::Faults;
use crate::{Device, STAGE, WorkerConfig, WorkerError};

/// All ranks connect within this time. They are told at the same moment, but one may still be ending what it did.
pub(crate) const FORM_LIMIT: Duration = Duration::from_secs(60);

/// Builds executors, on the executor thread. What it opens there never leaves that.
pub(crate) trait Load: Send + Sync + 'static {
    /// The connections with the other ranks.
    type Connections;
    /// A device with the weights that are on it: what there is between two epochs.
    type Held;
    /// What the connections become, once there is a device.
    type Formed;
    /// What runs steps.
    type Executor: Executor;

    /// Connects with the other ranks. Blocks; `abort` frees this and all later waits for others.
    fn connect(&self, assignment: &Assignment, abort: AbortHandle)
    -> Result<Self::Connections, model::Error>;
    /// Opens the device.
    fn open(&self) -> Result<Self::Held, model::Error>;
    /// Has `held` hold this rank's share and nothing else: keeps what it can, reads the rest. `abort` cuts it short; what had come stays.
    fn load(
        &self,
        assignment: &Assignment,
        connections: Self::Connections,
        abort: &AbortHandle,
        held: &mut Self::Held,
    ) -> Result<(Self::Formed, Loaded), model::Error>;
    /// Has `held` hold a part of the model for which there is no group yet, likewise.
    fn prepare(
        &self,
        part: &Part,
        abort: &AbortHandle,
        held: &mut Self::Held,
    ) -> Result<Loaded, model::Error>;
    /// Takes the memory that steps need beside the weights. After an error all is let go.
    fn start(
        &self,
        assignment: &Assignment,
        formed: Self::Formed,
        held: Self::Held,
    ) -> Result<Self::Executor, model::Error>;
    /// Leaves the group and frees that memory. After an error all is let go.
    fn leave(&self, executor: Self::Executor) -> Result<Self::Held, model::Error>;
}

/// A rank's connections: with the others of its stage, and with the stages around.
pub(crate) type Connections = (TcpTransport, Neighbours);

/// A checkpoint and the port of this worker's collectives: what a worker has before it is given a share.
pub(crate) struct Site {
    pub(crate) source: ModelSource,
    listener: Listener,
    secret: Secret,
    /// What breaks on purpose, if anything.
    pub(crate) faults: Option<Faults>,
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
            faults: Faults::new(&config.faults),
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
        Ok(match self.faults.as_ref().and_then(Faults::wires) {
            None => self.listener.form(&spec, abort, FORM_LIMIT)?,
            Some(wires) => self.listener.form_over(wires, &spec, abort, FORM_LIMIT)?,
        })
    }

    /// See [`Load::load`].
    pub(crate) fn load<B: Backend>(
        &self,
        assignment: &Assignment,
        stage: &Stage<B::Buffer>,
        abort: &AbortHandle,
        held: &mut Held<B>,
    ) -> Result<Loaded, model::Error> {
        let share = self.source.share(stage, &ranges(assignment), assignment.rank)?;
        self.hold(&share, abort, held)
    }

    /// See [`Load::prepare`].
    pub(crate) fn prepare<B: Backend>(
        &self,
        part: &Part,
        abort: &AbortHandle,
        held: &mut Held<B>,
    ) -> Result<Loaded, model::Error> {
        self.hold(&self.source.part(part.layers.clone(), part.units.clone())?, abort, held)
    }

    fn hold<B: Backend>(
        &self,
        share: &Share,
        abort: &AbortHandle,
        held: &mut Held<B>,
    ) -> Result<Loaded, model::Error> {
        self.source.load(held, share, &mut || match abort.is_aborted() {
            true => Err(comm::Error::Aborted.into()),
            false => {
                abort.gets_on();
                Ok(())
            }
        })
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
pub(crate) fn stage<B>(assignment: &Assignment, link: Box<dyn StageLink<B>>) -> Stage<B> {
    Stage { layers: assignment.own_stage().layers.clone(), link }
}

/// The units of every rank of the assigned stage.
pub(crate) fn ranges(assignment: &Assignment) -> Vec<Range<usize>> {
    assignment.own_stage().members.iter().map(|member| member.units.clone()).collect()
}

impl Load for CpuLoad {
    type Connections = Connections;
    type Held = Held<Cpu>;
    type Formed = (MeshCollective<TcpTransport>, Stage<<Cpu as Backend>::Buffer>);
    type Executor = ModelExecutor<Cpu, MeshCollective<TcpTransport>>;

    fn connect(&self, assignment: &Assignment, abort: AbortHandle) -> Result<Connections, model::Error> {
        self.site.form(assignment, abort)
    }

    fn open(&self) -> Result<Self::Held, model::Error> {
        Ok(Held::new(Cpu::new(self.threads)?))
    }

    fn load(
        &self,
        assignment: &Assignment,
        (transport, neighbours): Connections,
        abort: &AbortHandle,
        held: &mut Self::Held,
    ) -> Result<(Self::Formed, Loaded), model::Error> {
        let collective = MeshCollective::new(transport, ranges(assignment))?;
        let stage = stage(assignment, Box::new(neighbours.by_host()?));
        info!(target: STAGE, "connected");
        let loaded = self.site.load(assignment, &stage, abort, held)?;
        Ok(((collective, stage), loaded))
    }

    fn prepare(
        &self,
        part: &Part,
        abort: &AbortHandle,
        held: &mut Self::Held,
    ) -> Result<Loaded, model::Error> {
        self.site.prepare(part, abort, held)
    }

    fn start(
        &self,
        assignment: &Assignment,
        (collective, stage): Self::Formed,
        held: Self::Held,
    ) -> Result<Self::Executor, model::Error> {
        let executor = self.site.source.start(held, stage, &ranges(assignment), collective)?;
        info!(target: STAGE, "weights loaded");
        Ok(executor)
    }

    fn leave(&self, executor: Self::Executor) -> Result<Self::Held, model::Error> {
        executor.leave()
    }
}

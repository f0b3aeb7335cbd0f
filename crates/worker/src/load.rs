//! What turns an assignment into an executor: collective first, then weights.

use std::time::Duration;

use auth::Secret;
use cluster::{Assignment, ModelReport};
use comm::{AbortHandle, GroupSpec, Listener, MeshCollective, TcpTransport};
use kernels::Cpu;
use model::{Executor, ModelExecutor, ModelSource};

use crate::{WorkerConfig, WorkerError};

/// All ranks connect within this time. They are told at the same moment, but one may still be ending what it did.
const FORM_LIMIT: Duration = Duration::from_secs(60);

/// Builds executors. It goes to the executor thread; what it builds never leaves that.
pub(crate) trait Load: Send + Sync + 'static {
    /// What it builds.
    type Executor: Executor;

    /// Connects with the other ranks and loads this rank's share. Blocks; `abort` frees it from waiting for others.
    fn load(&self, assignment: &Assignment, abort: AbortHandle) -> Result<Self::Executor, model::Error>;
}

/// A checkpoint on the CPU, ranks over TCP.
pub(crate) struct CpuLoad {
    source: ModelSource,
    listener: Listener,
    secret: Secret,
    threads: usize,
    report: ModelReport,
}

impl CpuLoad {
    /// Opens the checkpoint and the listener: whatever is wrong with them shows before anybody is connected.
    pub(crate) fn open(config: &WorkerConfig) -> Result<Self, WorkerError> {
        let source = ModelSource::open(&config.model, config.options.clone()).map_err(WorkerError::Model)?;
        let backend = Cpu::new(config.threads).map_err(WorkerError::Device)?;
        let model::Report { name, vocabulary, max_context, units, block_size, eos, fingerprint } =
            source.report(&backend);
        let listener = Listener::bind(config.listen)
            .map_err(|source| WorkerError::Listen { address: config.listen, source })?;
        Ok(Self {
            source,
            listener,
            secret: config.secret.clone(),
            threads: config.threads,
            report: ModelReport { name, vocabulary, max_context, units, block_size, eos, fingerprint },
        })
    }

    /// What this worker serves.
    pub(crate) fn report(&self) -> ModelReport {
        self.report.clone()
    }

    /// Where its collectives listen, if `host` is this machine.
    pub(crate) fn address(&self, host: &str) -> String {
        let port = self.listener.address().port();
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

impl Load for CpuLoad {
    type Executor = ModelExecutor<Cpu, MeshCollective<TcpTransport>>;

    fn load(&self, assignment: &Assignment, abort: AbortHandle) -> Result<Self::Executor, model::Error> {
        let Assignment { epoch, group, rank, members } = assignment;
        let spec = GroupSpec {
            group: group.clone(),
            epoch: (epoch.term, epoch.counter),
            rank: *rank,
            peers: members.iter().map(|member| member.address.clone()).collect(),
            secret: self.secret.clone(),
        };
        let ranges: Vec<_> = members.iter().map(|member| member.units.clone()).collect();
        let transport = TcpTransport::form(&self.listener, &spec, abort, FORM_LIMIT)?;
        let collective = MeshCollective::new(transport, ranges.clone())?;
        self.source.executor(Cpu::new(self.threads)?, &ranges, collective)
    }
}

//! A whole cluster on this machine: coordinator and gateway in this process, each worker a process of its own.

mod given_up;
mod worker;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use auth::Secret;
use clap::Args;
use cluster::{Policy, Shortage};
use coordinator::{CoordinatorConfig, ModelInfo, State};
use engine::rank_ranges;
use futures_util::future::select_all;
use kernels::{Backend, Cpu};
use model::ModelSource;
use tokio::time::timeout;

use self::worker::{CommandLine, Worker};
use crate::args::{DeviceArg, ModelArgs};
use crate::fault::WorkerFault;
use crate::policy::{MAX_REPLICAS, Ranks, shape as shape_of};
use crate::service::{self, Candidacy, Service};

/// Enough to show that workers step together.
const DEFAULT_WORKERS: usize = 2;
/// How long answers that still run may take once this process is to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// All workers come, or this process ends: the first group waits for them.
const GATHER: Duration = Duration::from_secs(3600);

/// The cluster's shape.
#[derive(Debug, Clone, Args)]
pub(crate) struct EmbeddedArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Worker processes, each of which holds one rank's share [default: as many as the ranks of all groups; without --ranks 2, if the model has so many KV heads, and with --device cuda one for each GPU]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Tensor ranks of each stage, 1 to the model's KV heads; workers beyond those of all groups are spares [default: the workers, shared out over stages and groups]
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Stages of a group's pipeline, each of which holds a part of the layers
    #[arg(long, value_name = "N", default_value_t = 1)]
    stages: usize,
    /// Groups: each holds the whole model, and requests go to the one that suits them best
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_REPLICAS))]
    replicas: u32,
    /// How few ranks will do while a lost worker is started again, as long as weights and one context fit
    #[arg(long, value_name = "N", default_value_t = 1)]
    min_ranks: usize,
    /// Workers say nothing unless something is wrong.
    #[arg(skip)]
    pub(crate) quiet: bool,
    /// What is to break on purpose.
    #[arg(skip)]
    pub(crate) faults: Vec<WorkerFault>,
}

/// Where operators and further workers find the coordinator, and what they must know.
pub(crate) struct Access {
    pub(crate) listen: SocketAddr,
    /// None: nobody else knows it.
    pub(crate) secret: Option<String>,
}

impl Access {
    /// For nobody but this process and its workers.
    pub(crate) fn nobody() -> Self {
        Self { listen: (Ipv4Addr::LOCALHOST, 0).into(), secret: None }
    }
}

impl EmbeddedArgs {
    /// How many workers there are, and the ranks of a stage, of a model with so many KV heads.
    fn workers_and_ranks(&self, kv_heads: usize) -> Result<(usize, usize)> {
        let parts = self.stages * self.replicas as usize;
        let workers = match (self.workers, self.ranks, self.model.device) {
            (Some(workers), ..) => workers,
            (None, Some(ranks), _) => ranks * parts,
            (None, None, DeviceArg::Cpu) => DEFAULT_WORKERS.min(kv_heads).max(parts),
            (None, None, DeviceArg::Cuda(Some(_))) => 1,
            (None, None, DeviceArg::Cuda(None)) => kernels::gpus()?.min(kv_heads * parts),
        };
        let ranks = self.ranks.unwrap_or(workers / parts.max(1));
        let flag = if self.ranks.is_some() { "--ranks" } else { "--workers" };
        if workers < ranks * parts || (ranks == 0 && workers > 0) {
            let Self { stages, replicas, .. } = self;
            bail!(
                "--workers {workers}: fewer than {replicas} groups of {stages} stages of {} ranks take",
                ranks.max(1)
            );
        }
        rank_ranges(kv_heads, ranks).context(flag)?;
        Ok((workers, ranks))
    }
}

/// A running cluster.
pub(crate) struct Embedded {
    service: Service,
    workers: Vec<Worker>,
}

impl Embedded {
    /// Checks all that can be checked, opens the ports and starts the workers. `adapt` may change the coordinator's limits.
    pub(crate) async fn start(
        args: &EmbeddedArgs,
        grpc: SocketAddr,
        access: Access,
        adapt: impl FnOnce(CoordinatorConfig) -> Result<CoordinatorConfig>,
    ) -> Result<Self> {
        args.model.check()?;
        let dir = args.model.dir()?;
        // A worker would say the same, but later and from another process.
        let shape = ModelSource::open(&dir, args.model.options(false))?.config().shape;
        let (workers, ranks) = args.workers_and_ranks(shape.kv_heads)?;
        if let Some(WorkerFault { worker, fault }) = args.faults.iter().find(|fault| fault.worker >= workers)
        {
            bail!("--fault {worker}:{fault}: workers are 0 to {}", workers.saturating_sub(1));
        }
        let tokenizer = service::tokenizer(&dir)?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check(shape.vocab as u32).with_context(|| dir.display().to_string())?;
        }

        let random = || rand::random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect();
        let secret: String = access.secret.unwrap_or_else(random);
        let config = CoordinatorConfig::new(ranks, Secret::new(&secret)?);
        let shape = shape_of(Ranks::Fixed(ranks), Some(args.min_ranks.min(ranks)), args.stages)?;
        let config = adapt(CoordinatorConfig {
            max_batch_tokens: Some(args.model.max_batch_tokens()),
            max_sequences: Some(args.model.max_sequences()),
            policy: Policy { shape, replicas: args.replicas as usize, ..config.policy },
            gather: GATHER,
            ..config
        })?;
        let grpc = service::listen("--grpc", grpc).await?;
        let cluster = service::listen("--listen", access.listen).await?;
        let service = Service::start(config, Candidacy::alone()?, grpc, cluster, tokenizer).await?;
        let memory = memory_of_each(args.model.device, workers)?;
        let workers = (0..workers)
            .map(|index| {
                let mut model = args.model.command_line(index, workers)?;
                if args.quiet {
                    model.push("--quiet".into());
                }
                Worker::start(CommandLine {
                    index,
                    model,
                    memory,
                    coordinator: service.cluster,
                    secret: secret.clone(),
                    faults: args.faults.iter().filter(|f| f.worker == index).map(|f| f.fault).collect(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { service, workers })
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.service.grpc
    }

    /// Waits until the cluster serves, or cannot. A worker that ends so early would not do better if it were started again.
    pub(crate) async fn ready(&mut self) -> Result<ModelInfo> {
        let (workers, mut state) = (self.workers.len(), self.service.state());
        let ends = self.workers.iter_mut().map(|worker| Box::pin(worker.end()));
        let in_vain = |state: &State| match state {
            State::Waiting(shortage) => {
                !matches!(shortage, Shortage::Workers { joined, .. } | Shortage::Memory { joined, .. } if *joined < workers)
            }
            _ => false,
        };
        tokio::select! {
            ready = self.service.ready() => ready,
            Ok(state) = state.wait_for(in_vain) => bail!("{}", *state),
            (end, ..) = select_all(ends) => bail!("{}; what it had to say is above", end?),
        }
    }

    /// Does `work`; a worker that ends meanwhile, or hangs and is killed, is started again when the group has closed its ranks without it.
    pub(crate) async fn run<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let Self { service, workers } = self;
        let watches = workers.iter_mut().map(|worker| Box::pin(worker.keep_running(service.contender())));
        tokio::select! {
            result = work => result,
            (error, ..) = select_all(watches) => Err(error),
        }
    }

    /// Lets running answers end, then ends the workers; none is left when this returns.
    pub(crate) async fn stop(self) -> Result<()> {
        let stopped = timeout(DRAIN_LIMIT, self.service.stop()).await;
        for worker in self.workers {
            worker.stop().await?;
        }
        // Answers that took longer were cut off with the workers.
        stopped.unwrap_or(Ok(()))
    }
}

/// Workers share this machine's memory, but each has a GPU of its own.
fn memory_of_each(device: DeviceArg, workers: usize) -> Result<Option<u64>> {
    match device {
        DeviceArg::Cpu => Ok(Some(Cpu::new(1)?.memory_budget()? / workers.max(1) as u64)),
        DeviceArg::Cuda(_) => Ok(None),
    }
}

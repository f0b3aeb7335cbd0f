//! A whole cluster on this machine: coordinator and gateway in this process, each worker a process of its own.
//!
//! A worker's standard input is a pipe from here. However this process ends, the pipe closes and the worker leaves,
//! so none is left over.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use auth::Secret;
use clap::Args;
use coordinator::{CoordinatorConfig, ModelInfo};
use engine::rank_ranges;
use futures_util::future::select_all;
use model::ModelSource;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

use crate::args::{DeviceArg, ModelArgs};
use crate::secret::SECRET_VARIABLE;
use crate::service::{self, Service};

/// Enough to show that workers step together.
const DEFAULT_WORKERS: usize = 2;
/// How long answers that still run may take once this process is to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// How long a worker may take to leave before it is killed.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// The cluster's shape.
#[derive(Debug, Clone, Args)]
pub(crate) struct EmbeddedArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Worker processes, each of which holds one tensor rank's share; 1 to the model's KV heads [default: 2, if it has so many; with --device cuda, one for each GPU]
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Workers say nothing unless something is wrong.
    #[arg(skip)]
    pub(crate) quiet: bool,
}

/// A running cluster.
pub(crate) struct Embedded {
    service: Service,
    workers: Vec<Worker>,
}

/// A worker process.
struct Worker {
    process: Child,
    /// What it lives by. Kept apart, since waiting for a process closes the input that it still has.
    input: ChildStdin,
}

impl Embedded {
    /// Checks all that can be checked, opens the ports and starts the workers.
    pub(crate) async fn start(args: &EmbeddedArgs, grpc: SocketAddr) -> Result<Self> {
        args.model.check()?;
        let dir = args.model.dir()?;
        // A worker would say the same, but later and from another process.
        let shape = ModelSource::open(&dir, args.model.options(false))?.config().shape;
        let width = match (args.workers, args.model.device) {
            (Some(workers), _) => workers,
            (None, DeviceArg::Cpu) => DEFAULT_WORKERS.min(shape.kv_heads),
            (None, DeviceArg::Cuda(Some(_))) => 1,
            (None, DeviceArg::Cuda(None)) => kernels::gpus()?.min(shape.kv_heads),
        };
        rank_ranges(shape.kv_heads, width).context("--workers")?;
        let tokenizer = service::tokenizer(&dir)?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check(shape.vocab as u32).with_context(|| dir.display().to_string())?;
        }

        let secret: String = rand::random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect();
        let config = CoordinatorConfig {
            max_batch_tokens: Some(args.model.max_batch_tokens()),
            max_sequences: Some(args.model.max_sequences()),
            ..CoordinatorConfig::new(width, Secret::new(&secret)?)
        };
        let grpc = service::listen("--grpc", grpc).await?;
        let cluster = service::listen("loopback", (Ipv4Addr::LOCALHOST, 0).into()).await?;
        let service = Service::start(config, grpc, cluster, tokenizer)?;
        let workers = (0..width)
            .map(|index| {
                let mut model = args.model.command_line(index, width)?;
                if args.quiet {
                    model.push("--quiet".into());
                }
                spawn_worker(&model, service.cluster, &secret, index == 0)
            })
            .collect::<Result<_>>()?;
        Ok(Self { service, workers })
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.service.grpc
    }

    /// Waits until the cluster serves, or cannot.
    pub(crate) async fn ready(&mut self) -> Result<ModelInfo> {
        tokio::select! {
            ready = self.service.ready() => ready,
            error = lost_worker(&mut self.workers) => Err(error),
        }
    }

    /// Does `work` as long as all workers are there.
    pub(crate) async fn run<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            error = lost_worker(&mut self.workers) => Err(error),
        }
    }

    /// Lets running answers end, then ends the workers; none is left when this returns.
    pub(crate) async fn stop(self) -> Result<()> {
        let stopped = timeout(DRAIN_LIMIT, self.service.stop()).await;
        for Worker { mut process, input } in self.workers {
            drop(input);
            if timeout(LEAVE_LIMIT, process.wait()).await.is_err() {
                process.kill().await.context("cannot end a worker")?;
            }
        }
        // Answers that took longer were cut off with the workers.
        stopped.unwrap_or(Ok(()))
    }
}

fn spawn_worker(model: &[String], coordinator: SocketAddr, secret: &str, progress: bool) -> Result<Worker> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(&program);
    command.args(["worker", "--leave-with-stdin", "--coordinator", &coordinator.to_string()]);
    command.args(["--listen", "127.0.0.1:0", "--host", "127.0.0.1"]);
    if progress {
        command.arg("--progress");
    }
    command.args(model).env(SECRET_VARIABLE, secret);
    // A group of its own: Ctrl-C in a terminal is for this process, which then ends its workers.
    command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).kill_on_drop(true);
    let mut process =
        command.spawn().with_context(|| format!("cannot start a worker with {}", program.display()))?;
    let input = process.stdin.take().context("a worker has no standard input")?;
    Ok(Worker { process, input })
}

/// Ends when a worker does, which none should.
async fn lost_worker(workers: &mut [Worker]) -> anyhow::Error {
    let ends = workers
        .iter_mut()
        .enumerate()
        .map(|(index, worker)| Box::pin(async move { (index, worker.process.wait().await) }));
    match select_all(ends).await.0 {
        (index, Ok(status)) => anyhow!("worker {index} ended ({status}); what it had to say is above"),
        (index, Err(error)) => anyhow!("cannot watch worker {index}: {error}"),
    }
}

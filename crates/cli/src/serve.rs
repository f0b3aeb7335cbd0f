//! `phalanx serve`, `phalanx coordinator`, `phalanx worker`: the parts of a cluster, together or apart.

use std::io::Read;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use coordinator::{CoordinatorConfig, State};
use worker::WorkerConfig;

use crate::args::ModelArgs;
use crate::embedded::{Embedded, EmbeddedArgs};
use crate::secret::SecretArgs;
use crate::service::{self, Service};
use crate::signals::Signals;
use crate::stages::tell;

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) cluster: EmbeddedArgs,
    /// Address of the public gRPC service
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    grpc: SocketAddr,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    secret: SecretArgs,
    /// Folder of the checkpoint, for its tokenizer; weights are not read [default: the bundled yi-nano]
    #[arg(long, env = "PHALANX_MODEL", value_name = "DIR")]
    model: Option<std::path::PathBuf>,
    /// Workers of the group; it forms as soon as so many have joined
    #[arg(long, value_name = "N")]
    workers: usize,
    /// Address of the public gRPC service
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    grpc: SocketAddr,
    /// Address that workers join at
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7071")]
    listen: SocketAddr,
    /// Tokens that a prompt and its answer may have together, below what the model allows
    #[arg(long, value_name = "N")]
    max_context: Option<u32>,
    /// Rows of one step, decoding sequences and chunks of prompts, below what GPU workers have memory for [default: that, else 512]
    #[arg(long, value_name = "N")]
    max_batch_tokens: Option<u32>,
    /// Sequences that run at once, below what GPU workers have memory for [default: that, else 64]
    #[arg(long, value_name = "N")]
    max_sequences: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    secret: SecretArgs,
    #[command(flatten)]
    model: ModelArgs,
    /// The coordinator's address for workers
    #[arg(long, value_name = "HOST:PORT")]
    coordinator: String,
    /// Where this worker's collectives listen; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:0")]
    listen: SocketAddr,
    /// This machine's name or address, as the other workers reach it
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Seconds that the coordinator may be out of reach
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    join_timeout: u64,
    /// Draw a progress bar while loading
    #[arg(long)]
    progress: bool,
    /// Do not tell where a GPU's memory went
    #[arg(long)]
    quiet: bool,
    /// End when the standard input does: for workers that another process starts
    #[arg(long, hide = true)]
    leave_with_stdin: bool,
}

impl ServeArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let mut signals = Signals::listen()?;
        let mut cluster = Embedded::start(&self.cluster, self.grpc).await?;
        let served = serve_until(&mut cluster, &mut signals).await;
        cluster.stop().await?;
        served
    }
}

async fn serve_until(cluster: &mut Embedded, signals: &mut Signals) -> Result<()> {
    tokio::select! {
        biased;
        () = signals.shutdown() => return Ok(()),
        ready = cluster.ready() => {
            let model = ready?;
            println!("serving {} on {} workers at {}", model.name, model.ranks, cluster.address());
        }
    }
    tokio::select! {
        biased;
        () = signals.shutdown() => Ok(()),
        result = cluster.run(std::future::pending()) => result,
    }
}

impl CoordinatorArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let mut signals = Signals::listen()?;
        let dir = crate::args::model_dir(self.model.as_ref())?;
        let tokenizer = service::tokenizer(&dir)?;
        let config = CoordinatorConfig {
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            max_context: self.max_context,
            ..CoordinatorConfig::new(self.workers, self.secret.secret()?)
        };
        let grpc = service::listen("--grpc", self.grpc).await?;
        let listen = service::listen("--listen", self.listen).await?;
        let service = Service::start(config, grpc, listen, tokenizer)?;
        println!("workers join at {}, clients connect at {}", service.cluster, service.grpc);
        let mut state = service.state();
        loop {
            println!("{}", *state.borrow_and_update());
            if matches!(*state.borrow(), State::Serving(_)) {
                service.ready().await?;
            }
            tokio::select! {
                biased;
                () = signals.shutdown() => break,
                changed = state.changed() => changed?,
            }
        }
        service.stop().await
    }
}

impl WorkerArgs {
    pub(crate) async fn run(self) -> Result<()> {
        tracing::info!(target: worker::STAGE, "worker started");
        self.model.check()?;
        let config = WorkerConfig {
            coordinator: self.coordinator,
            secret: self.secret.secret()?,
            listen: self.listen,
            advertised_host: self.host,
            device: self.model.device(),
            model: self.model.dir()?,
            options: self.model.options(self.progress),
            join_timeout: Duration::from_secs(self.join_timeout),
            announce: if self.quiet { |_| {} } else { tell },
        };
        if self.leave_with_stdin {
            leave_with_stdin();
        }
        let mut signals = Signals::listen()?;
        Ok(worker::run(config, signals.shutdown()).await?)
    }
}

/// Ends this process when its standard input ends, whatever its threads are doing: weights and KV go with it.
fn leave_with_stdin() {
    std::thread::spawn(|| {
        let mut rest = [0; 64];
        while matches!(std::io::stdin().read(&mut rest), Ok(count) if count > 0) {}
        std::process::exit(0);
    });
}

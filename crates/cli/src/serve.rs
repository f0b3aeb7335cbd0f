//! `phalanx serve`, `phalanx coordinator`, `phalanx worker`: the parts of a cluster, together or apart.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use cluster::registry::LEASE;
use coordinator::{CoordinatorConfig, State};
use worker::{Coordinators, WorkerConfig};

use crate::args::{ModelArgs, parse_size};
use crate::embedded::{Access, Embedded, EmbeddedArgs};
use crate::fault::{FaultArgs, WorkerFault};
use crate::policy::{LivenessArgs, PolicyArgs};
use crate::registry::RegistryArgs;
use crate::secret::SecretArgs;
use crate::service::{self, Candidacy, Service};
use crate::signals::Signals;
use crate::stages::tell;

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) cluster: EmbeddedArgs,
    #[command(flatten)]
    liveness: LivenessArgs,
    /// Address of the public gRPC service
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    grpc: SocketAddr,
    /// Address that operators (`phalanx drain`, `phalanx scale`) and further workers use, if they know the secret [default: none but this process's own workers do, on a free port]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    #[command(flatten)]
    secret: SecretArgs,
    /// For tests and drills: BREAK WORKER NUMBER WORKER ON PURPOSE, counted from 0, as 'phalanx worker --fault SPEC' does; once it is started again, it has no fault. May be given several times
    #[arg(long = "fault", value_name = "WORKER:SPEC")]
    faults: Vec<WorkerFault>,
}

#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    secret: SecretArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    /// With --etcd: this machine's name or address, as clients and workers reach it
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// With --etcd: seconds that another coordinator waits after this one fell silent, before it leads
    #[arg(long, value_name = "SECONDS", default_value_t = LEASE.as_secs(), value_parser = clap::value_parser!(u64).range(2..=3600))]
    lease: u64,
    /// Folder of the checkpoint, for its tokenizer; weights are not read [default: the bundled yi-nano]
    #[arg(long, env = "PHALANX_MODEL", value_name = "DIR")]
    model: Option<std::path::PathBuf>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    liveness: LivenessArgs,
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
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "etcd", conflicts_with = "etcd")]
    coordinator: Option<String>,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Where this worker's collectives listen; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:0")]
    listen: SocketAddr,
    /// This machine's name or address, as the other workers reach it
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Label of the fast domain that this worker is in (GPUs that NVLink connects, a network without slow links): ranks of a group are of one zone
    #[arg(long, value_name = "LABEL", default_value = "")]
    zone: String,
    /// Memory that this worker's weights, activations and KV cache may take together, where several share a machine [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Seconds that the coordinator may be out of reach
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    join_timeout: u64,
    /// Draw a progress bar while loading
    #[arg(long)]
    progress: bool,
    #[command(flatten)]
    faults: FaultArgs,
    /// Do not tell where a GPU's memory went
    #[arg(long)]
    quiet: bool,
    /// End when the standard input does: for workers that another process starts
    #[arg(long, hide = true)]
    leave_with_stdin: bool,
}

impl ServeArgs {
    pub(crate) async fn run(mut self) -> Result<()> {
        let mut signals = Signals::listen()?;
        self.cluster.faults = std::mem::take(&mut self.faults);
        let access = match self.listen {
            Some(listen) => Access { listen, secret: Some(self.secret.text()?) },
            None => Access::nobody(),
        };
        let adapt = |config| self.liveness.apply(config);
        let mut cluster = Embedded::start(&self.cluster, self.grpc, access, adapt).await?;
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
            policy: self.policy.policy(self.max_context)?,
            ..CoordinatorConfig::new(1, self.secret.secret()?)
        };
        let config = self.liveness.apply(config)?;
        let grpc = service::listen("--grpc", self.grpc).await?;
        let listen = service::listen("--listen", self.listen).await?;
        let candidacy = match self.registry.open().await? {
            Some(registry) => Candidacy::among_others(registry, self.host, Duration::from_secs(self.lease)),
            None => Candidacy::alone()?,
        };
        let service = Service::start(config, candidacy, grpc, listen, tokenizer).await?;
        println!("workers join at {}, clients connect at {}", service.cluster, service.grpc);
        let (mut state, mut registry) = (service.state(), service.registry());
        println!("{}", *state.borrow_and_update());
        loop {
            if let State::Serving(model) = &*state.borrow() {
                service.check(model)?;
            }
            tokio::select! {
                biased;
                () = signals.shutdown() => break,
                changed = state.changed() => {
                    changed?;
                    println!("{}", *state.borrow_and_update());
                }
                changed = registry.changed() => {
                    changed?;
                    println!("{}", *registry.borrow_and_update());
                }
            }
        }
        service.stop().await
    }
}

impl WorkerArgs {
    pub(crate) async fn run(self) -> Result<()> {
        tracing::info!(target: worker::STAGE, "worker started");
        self.model.check()?;
        self.faults.warn();
        let coordinator = match (self.coordinator, self.registry.open().await?) {
            (Some(address), _) => Coordinators::At(address),
            (None, Some(registry)) => Coordinators::Elected(registry),
            (None, None) => bail!("give --coordinator HOST:PORT or --etcd URL"),
        };
        let config = WorkerConfig {
            coordinator,
            secret: self.secret.secret()?,
            listen: self.listen,
            advertised_host: self.host,
            device: self.model.device(),
            zone: self.zone,
            memory: self.memory,
            model: self.model.dir()?,
            options: self.model.options(self.progress),
            join_timeout: Duration::from_secs(self.join_timeout),
            listening: if self.leave_with_stdin { tell_parent } else { |_| {} },
            faults: self.faults.faults,
            announce: if self.quiet { |_| {} } else { tell },
        };
        if self.leave_with_stdin {
            leave_with_stdin();
        }
        let mut signals = Signals::listen()?;
        Ok(worker::run(config, signals.shutdown()).await?)
    }
}

/// Tells the process that started this worker where it listens. If that is gone, so is this one soon.
fn tell_parent(address: &str) {
    let _ = writeln!(std::io::stdout(), "{address}");
}

/// Ends this process when its standard input ends, whatever its threads are doing: weights and KV go with it.
fn leave_with_stdin() {
    std::thread::spawn(|| {
        let mut rest = [0; 64];
        while matches!(std::io::stdin().read(&mut rest), Ok(count) if count > 0) {}
        std::process::exit(0);
    });
}

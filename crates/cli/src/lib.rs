//! The one binary: arguments, wiring, and what people see.

mod args;
mod bench;
mod chat;
mod checkpoint;
mod cuda_kernels;
mod doctor;
mod embedded;
mod fault;
mod generate;
mod operate;
mod policy;
mod registry;
mod sampling;
mod secret;
mod serve;
mod service;
mod signals;
mod stages;
mod status;
mod target;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

/// Serves Yi models on a cluster whose workers step together.
///
/// `phalanx generate --prompt "In the beginning"` tries it on this machine; `phalanx serve` keeps it running; `phalanx
/// coordinator` and `phalanx worker` are the same parts on several machines. RUST_LOG=info tells more.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt
    Generate(generate::GenerateArgs),
    /// Talk with a chat model
    Chat(chat::ChatArgs),
    /// Serve a model with a whole cluster on this machine
    Serve(serve::ServeArgs),
    /// Run a cluster's coordinator, with the public gRPC service
    Coordinator(serve::CoordinatorArgs),
    /// Run one worker of a cluster
    Worker(serve::WorkerArgs),
    /// Show how a running cluster stands: groups, ranks, rates, spares, and what happened last
    Status(status::StatusArgs),
    /// Have a worker no part in any group, so that it may be stopped without notice
    Drain(operate::DrainArgs),
    /// Examine a cluster: versions, links, clocks, disks; names whoever is at fault
    Doctor(doctor::DoctorArgs),
    /// Ask for other groups: more or fewer ranks, stages, replicas
    Scale(operate::ScaleArgs),
    /// Look at checkpoints, rename their tensors, make random ones
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
    /// Compile the CUDA kernels ahead of time
    #[command(subcommand)]
    Kernels(cuda_kernels::KernelsCommand),
    /// Measure the engine on this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Self::Generate(args) => on_runtime(args.run()),
            Self::Chat(args) => on_runtime(args.run()),
            Self::Serve(args) => on_runtime(args.run()),
            Self::Coordinator(args) => on_runtime(args.run()),
            Self::Worker(args) => on_runtime(args.run()),
            Self::Status(args) => on_runtime(args.run()),
            Self::Drain(args) => on_runtime(args.run()),
            Self::Doctor(args) => on_runtime(args.run()),
            Self::Scale(args) => on_runtime(args.run()),
            Self::Checkpoint(command) => command.run(),
            Self::Kernels(command) => command.run(),
            Self::Bench(command) => command.run(),
        }
    }
}

/// Runs the program; what goes wrong is told on the standard error and in the exit code.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    let log = fmt::layer().with_writer(std::io::stderr).with_filter(filter);
    tracing_subscriber::registry().with(log).with(stages::layer()).init();
    match arguments.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn on_runtime(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("cannot start the runtime")?;
    let result = runtime.block_on(work);
    // A thread that still reads the terminal must not hold up the end.
    runtime.shutdown_background();
    result
}

//! `phalanx drain` and `phalanx scale`: planned changes of a running cluster.

use anyhow::Result;
use clap::Args;
use cluster::Order;

use crate::policy::{MAX_REPLICAS, Ranks, shape};
use crate::secret::SecretArgs;

/// Where orders go, and what proves that one may give them.
#[derive(Debug, Args)]
pub(crate) struct OperatorArgs {
    #[command(flatten)]
    pub(crate) secret: SecretArgs,
    /// The coordinator's address for workers; of several coordinators all, with commas
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7071")]
    pub(crate) coordinator: String,
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Where the worker's collectives listen, as `phalanx status` tells it
    #[arg(value_name = "WORKER")]
    worker: String,
    /// Let it have a part again
    #[arg(long)]
    undo: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    operator: OperatorArgs,
    /// Tensor ranks of a stage, or 'auto'
    #[arg(long, value_name = "N|auto", required_unless_present = "replicas")]
    ranks: Option<Ranks>,
    /// How few ranks will do while workers are missing [default: no fewer than --ranks]
    #[arg(long, value_name = "N", requires = "ranks")]
    min_ranks: Option<usize>,
    /// Stages of a group's pipeline; with 'auto', at most
    #[arg(long, value_name = "N", default_value_t = 1, requires = "ranks")]
    stages: usize,
    /// Groups, at most [default: as many as before]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_REPLICAS))]
    replicas: Option<u32>,
}

impl DrainArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let Self { operator, worker: address, undo } = self;
        operator.give(if undo { Order::Restore { address } } else { Order::Drain { address } }).await
    }
}

impl ScaleArgs {
    pub(crate) async fn run(self) -> Result<()> {
        let Self { operator, ranks, min_ranks, stages, replicas } = self;
        let shape = ranks.map(|ranks| shape(ranks, min_ranks, stages)).transpose()?;
        operator.give(Order::Scale { shape, replicas: replicas.map(|replicas| replicas as usize) }).await
    }
}

impl OperatorArgs {
    async fn give(&self, order: Order) -> Result<()> {
        println!("{}", client::operate(&self.coordinator, &self.secret.secret()?, &order).await?);
        Ok(())
    }
}

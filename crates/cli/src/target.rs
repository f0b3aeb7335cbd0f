//! Who answers: a server that runs already, or a cluster of this command's own.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use client::Client;

use crate::embedded::{Access, Embedded, EmbeddedArgs};
use crate::signals::Signals;

#[derive(Debug, Args)]
pub(crate) struct TargetArgs {
    /// A running server's address, or those of several with commas between; without it a cluster of this command's own starts on this machine and ends with it
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["model", "workers", "ranks", "min_ranks", "dtype", "kv_dtype", "max_context", "kv_memory", "threads", "device", "max_batch_tokens", "max_sequences", "steps_in_flight", "collective", "deterministic", "weights", "gpu_memory_utilization"])]
    server: Option<String>,
    /// Seconds without a server after which an answer is given up; until then it goes on where it was
    #[arg(long, value_name = "SECONDS", default_value_t = client::PATIENCE.as_secs())]
    patience: u64,
    #[command(flatten)]
    cluster: EmbeddedArgs,
}

impl TargetArgs {
    /// Does `work` with a client; Ctrl-C ends it early, and a cluster of this command's own is gone afterwards either way.
    pub(crate) async fn with_client(self, work: impl AsyncFnOnce(Client) -> Result<()>) -> Result<()> {
        let mut signals = Signals::listen()?;
        let patience = Duration::from_secs(self.patience);
        if let Some(address) = self.server {
            let client = Client::connect(&address).await?.with_patience(patience);
            return tokio::select! {
                biased;
                () = signals.shutdown() => Ok(()),
                result = work(client) => result,
            };
        }
        // An answer is what was asked for.
        let mut args = self.cluster;
        args.quiet = true;
        let mut cluster =
            Embedded::start(&args, (Ipv4Addr::LOCALHOST, 0).into(), Access::nobody(), Ok).await?;
        let address = cluster.address().to_string();
        let result = tokio::select! {
            biased;
            () = signals.shutdown() => Ok(()),
            result = async {
                cluster.ready().await?;
                let client = Client::connect(&address).await?.with_patience(patience);
                cluster.run(work(client)).await
            } => result,
        };
        cluster.stop().await?;
        result
    }
}

//! The cluster's secret, as the command line gets it.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use auth::Secret;
use clap::Args;

/// The environment variable that holds it; an argument would show in the list of processes.
pub(crate) const SECRET_VARIABLE: &str = "PHALANX_SECRET";

/// Where the secret is found.
#[derive(Debug, Args)]
pub(crate) struct SecretArgs {
    /// File with the cluster's secret, at least 16 bytes [default: the environment variable PHALANX_SECRET]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

impl SecretArgs {
    pub(crate) fn secret(&self) -> Result<Secret> {
        Ok(Secret::new(&self.text()?)?)
    }

    /// The secret as it is written.
    pub(crate) fn text(&self) -> Result<String> {
        let text = match &self.secret_file {
            Some(path) => {
                std::fs::read_to_string(path).with_context(|| format!("--secret-file {}", path.display()))?
            }
            None => match std::env::var(SECRET_VARIABLE) {
                Ok(text) => text,
                Err(_) => {
                    bail!("the cluster's secret is missing: set {SECRET_VARIABLE} or give --secret-file FILE")
                }
            },
        };
        Ok(text.trim().to_owned())
    }
}

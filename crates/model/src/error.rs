//! What can go wrong with a model, from its files to a step.

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;

/// Why a model cannot be loaded or a step cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `config.json` or `generation_config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// The other ranks.
    #[error(transparent)]
    Collective(#[from] comm::Error),
    /// An option that this model does not allow; the text names it and the limit.
    #[error("{0}")]
    Option(String),
    /// A plan that breaks its own rules, or those of this rank.
    #[error("step {step} cannot be run: {what}")]
    Plan {
        /// Which.
        step: u64,
        /// Why.
        what: String,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

//! Yi on any backend: config, checkpoint and tensor names, sharded weights, the forward pass, sampling, and the
//! executor that runs step plans.

pub mod checkpoint;
pub mod config;
pub mod executor;
pub mod names;

mod error;
mod forward;
mod held;
mod needs;
mod slots;
mod source;
mod stage;
mod weights;

pub use config::Config;
pub use error::{Error, Result};
pub use executor::{Executor, ModelExecutor};
pub use forward::SAMPLING_RANK;
pub use held::Held;
pub use source::{ModelOptions, ModelSource, Report, StepSize};
pub use stage::Stage;
pub use weights::{Loaded, Share, readers};

//! What the whole-cluster tests share.

pub mod golden;
pub mod process;
pub mod ranks;
pub mod stages;

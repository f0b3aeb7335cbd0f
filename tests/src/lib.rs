//! What the whole-cluster tests share.

pub mod etcd;
pub mod golden;
pub mod process;
pub mod ranks;

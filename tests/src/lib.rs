//! What the whole-cluster tests share.

pub mod etcd;
pub mod golden;
pub mod link;
pub mod members;
pub mod process;
pub mod ranks;
pub mod stages;
pub mod streams;

//! A worker as groups are formed out of it.

use std::fmt;

use crate::convert::{self, Malformed};
use crate::{ModelReport, proto};

/// A worker's number with its coordinator; a worker that joins again gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A worker that could take part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its number.
    pub id: WorkerId,
    /// Where its collectives listen.
    pub address: String,
    /// The machine that it runs on.
    pub host: String,
    /// What it serves.
    pub report: ModelReport,
    /// What it brings.
    pub resources: Resources,
}

/// What a worker brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its fast domain: GPUs that NVLink connects, or a network without slow links. Ranks of a stage are of one zone.
    pub zone: String,
    /// `cpu` or `cuda`.
    pub device: String,
    /// Bytes that weights, activations and KV cache may take together.
    pub memory: u64,
    /// Bytes of these that the KV cache may take.
    pub kv_memory: u64,
}

impl From<Resources> for proto::Resources {
    fn from(resources: Resources) -> Self {
        let Resources { zone, device, memory, kv_memory } = resources;
        Self { zone, device, memory, kv_memory }
    }
}

impl TryFrom<proto::Resources> for Resources {
    type Error = Malformed;

    fn try_from(resources: proto::Resources) -> Result<Self, Malformed> {
        let proto::Resources { zone, device, memory, kv_memory } = resources;
        let (zone, device) =
            (convert::text("hello.resources.zone", zone)?, convert::text("hello.resources.device", device)?);
        Ok(Self { zone, device, memory, kv_memory })
    }
}

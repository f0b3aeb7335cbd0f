//! Which way sums between GPUs are to go. It is there also where the GPU backend is not built in.

use std::fmt;
use std::str::FromStr;

/// What `--collective` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CollectiveChoice {
    /// The fastest way that all ranks of the group have.
    #[default]
    Auto,
    /// NCCL.
    Nccl,
    /// Kernels of our own over memory that the GPUs of one machine share.
    Peer,
    /// The memory of the host and the network.
    Host,
}

const NAMES: [(CollectiveChoice, &str); 4] = [
    (CollectiveChoice::Auto, "auto"),
    (CollectiveChoice::Nccl, "nccl"),
    (CollectiveChoice::Peer, "peer"),
    (CollectiveChoice::Host, "host"),
];

impl fmt::Display for CollectiveChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(choice, _)| choice == self).map_or("auto", |(_, name)| name))
    }
}

impl FromStr for CollectiveChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(choice, _)| *choice).ok_or_else(|| format!("'{text}' is not auto, nccl, peer or host"))
    }
}

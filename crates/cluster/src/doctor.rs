//! Examining a cluster: what workers tell and measure, who measures with whom and when, and what is odd about it. Pure.

mod diagnosis;
mod facts;
mod findings;
mod report;
mod rounds;

pub use diagnosis::{Complaint, diagnose, doubtful};
pub use facts::{Facts, Interface, Library};
pub use findings::{Bandwidth, Disk, Examine, Findings, Link, MAX_PEERS, Peer, Probed};
pub use report::{Pair, Patient, Report};
pub use rounds::{Round, every_pair, ring, rounds};

//! Where a coordinator and its groups stand, for people.

use std::fmt;

use cluster::Shortage;

use crate::api::{ModelInfo, whereabouts};

/// Where the groups stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Another coordinator leads; where its public service is, if it is known.
    Standby(Option<String>),
    /// No group can be formed.
    Waiting(Shortage),
    /// A group could be formed, but it is early, and more workers would make it wider.
    Gathering {
        /// Workers there are.
        joined: usize,
    },
    /// The workers load their shares and connect.
    Loading,
    /// Steps run, in one group at least.
    Serving(ModelInfo),
    /// A worker could not do its part, and there are too few without it.
    Failed(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Standby(leader) => write!(f, "standing by: {}", whereabouts(leader.as_deref())),
            State::Waiting(shortage) => shortage.fmt(f),
            State::Gathering { joined } => write!(f, "waiting for more workers: {joined} joined"),
            State::Loading => f.write_str("the workers are loading the model"),
            State::Serving(ModelInfo { name, ranks, groups: 1, .. }) => {
                write!(f, "serving {name} on {ranks} ranks")
            }
            State::Serving(ModelInfo { name, ranks, groups, .. }) => {
                write!(f, "serving {name} on {ranks} ranks in {groups} groups")
            }
            State::Failed(reason) => f.write_str(reason),
        }
    }
}

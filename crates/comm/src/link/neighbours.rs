//! The connections with neighbouring stages, as they were formed, before rows travel.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;

use super::host::HostLink;
use super::tcp::{TcpInlet, TcpOutlet};
use crate::collective::{AbortHandle, Error, Result};
use crate::group::{GroupSpec, Member};

/// A rank's connections with the ranks in front of it and behind it. What becomes of them is the device's matter.
#[derive(Debug)]
pub struct Neighbours {
    pub(crate) own: Member,
    pub(crate) stages: usize,
    pub(crate) from: Option<Neighbour>,
    pub(crate) to: Vec<Neighbour>,
    pub(crate) abort: AbortHandle,
}

/// A rank of a neighbouring stage.
#[derive(Debug)]
pub(crate) struct Neighbour {
    pub(crate) member: Member,
    /// Among all members.
    pub(crate) number: usize,
    /// Non-blocking.
    pub(crate) stream: TcpStream,
}

impl Neighbours {
    /// Of the streams with ranks of other stages.
    pub(crate) fn new(
        spec: &GroupSpec,
        mut streams: BTreeMap<Member, TcpStream>,
        abort: AbortHandle,
    ) -> Result<Self> {
        let mut neighbour = |member: Member| {
            let missing = || Error::Lost { rank: member.rank, source: io::ErrorKind::NotConnected.into() };
            let stream = streams.remove(&member).ok_or_else(|| missing().of_stage(member.stage))?;
            Ok(Neighbour { member, number: spec.number(member.stage, member.rank), stream })
        };
        let from = spec.sender().map(&mut neighbour).transpose()?;
        let to = spec.receivers().map(neighbour).collect::<Result<_>>()?;
        Ok(Self { own: spec.own(), stages: spec.stages.len(), from, to, abort })
    }

    /// Rows go by the host's memory and these connections.
    ///
    /// # Errors
    /// [`Error::Lost`] where this machine has no thread for a connection.
    pub fn by_host(self) -> Result<HostLink> {
        let Self { own, stages, from, to, abort } = self;
        let mut link = HostLink::new(own.stage, stages, abort.clone());
        if let Some(Neighbour { member, number, stream }) = from {
            link.inlet = Some((number, Box::new(TcpInlet { rank: member.rank, stream })));
        }
        for Neighbour { member, number, stream } in to {
            let outlet = TcpOutlet::start(member.rank, stream, stages, abort.clone())?;
            link.outlets.push((number, Box::new(outlet)));
        }
        Ok(link)
    }
}

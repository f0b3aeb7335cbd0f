//! A connection between two GPUs of neighbouring stages: whether it is by NCCL, and who is at its ends.

use kernels::Cuda;
use kernels::cuda::Communicator;

use super::connect::{ConnectOptions, Connecting};
use super::guard::Guard;
use crate::collective::{AbortHandle, Error, Result};
use crate::group::Member;
use crate::link::Neighbour;
use crate::tcp::TcpTransport;

/// One end of it. Between the two, who sends is rank 0 and who receives is rank 1.
#[derive(Debug)]
pub(super) struct Edge {
    members: [Member; 2],
    /// Of the other end.
    peer: Member,
    /// Its number among all members.
    pub(super) number: usize,
    /// What they agreed over, kept because a rank that ends closes it.
    guard: Guard<TcpTransport>,
}

impl Edge {
    /// Agrees with the rank at the other end, which calls this too; without a communicator they found no better way than the host's
    /// memory.
    ///
    /// # Errors
    /// As [`connect`](super::connect()), in [`Error::Stage`] where a rank is named.
    pub(super) fn connect(
        cuda: &Cuda,
        own: Member,
        peer: Neighbour,
        abort: &AbortHandle,
        options: ConnectOptions,
    ) -> Result<(Self, Option<Communicator>)> {
        let Neighbour { member: peer, number, stream } = peer;
        let (rank, members) = if own < peer { (0, [own, peer]) } else { (1, [peer, own]) };
        // So that a wait for the other rank is one for the other member.
        let abort = abort.among(number - (1 - rank));
        let guard = Guard::new(TcpTransport::pair(rank, stream, abort));
        let mut edge = Self { members, peer, number, guard };
        let none = Err("stages do not share memory".to_owned());
        let connecting = Connecting::begin(cuda, &mut edge.guard, none, options);
        match connecting.and_then(|mut connecting| connecting.nccl()) {
            Ok(communicator) => Ok((edge, communicator)),
            Err(error) => Err(edge.named(error)),
        }
    }

    /// What they agreed over, to be used for rows.
    pub(super) fn into_neighbour(self) -> Option<Neighbour> {
        let Self { peer: member, number, guard, .. } = self;
        Some(Neighbour { member, number, stream: guard.transport.into_stream()? })
    }

    /// Whether there is any use in waiting for the other end.
    pub(super) fn go_on(&mut self) -> bool {
        self.guard.trouble().is_ok()
    }

    /// Why a call failed, of which the device says `error`: whoever is gone, or was told to stop, is the reason.
    pub(super) fn reason(&self, error: kernels::Error) -> Error {
        self.named(self.guard.reason(error))
    }

    /// An error by the members that it is about.
    fn named(&self, error: Error) -> Error {
        let rank = match &error {
            Error::Lost { rank, .. } | Error::Protocol { rank, .. } | Error::Unavailable { rank, .. } => {
                *rank
            }
            _ => return error,
        };
        let Member { stage, rank } = self.members[rank.min(1)];
        let source = match error {
            Error::Lost { source, .. } => Error::Lost { rank, source },
            Error::Protocol { what, .. } => Error::Protocol { rank, what },
            Error::Unavailable { choice, why, .. } => Error::Unavailable { choice, rank, why },
            other => other,
        };
        Error::Stage { stage, source: Box::new(source) }
    }
}

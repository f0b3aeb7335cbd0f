//! How GPUs of neighbouring stages exchange: by NCCL where both ends of a connection have it, else by the host's memory and TCP.

use std::iter::once;

use kernels::Cuda;
use kernels::cuda::{Buffer, Communicator, Outbox, Stage};
use tracing::info;

use super::connect::ConnectOptions;
use super::edge::Edge;
use crate::collective::{AbortHandle, Result};
use crate::group::Member;
use crate::link::{Alone, Calls, HostLink, Neighbour, Neighbours, StageLink, nobody_in_front};

/// Connects this GPU with those of the stages around. Every rank of the pipeline calls this with the same arguments but its own choice,
/// on which both ends of a connection have to agree; [`CollectiveChoice::Peer`](crate::CollectiveChoice::Peer) is about ranks of one
/// stage and means the host's memory here.
///
/// A rank waits for a message before it begins a step, and no message is sent before what it holds is known to be a result: so what
/// another rank of this stage left undone when it was lost does not reach the next stage.
///
/// # Errors
/// As [`connect`](super::connect()), in [`Error::Stage`] where a rank is named.
pub fn connect_stages(
    cuda: &Cuda,
    neighbours: Neighbours,
    options: ConnectOptions,
) -> Result<Box<dyn StageLink<Buffer>>> {
    let Neighbours { own, stages, from, to, abort } = neighbours;
    if stages == 1 {
        return Ok(Box::new(Alone));
    }
    let connect = |neighbour: Neighbour| {
        let Member { stage, rank } = neighbour.member;
        let (edge, communicator) = Edge::connect(cuda, own, neighbour, &abort, options)?;
        let used = if communicator.is_some() { "NCCL" } else { "the host's memory" };
        info!(stage, rank, used, "with that of another stage, the GPU exchanges by");
        Ok((edge, communicator))
    };
    let from = || from.map(connect).transpose();
    let to = || to.into_iter().map(connect).collect::<Result<Vec<_>>>();
    // Every other stage begins with the one behind it: so a long pipeline does not wait for one connection after the other.
    let (from, to) = if own.stage.is_multiple_of(2) {
        let to = to()?;
        (from()?, to)
    } else {
        (from()?, to()?)
    };

    let mut host = Neighbours { own, stages, from: None, to: Vec::new(), abort: abort.clone() };
    let (mut inlet, mut outlets) = (None, Vec::new());
    match from {
        Some((edge, Some(communicator))) => inlet = Some((edge, communicator)),
        Some((edge, None)) => host.from = edge.into_neighbour(),
        None => {}
    }
    for (edge, communicator) in to {
        match communicator {
            Some(communicator) => outlets.push((edge, Outbox::new(communicator)?)),
            None => host.to.extend(edge.into_neighbour()),
        }
    }
    let mut link = GpuLink::staged(cuda, host.by_host()?, abort);
    (link.inlet, link.outlets) = (inlet, outlets);
    Ok(Box::new(link))
}

/// The link of a GPU whose rows all go by the host's memory.
pub fn staged_link(cuda: &Cuda, host: HostLink) -> Box<dyn StageLink<Buffer>> {
    let abort = host.abort_handle();
    Box::new(GpuLink::staged(cuda, host, abort))
}

/// One GPU's connections with the stages around.
#[derive(Debug)]
struct GpuLink {
    inlet: Option<(Edge, Communicator)>,
    outlets: Vec<(Edge, Outbox)>,
    /// With those that are not reached by NCCL.
    host: HostLink,
    staging: Stage,
    calls: Calls,
    abort: AbortHandle,
}

impl GpuLink {
    fn staged(cuda: &Cuda, host: HostLink, abort: AbortHandle) -> Self {
        let calls = Calls::new(abort.clone());
        Self { inlet: None, outlets: Vec::new(), host, staging: Stage::new(cuda), calls, abort }
    }

    /// Lets nothing wait on the device any more, where a call failed.
    fn end_after(&mut self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.inlet.iter_mut().for_each(|(_, communicator)| communicator.abort());
            self.outlets.iter_mut().for_each(|(_, outbox)| outbox.abort());
        }
        result
    }
}

impl StageLink<Buffer> for GpuLink {
    fn stage(&self) -> usize {
        self.host.stage()
    }

    fn stages(&self) -> usize {
        self.host.stages()
    }

    fn sends(&self) -> bool {
        !self.outlets.is_empty() || self.host.sends()
    }

    fn reserve(&mut self, len: usize) -> Result<()> {
        self.outlets.iter_mut().try_for_each(|(_, outbox)| Ok(outbox.reserve(len)?))
    }

    fn send(&mut self, len: usize, x: &Buffer) -> Result<()> {
        let Self { outlets, host, staging, calls, .. } = self;
        let sent = calls.run(|abort| {
            for (edge, outbox) in outlets {
                abort.wait_for_member(Some(edge.number));
                outbox.send(len, x, &mut || edge.go_on()).map_err(|error| edge.reason(error))?;
            }
            if host.sends() { host.send_rows(staging.load(once(x), len)?.to_vec()) } else { Ok(()) }
        });
        self.end_after(sent)
    }

    fn receive(&mut self, len: usize, x: &mut Buffer) -> Result<()> {
        let Self { inlet, host, staging, calls, .. } = self;
        let received = calls.run(|abort| match inlet {
            Some((edge, communicator)) => {
                abort.wait_for_member(Some(edge.number));
                let received = communicator.receive(0, len, x, &mut || edge.go_on());
                received.map_err(|error| edge.reason(error))
            }
            None if host.receives() => {
                host.receive_rows(staging.floats(len)?)?;
                Ok(staging.store(len, x)?)
            }
            None => Err(nobody_in_front()),
        });
        self.end_after(received)
    }
}

impl Drop for GpuLink {
    fn drop(&mut self) {
        // What was sent is still received, unless this rank is told to leave at once. After a failed call nothing is left to close.
        let mut go_on = || !self.abort.is_aborted();
        self.inlet.iter_mut().for_each(|(_, communicator)| communicator.close(&mut go_on));
        self.outlets.iter_mut().for_each(|(_, outbox)| outbox.close(&mut go_on));
    }
}

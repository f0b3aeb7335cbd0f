//! Collectives over any [`Transport`].
//!
//! The order of the additions is the tree's, whichever way the data travels: short sums go to everybody at once (one
//! exchange), long ones are added in shares, one for each rank, and the sums then go round (two exchanges, fewest
//! bytes).

use std::ops::Range;

use kernels::{HostBuffer, Partial, Tree};

use crate::collective::{AbortHandle, Collective, Error, Result};
use crate::fold::{Part, fold};
use crate::ranges::Ranges;
use crate::transport::Transport;

/// Up to this many elements of a sum (32 KiB), latency counts more than bytes.
const ONE_SHOT_ELEMENTS: usize = 8192;

/// One rank's end of a group whose ranks hold contiguous ranges of units.
#[derive(Debug)]
pub struct MeshCollective<T> {
    transport: T,
    ranges: Ranges,
    /// Scratch: what goes out, and what came in, rank after rank.
    outbox: Vec<f32>,
    inbox: Vec<f32>,
    /// A call failed: the ranks may disagree about what comes next.
    lost: bool,
}

impl<T: Transport> MeshCollective<T> {
    /// `ranges`: the units of every rank, in order. Fails unless there is one for each rank and they tile `0..units`.
    pub fn new(transport: T, ranges: Vec<Range<usize>>) -> Result<Self> {
        let ranges = Ranges::new(ranges, transport.size())?;
        Ok(Self { transport, ranges, outbox: Vec::new(), inbox: Vec::new(), lost: false })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn transport(&self) -> &T {
        &self.transport
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Runs a call, unless an earlier one failed.
    pub(crate) fn call(&mut self, body: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.lost {
            return Err(Error::Ended);
        }
        let result = body(self);
        self.lost = result.is_err();
        result
    }

    /// Adds everybody's sub-trees into `out`; `own` are this rank's, of the length of `out`. Only within [`Self::call`].
    pub(crate) fn reduce(&mut self, tree: Tree, own: &[Part<'_>], out: &mut [f32]) -> Result<()> {
        self.ranges.check_reduce(tree, self.transport.rank(), own.iter().map(|(units, _)| units))?;
        let (rank, size, len) = (self.transport.rank(), self.transport.size(), out.len());
        if size == 1 {
            fold(tree, own, out);
            return Ok(());
        }
        if len <= ONE_SHOT_ELEMENTS {
            return self.exchange_and_fold(tree, own, &vec![0..len; size], out);
        }
        let shares: Vec<_> = (0..size).map(|r| len * r / size..len * (r + 1) / size).collect();
        self.exchange_and_fold(tree, own, &shares, &mut out[shares[rank].clone()])?;
        self.share_out(&shares, out)
    }

    /// Gives every rank the elements `shares[it]` of this rank's sub-trees `own`, and adds everybody's sub-trees of
    /// `shares[this rank]` into `out`.
    fn exchange_and_fold(
        &mut self,
        tree: Tree,
        own: &[Part<'_>],
        shares: &[Range<usize>],
        out: &mut [f32],
    ) -> Result<()> {
        let rank = self.transport.rank();
        self.outbox.clear();
        let mut parcels: Vec<Range<usize>> = Vec::with_capacity(shares.len());
        for (to, share) in shares.iter().enumerate() {
            match parcels.last() {
                // Equal shares (of everything) are packed once.
                Some(last) if *share == shares[to - 1] => parcels.push(last.clone()),
                _ => {
                    let start = self.outbox.len();
                    own.iter().for_each(|(_, part)| self.outbox.extend_from_slice(&part[share.clone()]));
                    parcels.push(start..self.outbox.len());
                }
            }
        }
        let subtrees = self.ranges.subtrees(tree);
        let length = out.len();
        let lengths: Vec<usize> = subtrees.iter().map(|theirs| theirs.len() * length).collect();
        self.all_to_all(&parcels, &lengths)?;

        let mut parts: Vec<Part<'_>> = Vec::with_capacity(tree.units);
        let mut inbox = &self.inbox[..];
        for (from, subtrees) in subtrees.into_iter().enumerate() {
            if from == rank {
                parts.extend(own.iter().map(|(units, part)| (units.clone(), &part[shares[rank].clone()])));
                continue;
            }
            for units in subtrees {
                let (part, rest) = inbox.split_at(length);
                parts.push((units, part));
                inbox = rest;
            }
        }
        fold(tree, &parts, out);
        Ok(())
    }

    /// Everybody gets everybody's share of `out`.
    fn share_out(&mut self, shares: &[Range<usize>], out: &mut [f32]) -> Result<()> {
        let rank = self.transport.rank();
        self.outbox.clear();
        self.outbox.extend_from_slice(&out[shares[rank].clone()]);
        let lengths: Vec<usize> = shares.iter().map(Range::len).collect();
        self.all_to_all(&vec![0..lengths[rank]; shares.len()], &lengths)?;
        let mut inbox = &self.inbox[..];
        for (_, share) in shares.iter().enumerate().filter(|(from, _)| *from != rank) {
            let (theirs, rest) = inbox.split_at(share.len());
            out[share.clone()].copy_from_slice(theirs);
            inbox = rest;
        }
        Ok(())
    }

    /// Sends `outbox[parcels[to]]` to every other rank, and receives `lengths[from]` elements of each into `inbox`.
    fn all_to_all(&mut self, parcels: &[Range<usize>], lengths: &[usize]) -> Result<()> {
        let rank = self.transport.rank();
        let others = parcels.iter().enumerate().filter(|(to, _)| *to != rank);
        let outgoing: Vec<(usize, &[u8])> =
            others.map(|(to, parcel)| (to, bytemuck::cast_slice(&self.outbox[parcel.clone()]))).collect();
        let mut incoming = compartments(&mut self.inbox, rank, lengths);
        self.transport.exchange(&outgoing, &mut incoming)
    }

    /// Puts everybody's columns, of which this rank has `own`, into `out` on the root: `[rows, Σ counts]`, elsewhere empty. Only within
    /// [`Self::call`].
    pub(crate) fn collect(
        &mut self,
        root: usize,
        rows: usize,
        own: &[f32],
        counts: &[usize],
        out: &mut [f32],
    ) -> Result<()> {
        let rank = self.transport.rank();
        if rank != root {
            return self.transport.exchange(&[(root, bytemuck::cast_slice(own))], &mut []);
        }
        let lengths: Vec<usize> = counts.iter().map(|count| rows * count).collect();
        self.transport.exchange(&[], &mut compartments(&mut self.inbox, rank, &lengths))?;
        let cols: usize = counts.iter().sum();
        let mut inbox = &self.inbox[..];
        let mut first = 0;
        for (from, &count) in counts.iter().enumerate() {
            let theirs = if from == rank {
                own
            } else {
                let (theirs, rest) = inbox.split_at(lengths[from]);
                inbox = rest;
                theirs
            };
            for row in 0..rows {
                out[row * cols + first..][..count].copy_from_slice(&theirs[row * count..][..count]);
            }
            first += count;
        }
        Ok(())
    }

    /// Gives everybody the root's `x`. Only within [`Self::call`].
    pub(crate) fn hand_out(&mut self, root: usize, x: &mut [f32]) -> Result<()> {
        let (rank, size) = (self.transport.rank(), self.transport.size());
        if rank != root {
            return self.transport.exchange(&[], &mut [(root, bytemuck::cast_slice_mut(x))]);
        }
        let x: &[u8] = bytemuck::cast_slice(x);
        let others: Vec<(usize, &[u8])> = (0..size).filter(|to| *to != root).map(|to| (to, x)).collect();
        self.transport.exchange(&others, &mut [])
    }
}

impl<B: HostBuffer, T: Transport> Collective<B> for MeshCollective<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn tree_reduce(&mut self, tree: Tree, len: usize, partials: &[Partial<B>], out: &mut B) -> Result<()> {
        const OP: &str = "tree_reduce";
        self.call(|mesh| {
            let own = partials
                .iter()
                .map(|partial| Ok((partial.units.clone(), elements(OP, &partial.sum, len)?)))
                .collect::<Result<Vec<Part<'_>>>>()?;
            mesh.reduce(tree, &own, elements_mut(OP, out, len)?)
        })
    }

    fn gather(&mut self, root: usize, rows: usize, x: &B, counts: &[usize], out: &mut B) -> Result<()> {
        const OP: &str = "gather";
        self.call(|mesh| {
            let (rank, all) = (mesh.transport.rank(), counts.iter().sum::<usize>());
            mesh.ranges.check_gather(root, counts)?;
            let own = elements(OP, x, rows * counts[rank])?;
            let len = if rank == root { rows * all } else { 0 };
            mesh.collect(root, rows, own, counts, elements_mut(OP, out, len)?)
        })
    }

    fn broadcast(&mut self, root: usize, len: usize, x: &mut B) -> Result<()> {
        self.call(|mesh| {
            mesh.ranges.check_broadcast(root)?;
            mesh.hand_out(root, elements_mut("broadcast", x, len)?)
        })
    }

    fn abort_handle(&self) -> AbortHandle {
        self.transport.abort_handle()
    }
}

/// Makes room in `inbox` for `lengths[from]` elements of every rank but `own`, and cuts it up for an exchange.
fn compartments<'a>(inbox: &'a mut Vec<f32>, own: usize, lengths: &[usize]) -> Vec<(usize, &'a mut [u8])> {
    let others = || lengths.iter().enumerate().filter(|(from, _)| *from != own);
    inbox.resize(others().map(|(_, length)| length).sum(), 0.0);
    let mut rest = &mut inbox[..];
    let mut cut = |length| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(length);
        rest = behind;
        bytemuck::cast_slice_mut(part)
    };
    others().map(|(from, &length)| (from, cut(length))).collect()
}

fn elements<'a, B: HostBuffer>(op: &'static str, buffer: &'a B, len: usize) -> Result<&'a [f32]> {
    buffer.as_f32().and_then(|all| all.get(..len)).ok_or_else(|| too_short(op, len))
}

fn elements_mut<'a, B: HostBuffer>(op: &'static str, buffer: &'a mut B, len: usize) -> Result<&'a mut [f32]> {
    buffer.as_f32_mut().and_then(|all| all.get_mut(..len)).ok_or_else(|| too_short(op, len))
}

fn too_short(op: &'static str, len: usize) -> Error {
    let detail = format!("a buffer is not f32 or has fewer than {len} elements");
    Error::Shape { op, detail }
}
